"""How much of a mask the exported polygons keep, as COCO's own library draws them.

python -m benchmarks.polygons RUN [RUN ...]

Every connected part of more than 400 pixels in the masks that the judge takes: the polygon of `esol export-masks --to
yolo` (one ring, a hole reached by a cut), drawn by pycocotools, against the part itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

from benchmarks.common import machine, table
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.samples import decode_mask
from esol.ops.shapes import raster, shapes, simpler
from esol.pipeline import records
from esol.report.tables import best_masks

LARGE = 400  # pixels


def kept(run_dir: Path) -> list[tuple[float, int, int]]:
    """IoU, corners of the polygon and of the exact outline, of every large part."""
    reader = ShardReader(Index.load(run_dir / best_masks(records.finished(run_dir))))
    found = []
    for ordinal in range(len(reader.index)):
        mask = decode_mask(reader.read(ordinal, "mask.png"), reader.name(ordinal))
        for number in [n for n in np.unique(mask).tolist() if 0 < n < 255]:
            for exact in (shape for shape in shapes(mask == number) if shape.area > LARGE):
                ring = simpler(exact, mask.shape).one_ring()
                drawn = coco.decode(coco.merge(coco.frPyObjects([ring.ravel().tolist()], *mask.shape))).astype(bool)
                part = raster([exact], mask.shape)
                corners = len(exact.outer) + sum(map(len, exact.holes))
                found.append(((drawn & part).sum() / (drawn | part).sum(), len(ring), corners))
    return found


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    rows = []
    for place in map(Path, sys.argv[1:]):
        iou, ring, exact = np.array(kept(place)).T
        below = 100 * float((iou < 0.98).mean())
        rows.append([place.name, len(iou), float(iou.min()), float(np.median(iou)), below, ring.sum() / exact.sum()])
    print(f"{machine()}\n")
    print(table(["run", "parts", "lowest IoU", "median", "below .98, %", "corners, of the exact outline's"], rows))


if __name__ == "__main__":
    main()
