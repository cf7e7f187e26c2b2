"""Step time of every training stage on 8 to 1,024 GPUs, from counted FLOP, bytes of gradients and the links' speed.

    python -m benchmarks.scaling_model
    python -m benchmarks.scaling_model --step-seconds classify=0.08 --step-seconds segment=0.25

T(N) lies between compute + communication (nothing overlaps) and forward + max(backward, communication) (all of the
communication runs beside the backward pass, as DDP tries). Efficiency is compute / T(N).

Communication, for M nodes of 8 GPUs, an all-reduce of B bytes in K buckets of 25 MiB, hierarchical: a ring inside the
node over a GPU's links, then rings between the nodes, which share the node's link:
    2 * 7/8 * B / node + 2 * (M-1)/M * B * headers / link + K * (2 * 7 * alpha_node + 2 * (M-1) * alpha_link)
and the agreement of 8 bytes once more the latencies. A ring's latency grows with M; NCCL's trees have log M there.

Compute: FLOP of one forward and backward pass of the real task, counted, over an assumed rate; --step-seconds STAGE=S
puts in its place what you measured for --images images on one GPU. The last table has this CPU's own time instead.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import machine, table
from benchmarks.scaling_ranks import STAGES, build_task, crop_of, random_batch, settings
from esol.config import Config

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
PER_NODE = 8
NODE_LINK = 200e9  # bytes/s per GPU and direction inside a node: what an NVSwitch machine's all-reduce reaches, assumed
NODE_ALPHA = 5e-6  # seconds per step of a ring
SHARE = 0.9  # of a link's rate that gradients get
HEADERS = 1.06  # bytes on the wire per byte of gradients, headers and acknowledgements: `benchmarks.scaling bytes`
BUCKET = 25 * 2**20  # DDP's


@dataclass(frozen=True)
class Network:
    """Between nodes: bytes/s of a node's link, and seconds per step of a ring."""

    name: str
    rate: float
    alpha: float


NETWORKS = (Network("25 Gbit/s Ethernet", 25e9 / 8, 30e-6), Network("200 Gbit/s InfiniBand", 200e9 / 8, 10e-6))


@dataclass(frozen=True)
class Work:
    """One image of a stage: FLOP of the two passes, seconds on this CPU in one thread, and the gradients' bytes."""

    forward: int
    backward: int
    seconds: float
    gradients: int


def count(stage: str, config: Config, side: int) -> Work:
    """One pass of the real task over one image of noise; the counter's own time is nothing beside it."""
    task = build_task(stage, config).train()
    batch = random_batch(1, side)
    began = time.perf_counter()
    with FlopCounterMode(display=False) as forward:
        losses, _ = task(batch)
    with FlopCounterMode(display=False) as backward:
        losses["loss"].backward()
    seconds = time.perf_counter() - began
    return Work(forward.get_total_flops(), backward.get_total_flops(), seconds, gradient_bytes(task))


def gradient_bytes(task: torch.nn.Module) -> int:
    """Float32, in every precision: engines keep weights and gradients so."""
    return 4 * sum(p.numel() for p in task.parameters() if p.requires_grad)


def communication(gpus: int, size: int, network: Network) -> float:
    """Seconds of all collectives of a step; the formula is this module's."""
    inside, nodes = min(gpus, PER_NODE), math.ceil(gpus / PER_NODE)
    latency = 2 * (inside - 1) * NODE_ALPHA + 2 * (nodes - 1) * network.alpha
    transfer = 2 * (inside - 1) / inside * size / NODE_LINK
    transfer += 2 * (nodes - 1) / nodes * size * HEADERS / (network.rate * SHARE)
    return transfer + (math.ceil(size / BUCKET) + 1) * latency


