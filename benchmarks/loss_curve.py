"""Whether two runs logged the same losses, digit by digit, and wrote the same files.

python -m benchmarks.loss_curve runs/before runs/after
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

AROUND = {"curves.json", "confusion.json"}  # scores beside the result, of which later versions say more


def curve(run_dir: str) -> dict[tuple[str, int], dict[str, float]]:
    """Loss values by (stage, step); a step that was logged twice, after a resume, counts as the later."""
    found = {}
    for line in Path(run_dir, "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "metrics" in record and "loss" in record["metrics"]:
            found[record["stage"], record["step"]] = {k: record["metrics"][k] for k in ("loss", "lr", "grad_norm")}
    return found


def written(run_dir: str) -> dict[str, str]:
    """Hash of every file that a finished stage wrote, by its manifest, of whatever version of esol."""
    found = {}
    for manifest in sorted(Path(run_dir).glob("*/manifest.json")):
        outputs = json.loads(manifest.read_text())["outputs"]
        found |= {
            f"{manifest.parent.name}/{name}": own["sha256"] for name, own in outputs.items() if name not in AROUND
        }
    return found


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    before, after = curve(sys.argv[1]), curve(sys.argv[2])
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            print(f"differs at {key[0]} step {key[1]}: {before.get(key)} -> {after.get(key)}")
            return 1
    print(f"identical at all {len(before)} logged steps")
    old, new = written(sys.argv[1]), written(sys.argv[2])
    both = old.keys() & new.keys()
    other = sorted(name for name in both if old[name] != new[name])
    print(
        f"{len(both) - len(other)} of {len(both)} files that both wrote are identical{': not ' if other else ''}",
        end="",
    )
    print(", ".join(other))
    return 0 if before and not other else 1


if __name__ == "__main__":
    sys.exit(main())
