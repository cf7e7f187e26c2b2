"""Whether two runs logged the same losses, digit by digit.

python -m benchmarks.loss_curve runs/before runs/after
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def curve(run_dir: str) -> dict[tuple[str, int], dict[str, float]]:
    """Loss values by (stage, step); a step that was logged twice, after a resume, counts as the later."""
    found = {}
    for line in Path(run_dir, "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "metrics" in record and "loss" in record["metrics"]:
            found[record["stage"], record["step"]] = {k: record["metrics"][k] for k in ("loss", "lr", "grad_norm")}
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
    return 0 if before else 1


if __name__ == "__main__":
    sys.exit(main())
