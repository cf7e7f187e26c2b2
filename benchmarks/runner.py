"""Ours against what else there is: each row the same work two ways, turn by turn in one process, on the same inputs.

    python -m benchmarks [ROW ...] --data PHOTOS --rounds 3

PHOTOS: a folder of JPEGs. Prints for every row the median seconds of a step, photo or call, how many times as long the
other takes (the median of the rounds, then the lowest and the highest), and the largest difference of what both gave,
where they compute the same. Then, as the row `stages`, what stages make of the machine. All networks are random; on a
GPU the rows sampler, step, cam and stages run there. Against a commit of this project: python -m benchmarks.before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import data, irn, random_walk, sampler, stages, thresholds
from benchmarks.common import machine, table
from benchmarks.rows import HEADINGS, Comparison, NotRun, Photos, Row, measure


def crf(photos: Photos) -> Iterator[Comparison]:
    """The row that needs an optional package."""
    if find_spec("pydensecrf") is None:
        raise NotRun("pydensecrf2 is missing: pip install 'esol[crf-oracle]', which needs a compiler")
    from benchmarks import dense_crf

    return dense_crf.compared(photos)


ROWS = {
    "sampler": Row(
        "the sampler, forward and backward to the offsets", "torchvision.ops.deform_conv2d", sampler.compared
    ),
    "walk": Row("the random walk, a polynomial of sparse steps", "the dense matrix squared", random_walk.compared),
    "crf": Row("the dense CRF, lattices included", "pydensecrf2", crf),
    "reading": Row(
        "shards through the training stream, one worker",
        "a folder of JPEGs, PIL, DataLoader, one worker",
        data.compared,
    ),
    "step": Row(
        "classify's step through the engine", "the step as in IRN: float32, NCHW, frozen batch norm", irn.compared_steps
    ),
    "cam": Row(
        "localize's maps of a photo, made and packed",
        "as in IRN: a photo at a time, float32, NCHW, every class enlarged at every scale, np.save",
        irn.compared_maps,
    ),
    "thresholds": Row(
        "mIoU at 100 thresholds in one pass", "argmax and a confusion matrix for each threshold", thresholds.compared
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*ROWS, "stages"]
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(known)}; all where none is named")
    parser.add_argument("--data", required=True, type=Path, help="a folder of JPEGs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photos", type=int, default=32, help="of the folder, the first by name (default 32)")
    parser.add_argument("--long-side", type=int, default=500, help="pixels that they are scaled to (default 500)")
    args = parser.parse_args(arguments)
    names = args.rows or known
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no row {', '.join(unknown)}: the rows are {', '.join(known)}")
    print(f"{machine()}, {torch.get_num_threads()} threads, {args.rounds} rounds\n", flush=True)
    with tempfile.TemporaryDirectory() as place:
        photos = Photos(args.data, args.photos, args.long_side, Path(place, "photos"))
        chosen = {name: row for name, row in ROWS.items() if name in names}
        found: list[list[object]] = []
        if chosen:
            print(table(("row", "ours", "other"), [(name, row.ours, row.other) for name, row in chosen.items()]) + "\n")
            for name, row in chosen.items():
                print(f"measures {name}", file=sys.stderr, flush=True)
                found += measure(name, row, photos, args.rounds)
            print(table(HEADINGS, found) + "\n", flush=True)
        apart = any(str(cell).startswith("**") for line in found for cell in line)
        if "stages" in names:
            side, gibibytes = (8192, 4.0) if torch.cuda.is_available() else (4096, 1.0)
            most = stages.ceilings(side, gibibytes)
            print(stages.said(most, side, gibibytes))
            print(table(stages.HEADINGS, list(stages.lines(photos, args.rounds, most))))
    if apart:
        sys.exit("the two ways of a row differ by more than is allowed: see the table")
