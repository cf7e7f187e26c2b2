"""DeepLab from the masks of a run, with each way of segment.noise to disbelieve some of them, on photos new to it.

    ESOL_WEIGHTS=weights python -m research.wrong_masks RUN ... --photos SHARDS --split train_aug --count 600

Each run has its masks; its segment stage is trained anew for every row of the table, in a folder beside the run
(RUN-NAME; what is there is kept). The photos are spread over the split of SHARDS, but for those that DeepLab learns
from, and those that show a class which the run does not know. mIoU with background, one scale, no CRF.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.common import machine, table
from benchmarks.main_line import ROOT
from esol.base.palette import VOID
from esol.base.progress import progress
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.samples import decode_mask
from esol.data.transforms import decode
from esol.deploy.model import Model
from esol.ops.metrics import confusion_matrix, score
from esol.pipeline import config_file

ROWS = {
    "all of them": {"doubt": "off"},
    "filter .2": {"doubt": "off", "filter": 0.2},
    "doubt ignore": {"doubt": "ignore"},
    "doubt correct": {"doubt": "correct"},
    "filter .2, doubt correct": {"doubt": "correct", "filter": 0.2},
}  # of segment.noise


def learned(run: Path, row: str, overrides: list[str]) -> Path:
    """The run directory in which DeepLab has learned with the settings of a row."""
    folder = run.with_name(f"{run.name}-{row.replace(', ', '-').replace(' ', '-')}")
    if not folder.exists():
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("segment", "evaluate", "features", "pictures"))
    config = config_file.load(run / "resolved.yaml")
    stages = [stage for stage in config.stages if stage != "evaluate"]
    settings = [f"run_dir={folder}", f"stages=[{', '.join(dict.fromkeys([*stages, 'segment']))}]", "tracking.page=0"]
    settings += [f"segment.noise.{name}={value}" for name, value in ROWS[row].items()]
    options = [part for text in (*settings, *overrides) for part in ("--set", text)]
    command = [sys.executable, str(ROOT / "esol/train.py"), "--config", str(run / "resolved.yaml"), "--resume"]
    subprocess.run([*command, *options, "--stages", "segment"], check=True)
    return folder


def new_photos(run: Path, index: Index, split: str, count: int) -> list[int]:
    """Ordinals of photos of the split that DeepLab does not learn from, and that show none but the run's classes."""
    data = config_file.load(run / "resolved.yaml").data
    own = Index.load(data.root)
    taught, known = {str(key) for key in own.keys[own.split(data.mask_split)]}, np.isin(index.classes, own.classes)
    assert index.labels is not None
    strange = index.labels[:, ~known].any(1)
    found = [
        ordinal for ordinal in index.split(split) if str(index.keys[ordinal]) not in taught and not strange[ordinal]
    ]
    return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).astype(int))]


def miou(folder: Path, index: Index, ordinals: list[int]) -> float:
    """Of the masks that `esol predict --fast` would give: one scale, no CRF."""
    model, reader = Model(folder, fast=True), ShardReader(index)
    names = model.info.classes
    number = np.zeros(256, np.uint8)  # of a class of SHARDS, in the run
    number[VOID] = VOID
    for i, name in enumerate(index.classes, 1):
        number[i] = names.index(name) + 1 if name in names else 0
    counts = np.zeros((len(names) + 1, len(names) + 1), np.int64)
    with progress(_name(folder), len(ordinals), "photos", True) as advance:
        for done, ordinal in enumerate(ordinals, 1):
            name = reader.name(ordinal)
            image, truth = decode(reader.image(ordinal), name), decode_mask(reader.read(ordinal, "mask.png"), name)
            [(mask, _)] = model.label_maps([model.reduced(image)], [truth.shape])
            counts += confusion_matrix(number[truth], mask, len(names) + 1)
            advance(done, "")
    return 100 * float(score(counts).miou)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--photos", required=True, metavar="SHARDS")
    parser.add_argument("--split", required=True)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=VALUE")
    args = parser.parse_args()
    index = Index.load(args.photos)
    photos = {run: new_photos(run, index, args.split, args.count) for run in args.runs}
    found = [
        [row, *(miou(learned(run, row, args.overrides), index, photos[run]) for run in args.runs)] for row in args.rows
    ]
    print(f"\n{machine()}\n{' '.join(args.overrides)}\n")
    headings = [f"{_name(run)}, {len(photos[run])} photos" for run in args.runs]
    print("\n" + table(("pixels that DeepLab believes", *headings), found))


def _name(run: Path) -> str:
    return "/".join(run.parts[-2:])


if __name__ == "__main__":
    main()
