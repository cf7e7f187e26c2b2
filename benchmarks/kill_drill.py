"""kill -9 at random moments of a small run, resumed each time: are the final weights those of the unbroken run?

    python -m benchmarks.kill_drill --data data/demo --kills 10

All four stages on the synthetic set. Each kill hits all processes of the run at a moment drawn uniformly between a
second after the start and the length of the unbroken run; the next start has --resume.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil  # accelerate brings it

from benchmarks.common import machine, table
from esol.base.files import sha256

ROOT = Path(__file__).parents[1]
SMALL = (
    "data.score_split=val", "data.long_side=[64,96]", "data.crop=64", "data.workers=1", "model.kernel_channels=32",
    "classify.duration=60 steps", "expand.duration=40 steps", "shrink.duration=40 steps", "checkpoint.every=5",
    "checkpoint.keep=2", "engine.threads=1", "tracking.uri=none", "tracking.pictures=2",
)  # fmt: skip
FILES = ("classify/model.safetensors", "expand/model.safetensors", "shrink/model.safetensors", "localize/index.json")


def start(data: str, run_dir: Path, processes: int) -> subprocess.Popen[bytes]:
    overrides = [part for text in (*SMALL, f"data.root={data}", f"run_dir={run_dir}") for part in ("--set", text)]
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        *launcher,
        str(ROOT / "esol/train.py"),
        "--config",
        str(ROOT / "configs/demo.yaml"),
        "--resume",
        *overrides,
    ]
    log = open(run_dir.with_suffix(".log"), "ab")  # noqa: SIM115  the process writes to it
    return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)


def progress(run_dir: Path) -> str:
    """How far a run came: the stages that are done, and the newest checkpoint of the next one."""
    done = list(json.loads((run_dir / "results.json").read_text())) if (run_dir / "results.json").exists() else []
    newest = [p.read_text().strip() for p in run_dir.glob("*/checkpoints/latest")]
    shards = len(list(run_dir.glob("localize/*.counts.npz")))
    return ", ".join([*done, *newest, *([f"{shards} shards localized"] if shards else [])]) or "nothing saved"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a synthetic shard set")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-drill-"))
    unbroken, killed = folder / "unbroken", folder / "killed"

    begun = time.monotonic()
    if start(args.data, unbroken, args.processes).wait(1800):
        print(f"the unbroken run failed: {unbroken.with_suffix('.log')}")
        return 1
    length = time.monotonic() - begun
    rows: list[list[object]] = []
    kills = 0
    while True:
        process = start(args.data, killed, args.processes)
        moment = rng.uniform(1, length) if kills < args.kills else 1800.0
        try:
            code = process.wait(moment)
        except subprocess.TimeoutExpired:
            # torchrun gives its workers process groups of their own
            for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
                victim.kill()
            process.wait()
            kills += 1
            rows.append([kills, moment, progress(killed)])
            continue
        if code:
            print(f"a resumed run failed with {code}: {killed.with_suffix('.log')}")
            return 1
        if kills >= args.kills:
            break
        shutil.rmtree(killed)  # done before all kills: from the start again
    same = {name: sha256(unbroken / name) == sha256(killed / name) for name in FILES}
    print(f"{machine()}; {args.processes} process(es), unbroken run {length:.0f} s, moments' seed {args.seed}\n")
    print(table(("kill", "after, s", "on disk then"), rows))
    print(
        "\n"
        + table(("file", "bit-identical to the unbroken run"), [[n, "yes" if s else "NO"] for n, s in same.items()])
    )
    shutil.rmtree(folder)
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
