"""Every stage of a run against an earlier commit of this project: seconds, and how many times as fast it is now.

    ESOL_WEIGHTS=weights python -m benchmarks.before d0b8159 --data data/voc-animals-60 --split train --rounds 3

Both run the commit's own config, with fewer steps and with what was a fixed number then, on the same photos, each in
processes of its own, in turn. A stage's seconds are those of its results.json, which begin when it is built: imports
and the start of the job are outside. Names joined by + are one row; behind it, "filling" makes the features of crops
anew, which are there otherwise (data.features). `esol predict` is timed whole, by what more photos cost.
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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.common import interleaved, machine, ratios, table
from benchmarks.main_line import ROOT

STEPS = {"classify": 40, "decide": 40, "expand": 20, "shrink": 30, "psa": 30, "irn": 20, "segment": 30}
STAGES = (
    *("classify", "decide", "expand", "shrink", "localize", "seed_masks", "psa_labels", "psa", "psa_masks"),
    *("irn_labels", "irn", "irn_masks", "segment", "evaluate"),
)
HEADS = "decide+expand+shrink"
FIXED = ("psa_masks.steps=256", "irn_masks.steps=256", "irn_masks.alpha=0", "localize.write=shrink")  # what then was so


@contextmanager
def tree(commit: str) -> Iterator[Path]:
    """The files of a commit in a folder of their own, as long as it is entered."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "tree")
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(place), commit], check=True, capture_output=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=True, capture_output=True)


class Side:
    """One of the two: the files at `root`, run in processes of their own, with a run directory that is made once."""

    def __init__(self, root: Path, config: Path, run_dir: Path, overrides: list[str]) -> None:
        self.root, self.run_dir = root, run_dir
        self.command = [sys.executable, str(root / "esol/train.py"), "--config", str(config)]
        for override in [f"run_dir={run_dir}", *overrides]:
            self.command += ["--set", override]
        self.environment = os.environ | {"PYTHONPATH": str(root)}
        self.run(*STAGES)

    def run(self, *stages: str, filling: bool = False) -> float:
        """Seconds of these stages, made anew; filling: the features of crops as well."""
        for folder in (*stages, *(["features"] if filling else [])):
            shutil.rmtree(self.run_dir / folder, ignore_errors=True)
        command = [*self.command, "--stages", ",".join(stages)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=self.root)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        results = json.loads((self.run_dir / "results.json").read_text())
        return sum(float(results[stage]["seconds"]) for stage in stages)

    def predict(self, photos: Path, *options: str) -> float:
        """Seconds a photo of `esol predict`: what all cost more than one alone."""
        one, took = next(photos.iterdir()), []
        for what in (photos, one):
            with tempfile.TemporaryDirectory() as out:
                command = [sys.executable, "-m", "esol.cli", "predict", str(self.run_dir), str(what), "--out", out]
                begun = time.perf_counter()
                subprocess.run([*command, *options], env=self.environment, check=True, capture_output=True)
                took.append(time.perf_counter() - begun)
        return (took[0] - took[1]) / (sum(1 for _ in photos.iterdir()) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--data", required=True, type=Path, help="a shard set")
    parser.add_argument("--split", default="train", help="of it, that all stages use")
    parser.add_argument("--photos", type=Path, help="a folder with some photos, for esol predict")
    parser.add_argument("--config", default="configs/voc-animals.yaml", help="of the commit")
    parser.add_argument("--stages", default=",".join((*STAGES, HEADS, f"{HEADS} filling")))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    stages, weights = args.stages.split(","), Path(os.environ["ESOL_WEIGHTS"]).resolve()
    os.environ["ESOL_WEIGHTS"] = str(weights)
    overrides = [f"data.root={args.data.resolve()}", "tracking.uri=none", "tracking.pictures=0"]
    overrides += [f"data.{key}_split={args.split}" for key in ("train", "mask", "score", "eval")]
    overrides += [f"{name}.duration={count} steps" for name, count in STEPS.items()]
    with tree(args.commit) as before, tempfile.TemporaryDirectory() as runs:
        config = before / args.config
        now = ["tracking.page=0", "data.features=4", f"stages=[{','.join(STAGES)}]", *FIXED]
        sides = {
            "before": Side(before, config, Path(runs, "before"), overrides),
            "now": Side(ROOT, config, Path(runs, "now"), [*overrides, *now]),
        }
        found: dict[str, dict[str, list[float]]] = {}
        for stage in stages:
            names, _, filling = stage.partition(" ")
            cases = {name: partial(side.run, *names.split("+"), filling=bool(filling)) for name, side in sides.items()}
            found[stage] = interleaved(cases, args.rounds)
            print(stage, found[stage], file=sys.stderr, flush=True)
        for options in ((), ("--fast",)) if args.photos else ():
            cases = {
                name: lambda side=side, options=options: side.predict(args.photos, *options)
                for name, side in sides.items()
            }
            found[" ".join(("predict, a photo", *options))] = interleaved(cases, args.rounds)
    rows = [
        [what, *(statistics.median(own[name]) for name in sides), *ratios(own["before"], own["now"])]
        for what, own in found.items()
    ]
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    print(f"\n{machine()}\n{args.config} of {args.commit}; now {commit.stdout.strip()}; {args.rounds} rounds\n")
    print(table(("stage", f"{args.commit}, s", "now, s", "times as fast", "least", "most"), rows))


if __name__ == "__main__":
    main()