def bounds(compute: float, forward_share: float, exchange: float) -> tuple[float, float]:
    """Seconds of a step with all of the communication beside the backward pass, and with none of it."""
    return compute * forward_share + max(compute * (1 - forward_share), exchange), compute + exchange


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=30.0, help="sustained TFLOP/s of a GPU, an assumption")
    parser.add_argument("--images", type=int, default=4, help="images per GPU and step")
    parser.add_argument("--step-seconds", action="append", default=[], metavar="STAGE=S", help="measured on one GPU")
    args = parser.parse_args()

    torch.set_num_threads(1)
    config = settings()
    work = {stage: count(stage, config, crop_of(stage, config)) for stage in STAGES}
    measured = {name: float(value) for name, value in (text.split("=") for text in args.step_seconds)}
    per_image = {stage: (w.forward + w.backward) / args.tflops / 1e12 for stage, w in work.items()}
    per_image |= {stage: seconds / args.images for stage, seconds in measured.items()}

    print(f"{machine()}, seed 0, 1 thread, configs/voc12.yaml with random weights\n")
    rows = []
    for stage, w in work.items():
        source = "given" if stage in measured else f"at {args.tflops:g} TFLOP/s"
        flop = [w.forward / 1e9, w.backward / 1e9]
        seconds = [1e3 * args.images * per_image[stage], source, w.seconds]
        rows.append([stage, crop_of(stage, config), *flop, w.gradients / 1e6, *seconds])
    head = ("stage", "crop", "GFLOP forward", "GFLOP backward", "gradients, MB")
    print(table((*head, f"compute of {args.images} images, ms", "", "this CPU, s an image"), rows))

    for network in NETWORKS:
        print(f"\n{network.name} per node, {args.images} images per GPU: ms, full overlap to none (efficiency, %)\n")
        print(_over_gpus(work, {stage: args.images * s for stage, s in per_image.items()}, network))
    print("\nThe configuration's own global batch, on as many GPUs as can share it: images/s over those of one GPU\n")
    print(_fixed_batch(config, work, per_image))
    print(f"\n{NETWORKS[0].name}, with one thread of this CPU in place of each GPU, {args.images} images each\n")
    print(_this_cpu(work, args.images))


def _over_gpus(work: dict[str, Work], compute: dict[str, float], network: Network) -> str:
    """Rows of N, a column per stage."""
    rows = []
    for gpus in GPUS:
        row: list[object] = [gpus]
        for stage, w in work.items():
            seconds = compute[stage]
            share = w.forward / (w.forward + w.backward)
            low, high = bounds(seconds, share, communication(gpus, w.gradients, network))
            row.append(f"{1e3 * low:.1f} to {1e3 * high:.1f} ({100 * seconds / low:.0f} to {100 * seconds / high:.0f})")
        rows.append(row)
    return table(("GPUs", *work), rows)


def _fixed_batch(config: Config, work: dict[str, Work], per_image: dict[str, float]) -> str:
    rows = []
    for stage, w in work.items():
        batch = getattr(config, stage).global_batch
        gpus = [n for n in range(1, batch + 1) if batch % n == 0]
        row: list[object] = [stage, batch, ", ".join(map(str, gpus))]
        share = w.forward / (w.forward + w.backward)
        for network in NETWORKS:
            seconds = batch / gpus[-1] * per_image[stage]
            low, high = bounds(seconds, share, communication(gpus[-1], w.gradients, network))
            row.append(f"{batch * per_image[stage] / high:.1f} to {batch * per_image[stage] / low:.1f}")
        rows.append(row)
    head = ("stage", "global batch", "numbers of GPUs that divide it")
    return table((*head, *(f"speed-up at the most GPUs, {n.name}" for n in NETWORKS)), rows)


def _this_cpu(work: dict[str, Work], images: int) -> str:
    rows = []
    for stage, w in work.items():
        compute = images * w.seconds
        times = [compute + communication(n, w.gradients, NETWORKS[0]) for n in (GPUS[0], GPUS[-1])]
        rows.append([stage, compute, *times, f"{compute / times[-1]:.1%}"])
    edges = (f"{n} processes, no overlap, s" for n in (GPUS[0], GPUS[-1]))
    return table(("stage", "compute, s", *edges, "efficiency of the last"), rows)


if __name__ == "__main__":
    main()
