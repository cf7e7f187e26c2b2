"""`esol auto` as a newcomer calls it, on photos in folders by class: how long until the first maps and until the end.

ESOL_WEIGHTS=weights python -m benchmarks.auto --data DATA --out /tmp/auto

DATA holds voc-animals (in VOC's layout) and magnetic-tiles (images/CLASS, masks/CLASS). The animals are those of
benchmarks.transfer's sets, each in the folder of its first class; nothing but PHOTOS and --out is given. docs/cost.md
has the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import machine, table
from benchmarks.transfer_sets import SETS
from esol.pipeline import records
from esol.report.page.page import PAGE
from esol.report.tables import best_masks, stage_rows

TILES = "magnetic-tiles"


def photos(name: str, data: Path, out: Path) -> Path:
    """A set's folder of photos."""
    if name == TILES:
        return data / name
    source = SETS[name].source(data, out / f"{name}-lists")
    root = out / f"{name}-photos"
    for key in source.splits["train"]:
        sample = source.read(key)
        folder = root / json.loads(sample["json"])["labels"][0]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{key}.jpg").write_bytes(sample["jpg"])
    return root


def timed(place: Path, run: Path) -> dict[str, float]:
    """Minutes until the page has its first pictures, and until the end; the highest memory; what it left on disk."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "esol.cli", "auto", str(place), "--out", str(run)])
    first, ended = 0.0, 0
    while not ended:
        if not first and (run / PAGE).exists():
            first = time.monotonic() - began
        time.sleep(0.2)
        ended, status, used = os.wait4(process.pid, os.WNOHANG)
    if status:
        sys.exit(f"esol auto {place} ended with {os.waitstatus_to_exitcode(status)}")
    found = {"first maps on the page, minutes": first / 60, "all, minutes": (time.monotonic() - began) / 60}
    disk = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    return found | {"highest memory, MB": used.ru_maxrss / 1e3, "run directory with shards, MB": disk / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--sets", nargs="+", default=["animals-60", "animals-400", TILES])
    args = parser.parse_args()
    columns: dict[str, dict[str, object]] = {}
    for name in args.sets:
        run = args.out / name
        took = timed(photos(name, args.data, args.out), run)
        found = records.finished(run)
        column: dict[str, object] = {row.name: round(row.seconds) for row in stage_rows(found)} | took
        scores = found[best_masks(found)].last_scores
        column |= {"report.html, MB": (run / PAGE).stat().st_size / 1e6, "the judge takes": best_masks(found)}
        columns[name] = column | {"mIoU of that": scores.miou if scores else "no masks to compare with"}
    rows = list(dict.fromkeys(key for column in columns.values() for key in column))
    print(f"\n{machine()}\n")
    print(table(["seconds", *columns], [[row, *(column.get(row, "") for column in columns.values())] for row in rows]))


if __name__ == "__main__":
    main()
