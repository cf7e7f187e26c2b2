"""Training steps in several variants, the CRF and the walk: time, GPU kernels and the time that the GPU was busy.

    python -m benchmarks.gpu_steps steps --tasks segment,classify,psa,irn --variants asis,cl,cl+graph,cl+blocks
    python -m benchmarks.gpu_steps crf
    python -m benchmarks.gpu_steps walk

Prints a JSON line per measurement, and appends it to --out. step_ms waits after each step, stream_ms at the end alone.
Runs on a CPU too, where only the times are there. Variants, joined by +: asis; nondet (cuDNN may choose kernels whose
sums differ), bench (cuDNN tries them); cl (weights channels_last); blocks (each residual block compiled), compile (the
whole task); graph (forward and backward as one CUDA graph).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import wait
from benchmarks.scaling_ranks import build_task, settings
from esol.config import CrfConfig
from esol.engines import compiled
from esol.models.folded import for_training
from esol.ops.dense_crf import DenseCrf, unary_from_probabilities
from esol.ops.random_walk import random_walk
from esol.training.optim import build_optimizer

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIZES = {
    "classify": (16, 512),
    "expand": (16, 512),
    "shrink": (16, 512),
    "psa": (8, 448),
    "irn": (32, 512),
    "segment": (10, 321),
}  # batch and crop of VOC 2012's recipe


def clock(work: Callable[[], object], warm: int, count: int) -> dict[str, float]:
    """Milliseconds a call: the median where each is waited for, and the mean of a stream of them."""
    for _ in range(warm):
        work()
    each = []
    for _ in range(count):
        wait()
        begun = time.perf_counter()
        work()
        wait()
        each.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    for _ in range(count):
        work()
    wait()
    stream = (time.perf_counter() - begun) / count
    return {"step_ms": round(1e3 * statistics.median(each), 3), "stream_ms": round(1e3 * stream, 3)}


def busy(work: Callable[[], object]) -> dict[str, Any]:
    """Kernels of one call, and for how long the GPU had some; nothing on a CPU."""
    if not CUDA:
        return {}
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        work()
        wait()
    kernels = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    longest = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)[:8]
    top = [(event.key[:60], round(event.self_device_time_total / 1e3, 2), event.count) for event in longest]
    return {"kernels": len(kernels), "busy_ms": sum(k.time_range.elapsed_us() for k in kernels) / 1e3, "top": top}


def steps(args: argparse.Namespace, note: Callable[..., None]) -> None:
    """One row for every task and variant; an error is a row as well."""
    for name in args.tasks.split(","):
        batch, crop = args.batch or SIZES[name][0], args.crop or SIZES[name][1]
        for variant in args.variants.split(","):
            compiled.ready()
            about = {"what": "step", "task": name, "batch": batch, "crop": crop, "variant": variant}
            try:
                begun = time.time()
                step = _step(name, variant.split("+"), batch, crop)
                row = clock(step, 5, args.count)
                about |= {"start_s": round(time.time() - begun, 1), **row, **busy(step)}
                if CUDA:
                    about["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            except Exception as error:  # what a variant cannot do is a result
                about["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            note(**about)
            if CUDA:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


def _step(name: str, parts: list[str], batch: int, crop: int) -> Callable[[], None]:
    torch.manual_seed(0)
    torch.backends.cudnn.deterministic = not {"nondet", "bench"} & set(parts)
    torch.backends.cudnn.benchmark = "bench" in parts
    torch.backends.cudnn.allow_tf32 = False
    config = settings()
    task: Any = build_task(name, config).to(DEVICE).train()
    for_training(task, torch.bfloat16)
    if "cl" in parts:
        task = task.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(task, getattr(config, name))
    for group in optimizer.param_groups:
        group["lr"] = 1e-9  # random networks run away at the recipe's rate
    image = torch.randint(0, 256, (batch, 3, crop, crop), dtype=torch.uint8, device=DEVICE)
    cells = torch.randint(0, 3, (batch, 1, crop // 32 + 1, crop // 32 + 1), device=DEVICE).float()
    target = F.interpolate(cells, scale_factor=32)[:, 0, :crop, :crop].to(torch.uint8).contiguous()
    data = {"image": image, "labels": torch.ones(batch, 20, device=DEVICE), "key": [""] * batch, "target": target}
    if "blocks" in parts:
        for module in task.modules():
            if type(module).__name__ == "Bottleneck":
                module.compile(dynamic=False)
    forward = torch.compile(task, fullgraph=True, dynamic=False) if "compile" in parts else task
    graphed = "graph" in parts and CUDA

    def both() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=not graphed):
            loss = forward(data)[0]["loss"]
        loss.backward()

    if not graphed:

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            both()
            optimizer.step()

        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            both()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()

    def replay() -> None:
        graph.replay()
        optimizer.step()

    return replay


def crf(args: argparse.Namespace, note: Callable[..., None]) -> None:
    """Lattice and mean field, by labels and by photos at once: IRN's kernels for 3 and 6, DeepLab's for 21 and 81."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((375, 500), (500, 375), (333, 500), (375, 500)) if CUDA else ((60, 80), (80, 60), (53, 80), (60, 80))
    images = []
    for height, width in sizes:
        coarse = torch.rand(1, 3, 40, 50, generator=generator) * 255
        image = F.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 255)
        noise = torch.randn(image.shape, generator=generator) * 4
        images.append((image + noise).clamp(0, 255).to(torch.uint8).to(DEVICE))
    late = CrfConfig(gaussian_sxy=1, bilateral_sxy=67, bilateral_srgb=3, bilateral_compat=4)
    for labels, config in ((3, CrfConfig()), (6, CrfConfig()), (21, late), (81, late)):
        kernels = {
            name: getattr(config, name)
            for name in ("gaussian_sxy", "gaussian_compat", "bilateral_sxy", "bilateral_srgb", "bilateral_compat")
        }
        unaries = [
            unary_from_probabilities(torch.rand(labels, *size, generator=generator).softmax(0)).to(DEVICE)
            for size in sizes
        ]
        for count in (1, len(images)):
            some, own, of = images[:count], unaries[:count], list(range(count))
            made = DenseCrf(*some, **kernels)
            parts: dict[str, Callable[[], object]] = {
                "build": lambda some=some, kernels=kernels: DenseCrf(*some, **kernels),  # type: ignore[misc]
                "infer": lambda made=made, own=own, of=of: made.infer(own, 10, of),  # type: ignore[misc]
            }
            for part, work in parts.items():
                about = {"what": "crf", "size": sizes[0], "photos": count, "labels": labels, "part": part}
                note(**about, **clock(work, 2, 5), **busy(work))


