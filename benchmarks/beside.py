"""How much of a stage's speed is left beside other work on the same cores, by how its threads wait for each other.

python -m benchmarks.beside RUN [--rounds 3]

RUN: a finished run of configs/demo.yaml, from where that was started. classify trains for 150 steps in a new run
directory, psa_labels is made again in a copy of RUN. Each alone, beside a process that never rests, and beside another
of its kind; threads that wait as esol's commands have it, and as OpenMP has it by itself (it spins). A round has every
case once, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import machine, table

STEPS = 150
SPINS = "300000"  # what GNU's OpenMP does where nobody says anything
CASES = ("alone", "beside a busy process", "beside another of its kind")


def start(run: Path, place: Path, stage: str, spins: bool) -> tuple[subprocess.Popen[bytes], Path]:
    """A stage in a process of its own, in a new run directory."""
    if stage == "classify":
        more = ["--set", f"classify.duration={STEPS} steps"]
        place.mkdir()
    else:
        shutil.copytree(run, place)
        shutil.rmtree(place / stage)
        more = []
    config = ["--config", str(run / "resolved.yaml"), "--set", f"run_dir={place}", "--set", "tracking.uri=none"]
    command = [
        sys.executable,
        "-m",
        "esol.cli",
        "run",
        *config,
        "--set",
        "tracking.page=0",
        "--stages",
        stage,
        *more,
    ]
    env = os.environ | ({"GOMP_SPINCOUNT": SPINS} if spins else {})
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), place


def speed(run: Path, stage: str, case: str, spins: bool) -> float:
    """Images a second while training, or stages a minute."""
    with tempfile.TemporaryDirectory() as folder:
        count = 2 if case == CASES[2] else 1
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"])] if case == CASES[1] else []
        try:
            started = [start(run, Path(folder, str(i)), stage, spins) for i in range(count)]
            for process, place in started:
                if process.wait():
                    sys.exit(f"{stage} in {place} ended with {process.returncode}")
            found = [json.loads((place / "results.json").read_text())[stage] for _, place in started]
        finally:
            for process in busy:
                process.kill()
                process.wait()
    each = [one["images_per_second"] if stage == "classify" else 60 / one["seconds"] for one in found]
    return statistics.mean(each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found: dict[tuple[str, bool, str], list[float]] = {}
    for _ in range(args.rounds):
        for stage in ("classify", "psa_labels"):
            for case in CASES:
                for spins in (False, True):
                    found.setdefault((stage, spins, case), []).append(speed(args.run, stage, case, spins))
    rows = []
    for stage, unit in (("classify", "images/s"), ("psa_labels", "runs/minute")):
        for spins in (True, False):
            alone = statistics.median(found[stage, spins, CASES[0]])
            shares = [100 * statistics.median(found[stage, spins, case]) / alone for case in CASES[1:]]
            rows.append([f"{stage}, {'threads spin' if spins else 'as esol has it'}", f"{alone:.3g} {unit}", *shares])
    print(f"{machine()}, {args.rounds} rounds, medians\n")
    print(table(["stage", CASES[0], *(f"{case}, % of alone" for case in CASES[1:])], rows))


if __name__ == "__main__":
    main()
