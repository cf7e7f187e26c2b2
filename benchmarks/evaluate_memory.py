"""Memory of streamed evaluation on 100 and on 2,000 photos: one process, its resident memory while it predicts.

    ESOL_WEIGHTS=weights python -m benchmarks.evaluate_memory --config configs/voc-animals.yaml

Makes two shard sets out of the config's (links, and an index with a split of that many photos), trains DeepLab for one
step on true masks, then runs evaluate on each as users do and reads the process's memory ten times a second.

A label map of these photos is 75 KiB: what kept them would grow by as much a photo. On a CPU oneDNN keeps up to 1,024
compiled kernels, some for each new photo size; ONEDNN_PRIMITIVE_CACHE_CAPACITY=16 in front of the command shows what
is left without them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import machine, table
from benchmarks.main_line import ROOT
from esol.data.index import Index, scan_shard, write_index
from esol.pipeline import config_file

SIZES = (100, 2000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=VALUE")
    args = parser.parse_args()
    index = Index.load(config_file.load(args.config, args.overrides).data.root)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for photos in SIZES:
            data = _subset(index, Path(name, f"data-{photos}"), photos)
            options = [f"data.root={data}", f"run_dir={name}/run-{photos}", "data.eval_split=some", "tracking.uri=none"]
            options += ["data.mask_split=some", "stages=[segment, evaluate]", "segment.masks=truth"]
            options += ["segment.duration=1 steps", "tracking.pictures=0", *args.overrides]
            command = [sys.executable, str(ROOT / "esol/train.py"), "--config", args.config]
            command += [part for text in options for part in ("--set", text)]
            subprocess.run([*command, "--stages", "segment"], check=True, stdout=subprocess.DEVNULL)
            seconds, memory = _watch([*command, "--stages", "evaluate"])
            results = json.loads(Path(name, f"run-{photos}", "results.json").read_text())["evaluate"]
            half = memory[len(memory) // 10 :]  # without the start
            first, last = np.median(half[: len(half) // 4]), np.median(half[-len(half) // 4 :])
            late = memory[len(memory) // 2 :]
            growth = 1024 * float(np.polyfit(np.linspace(photos / 2, photos, len(late)), late, 1)[0])
            rows.append(
                [photos, f"{results['plain_miou']:.2f}", seconds, max(memory), float(first), float(last), growth]
            )
    cache = os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024, the default")
    print(f"{machine()}\n{args.config} {' '.join(args.overrides)}, oneDNN's cache: {cache}\n")
    headings = (
        "photos",
        "mIoU after 1 step",
        "seconds",
        "peak, MiB",
        "median of the first quarter",
        "of the last quarter",
        "growth over the second half, KiB a photo",
    )
    print(table(headings, rows))
    print(f"\npeak at {SIZES[1]} photos over that at {SIZES[0]}: {rows[1][3] / rows[0][3]:.3f}")


def _subset(index: Index, folder: Path, photos: int) -> Path:
    """The set with a split `some` of so many photos that have a mask."""
    folder.mkdir()
    for shard in index.shards:
        (folder / shard.name).symlink_to(Path(index.root, shard.name).resolve())
    masked = np.flatnonzero(index.members["mask.png"][:, 0] >= 0)
    chosen = masked[np.linspace(0, len(masked) - 1, photos).astype(int)]
    write_index(folder, index.classes, {"some": np.unique(chosen)}, [scan_shard(folder, s.name) for s in index.shards])
    return folder


def _watch(command: list[str]) -> tuple[float, list[float]]:
    """Seconds, and the resident memory in MiB from the first photo on."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    memory = []
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        if match := re.search(r"VmRSS:\s+(\d+)", status):
            memory.append(int(match[1]) / 1024)
        time.sleep(0.1)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return time.perf_counter() - began, memory


if __name__ == "__main__":
    main()
