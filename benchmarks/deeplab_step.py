"""Training steps of the full ResNet-101 recipe on real photos: loss, time and memory of each.

    python -m benchmarks.deeplab_step --data data/voc-animals --weights resnet101.pth

Batch 2, crop 321, inputs 1, .75 and .5, four losses, all layers learning, the true masks. Without weights the network
is random, which the recipe is not made for: frozen batch norm then has no statistics, and at the recipe's learning rate
the loss runs away. So its statistics are first taken from eight of the photos, the last scale of every residual branch
is 0.1, and the learning rate is a hundredth of the recipe's. Time and memory are the same. The same --photos come round
and round, because the loss of two photos depends more on the photos than on twenty steps.
On a GPU: bf16, images/s, and the share of the peak that --peak names in TFLOP/s.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import machine, table
from esol.config import BackboneConfig
from esol.data.index import Index
from esol.data.plan import Plan, sample_rng
from esol.data.reader import ShardReader
from esol.data.samples import Batch, decode_mask
from esol.data.transforms import Crop, decode, training_crop
from esol.models.backbones import build_backbone
from esol.models.deeplab import DeepLab
from esol.stages.segment import SegmentConfig, SegmentTask
from esol.training.optim import build_optimizer, learning_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--weights", default="none")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--peak", type=float, default=0.0, help="the chip's dense bf16 peak, TFLOP/s")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = SegmentConfig(global_batch=args.batch)
    if args.weights == "none":
        config = replace(config, lr=config.lr / 100)
    model = BackboneConfig("resnet101", args.weights, output_stride=8, freeze="none")
    index = Index.load(args.data)
    task = SegmentTask(DeepLab(build_backbone(model), len(index.classes) + 1, config.rates), config).to(device).train()
    batches = _batches(index, args.split, config, args.photos // args.batch)
    if args.weights == "none":
        make_random_start_sound(task.handover.backbone, torch.cat([b["image"] for b in batches])[:8].to(device))
    optimizer = build_optimizer(task, config)

    rows: list[list[object]] = []
    flops = 0
    for step in range(args.steps):
        batch = batches[step % len(batches)]
        began = time.perf_counter()
        batch = {**batch, "image": batch["image"].to(device), "target": batch["target"].to(device)}  # type: ignore[typeddict-item]
        rate = learning_rate(step, 30_000, config)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_multiplier"]
        optimizer.zero_grad()
        counter = FlopCounterMode(display=False) if step == 0 else nullcontext()  # it holds up a GPU
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"), counter:
            loss = task(batch)[0]["loss"]
            loss.backward()
        if isinstance(counter, FlopCounterMode):
            flops = counter.get_total_flops()
        optimizer.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise SystemExit(f"step {step + 1}: loss {value}")
        rows.append([step + 1, value, time.perf_counter() - began, _peak(device)])
        print(f"step {step + 1} of {args.steps}: loss {value:.3f}", file=sys.stderr, flush=True)
    losses = np.array([row[1] for row in rows], float)
    seconds = float(np.median([row[2] for row in rows[1:]]))
    rounds = [f"{losses[i : i + len(batches)].mean():.3f}" for i in range(0, len(losses), len(batches))]

    print(f"{machine()}, seed 0, {torch.get_num_threads()} threads, weights {args.weights}")
    precision = "bf16" if device.type == "cuda" else "fp32"
    print(f"batch {args.batch}, crop {config.crop}, inputs {config.inputs}, {precision}, learning rate {config.lr:g}\n")
    print(table(("step", "loss", "seconds", "peak memory, GiB"), rows))
    print(f"\nmean loss of each round of {args.photos} photos: {', '.join(rounds)}")
    print(f"median step {seconds:.2f} s, {args.batch / seconds:.2f} images/s, {flops / 1e12:.2f} TFLOP a step")
    if args.peak:
        print(f"share of {args.peak:g} TFLOP/s: {100 * flops / seconds / 1e12 / args.peak:.1f} %")


def _batches(index: Index, split: str, config: SegmentConfig, steps: int) -> list[Batch]:
    reader, ordinals = ShardReader(index), index.split(split)
    plan = Plan(ordinals, index.shard_of[ordinals], 0, config.global_batch)
    crop, order = Crop(config.crop, scale=config.scale), plan.epoch_order(0)
    found: list[Batch] = []
    for step in range(steps):
        crops = []
        for ordinal in order[step * config.global_batch : (step + 1) * config.global_batch].tolist():
            name = reader.name(ordinal)
            mask = torch.from_numpy(decode_mask(reader.read(ordinal, "mask.png"), name))
            rng = sample_rng(0, 0, str(index.keys[ordinal]))
            crops.append(training_crop(decode(reader.image(ordinal), name), rng, crop, (124, 116, 104), mask))
        stacked = torch.stack(crops)
        labels = torch.zeros(len(crops), len(index.classes))
        found.append({"image": stacked[:, :3], "target": stacked[:, 3], "labels": labels, "key": [""] * len(crops)})
    return found


@torch.no_grad()
def make_random_start_sound(backbone: nn.Module, images: Tensor) -> None:
    for name, module in backbone.named_modules():
        if name.endswith(".bn3"):
            nn.init.constant_(module.weight, 0.1)  # type: ignore[arg-type]
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    for module in norms:
        module.train()
        module.momentum = None  # the plain mean
        module.reset_running_stats()
    backbone(images)
    for module in norms:
        module.eval()


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
