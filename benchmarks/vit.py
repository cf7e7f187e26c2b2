"""A plain ViT on a photo of 448 pixels: its features, and with them the walk on its attention; seconds and memory.

    python -m benchmarks.vit

DINOv2's ViT-S/14 with random weights, two threads, a process for each row: memory is the most that it ever held, less
what it held before the first photo.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics

import torch

from benchmarks.common import machine, once, table
from esol.config import BackboneConfig, WalkConfig
from esol.models.attention import PatchAttention
from esol.models.backbones import build_backbone
from esol.models.folded import for_inference
from esol.models.regrid import squeeze_to_grid
from esol.ops.frozen_affinity import doubly_stochastic
from esol.ops.pseudo_labels import attended_scores

NETWORK, SIDE, CLASSES, BLOCKS, ROUNDS = "timm:vit_small_patch14_reg4_dinov2.lvd142m", 448, 2, 8, 3
KINDS = {"float32": None, "bf16": torch.bfloat16}


@torch.no_grad()
def measured(stride: int, kind: str, walk: bool) -> list[object]:
    """One line of the table."""
    torch.set_num_threads(2)
    net = build_backbone(BackboneConfig(NETWORK, "none", output_stride=stride, freeze="all"))
    net = for_inference(net, torch.device("cpu"), KINDS[kind])
    attention = PatchAttention(net, BLOCKS) if walk else None
    photo = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8)
    maps = torch.rand(CLASSES, SIDE // 4, SIDE // 4)

    def work() -> None:
        if attention is None:
            with torch.autocast("cpu", KINDS[kind], enabled=kind != "float32"):
                net(squeeze_to_grid(photo, stride))
            return

        def transition(_: int) -> tuple[torch.Tensor, int]:
            with torch.autocast("cpu", KINDS[kind], enabled=kind != "float32"):
                matrix, width = attention(photo)
            return doubly_stochastic(matrix), width

        attended_scores([maps], transition, [(SIDE, SIDE)], WalkConfig())

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    seconds = statistics.median(once(work) for _ in range(ROUNDS))
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return [stride, kind, "features and walk" if walk else "features", f"{seconds:.2f}", f"{memory:.0f}"]


def main() -> None:
    ways = [(stride, kind, walk) for stride in (16, 8) for kind in KINDS for walk in (False, True)]
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for way in ways:
            rows.append(pool.apply(measured, way))
            print(*rows[-1], flush=True)
    print(f"{machine()}, two threads, {NETWORK} on {SIDE} x {SIDE} pixels\n")
    print(table(("stride", "precision", "what", "seconds", "MiB more"), rows))


if __name__ == "__main__":
    main()