def walk(args: argparse.Namespace, note: Callable[..., None]) -> None:
    """256 steps on the grids of PSA and IRN for a photo of 375 x 500; several at once, every second one upright."""
    for height, width, classes in ((47, 63, 3), (94, 125, 2)):
        for batch in (1, 4, 16):
            sizes = [(height, width) if i % 2 == 0 else (width, height) for i in range(batch)]
            maps = [torch.rand(classes, *size, device=DEVICE) for size in sizes]
            affinity = [torch.rand(34, *size, device=DEVICE) for size in sizes]

            def work(maps: list[torch.Tensor] = maps, affinity: list[torch.Tensor] = affinity) -> object:
                return random_walk(maps, affinity, 5, 8.0, 256)

            note(what="walk", grid=[height, width], photos=batch, **clock(work, 1, 3), **busy(work))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "crf", "walk"))
    parser.add_argument("--tasks", default="segment")
    parser.add_argument("--variants", default="asis")
    parser.add_argument("--batch", type=int, default=0, help="0 = the recipe's")
    parser.add_argument("--crop", type=int, default=0, help="0 = the recipe's")
    parser.add_argument("--count", type=int, default=15, help="of timed calls")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_steps.jsonl"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def note(**row: Any) -> None:
        print(json.dumps(row), flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    {"steps": steps, "crf": crf, "walk": walk}[args.what](args, note)


if __name__ == "__main__":
    main()
