"""A large photo in windows against the same photo whole, and what a very large one takes.

python -m benchmarks.large_photo RUN [--side 4000] [--largest 10000]

The photo is a mosaic of the run's own photos at their own size. Agreement is that of the label maps at one scale before
the CRF, and of the class maps' seeds at the run's scales; memory is the process's highest. --largest 0 leaves it out.
RUN needs a finished segment stage.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.common import machine, table
from esol.config import MapsConfig
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.transforms import decode
from esol.deploy.model import Model
from esol.ops import class_maps, tiles
from esol.ops.seeds import seed
from esol.pipeline import records
from esol.pipeline.cam import ran_with_maps, trained_heads

THRESHOLD = 0.3  # of the seeds that are compared


def mosaic(run: Path, side: int) -> Tensor:
    """uint8 (3, side, side)."""
    reader = ShardReader(Index.load(records.finished(run)["segment"].ran_with.data.root))
    canvas, ordinal, top = torch.zeros(3, side, side, dtype=torch.uint8), 0, 0
    while top < side:
        left, tallest = 0, side
        while left < side:
            one = decode(reader.image(ordinal % len(reader.index)), "photo")[:, : side - top, : side - left]
            canvas[:, top : top + one.shape[1], left : left + one.shape[2]] = one
            left, tallest, ordinal = left + one.shape[2], min(tallest, one.shape[1]), ordinal + 1
        top += tallest
    return canvas


def agreement(run: Path, side: int) -> list[list[object]]:
    """Per cent of the pixels on which windows and whole agree: of DeepLab's labels, and of every head's seeds."""
    photo, size = mosaic(run, side), (side, side)
    model = Model(run, fast=True, full_size=True)
    config = ran_with_maps(run)
    heads, own = trained_heads(config, len(model.info.classes)).eval(), config.section(MapsConfig)
    labels = torch.ones(1, len(model.info.classes))

    def answers() -> dict[str, NDArray[np.uint8]]:
        found = {"DeepLab's labels": model.label_maps([photo], [size])[0][0]}
        made = class_maps.class_maps(photo[None], labels, heads, scales=own.scales, flip=own.flip)[0]
        return found | {f"seeds of {s}": seed(m.full, m.classes, THRESHOLD).numpy() for s, m in made.items()}

    cut = answers()
    with patch.object(tiles, "SIDE", 4 * side):
        whole = answers()
    return [[name, 100 * float((cut[name] == whole[name]).mean()), 100 * float((cut[name] > 0).mean())] for name in cut]


def predicted(run: Path, side: int) -> list[object]:
    """Minutes and highest memory in MiB of `esol predict --fast --full-size` on a mosaic of that side."""
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder, "mosaic.jpg")
        Image.fromarray(mosaic(run, side).permute(1, 2, 0).numpy()).save(photo, quality=90)
        began = time.monotonic()
        command = [sys.executable, "-m", "esol.cli", "predict", run, photo, "--out", Path(folder, "out")]
        subprocess.run([*command, "--full-size", "--fast"], check=True)
        took = time.monotonic() - began
    return [f"{side} x {side}", took / 60, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--side", type=int, default=4000)
    parser.add_argument("--largest", type=int, default=10000)
    args = parser.parse_args()
    rows = [predicted(args.run, args.largest)] if args.largest else []
    print(f"\n{machine()}\n")
    print(table(["esol predict --full-size --fast", "minutes", "highest memory, MiB"], rows))
    headings = [f"{args.side} x {args.side}", "windows and whole agree, %", "not background, %"]
    print(f"\n{table(headings, agreement(args.run, args.side))}")


if __name__ == "__main__":
    main()
