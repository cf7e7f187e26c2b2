"""The main line over several seeds: seeds' mIoU after each stage, and the time that it took.

    ESOL_WEIGHTS=weights python -m benchmarks.main_line --config configs/voc-animals.yaml --seeds 0 1 2

Runs esol/train.py once per seed (finished stages of an earlier call are kept), then prints the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine, table
from esol.pipeline import config_file

ROOT = Path(__file__).parents[1]
SOURCES = ("cam", "decide", "expand", "shrink")
MAIN_LINE = ("classify", "decide", "expand", "shrink", "localize", "seed_masks")
STAGES = MAIN_LINE[: MAIN_LINE.index("localize") + 1]
COLUMNS = ("miou", "precision", "recall", "threshold", "at_cam_precision", "at_cam_recall", "body_recall")


def run(
    config: str,
    seed: int,
    overrides: list[str],
    launcher: Sequence[str] = (sys.executable,),
    suffix: str = "",
    classify_of: str = "",
) -> dict[str, dict[str, Any]]:
    """results.json of one seed; classify_of: the suffix of the run whose classify it goes on from, if another's."""
    folder = folder_of(config, seed, overrides, suffix)
    if classify_of not in ("", suffix) and not (folder / "classify").exists():
        shutil.copytree(folder_of(config, seed, overrides, classify_of) / "classify", folder / "classify")
    options = [part for text in of_seed(config, seed, overrides, suffix) for part in ("--set", text)]
    subprocess.run([*launcher, str(ROOT / "esol/train.py"), "--config", config, "--resume", *options], check=True)
    return json.loads((folder / "results.json").read_text())


def accelerate(processes: int) -> list[str]:
    """The launcher of so many processes on this machine."""
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", str(processes)]
    return [*command, "--config_file", str(ROOT / "launch/cpu.yaml")]


def folder_of(config: str, seed: int, overrides: list[str], suffix: str = "") -> Path:
    """The run directory of one seed."""
    return Path(config_file.load(config, of_seed(config, seed, overrides, suffix)).run_dir)


def of_seed(config: str, seed: int, overrides: list[str], suffix: str = "") -> list[str]:
    """The overrides with which one seed runs, in a run directory of its own; {seed} in them becomes its number."""
    overrides = [text.replace("{seed}", str(seed)) for text in overrides]
    run_dir = f"{config_file.load(config, overrides).run_dir}{suffix}-seed{seed}"
    return [*overrides, f"seed={seed}", f"run_dir={run_dir}"]


def arguments(about: str | None) -> argparse.ArgumentParser:
    """Those of every benchmark that runs a config over seeds."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=VALUE")
    return parser


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def main() -> None:
    args = arguments(__doc__).parse_args()
    overrides = [*args.overrides, f"stages=[{', '.join(STAGES)}]"]
    results = {seed: run(args.config, seed, overrides) for seed in args.seeds}

    print(f"\n{machine()}\n{args.config} {' '.join(args.overrides)}\n")
    seeds = [r["localize"] for r in results.values()]
    columns = [name for name in COLUMNS if f"cam_{name}" in seeds[0]]
    rows: list[list[object]] = []
    for seed, own in results.items():
        for source in SOURCES:
            if f"{source}_miou" in own["localize"]:
                rows.append([source, seed, *(own["localize"][f"{source}_{name}"] for name in columns)])
    for source in SOURCES:
        if f"{source}_miou" in seeds[0]:
            rows.append([source, "mean ± sd", *(spread([s[f"{source}_{name}"] for s in seeds]) for name in columns)])
    for before, source in itertools.pairwise(source for source in SOURCES if f"{source}_miou" in seeds[0]):
        gains = [spread([s[f"{source}_{name}"] - s[f"{before}_{name}"] for s in seeds]) for name in columns]
        rows.append([f"{source} - {before}", "mean ± sd", *gains])
    print(table(("seeds of", "seed", *columns), rows))
    times = [[seed, *(own[s]["seconds"] if s in own else 0.0 for s in STAGES)] for seed, own in results.items()]
    print("\n" + table(("seed", *(f"{s}, s" for s in STAGES), "all, min"), [[*t, sum(t[1:]) / 60] for t in times]))


if __name__ == "__main__":
    main()
