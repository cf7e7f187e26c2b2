"""IRNet's training step on a CPU with the memory that glibc keeps by itself, and with what esol lets it keep.

    python -m benchmarks.memory

Each way is a process of its own, since the setting holds for a whole process; they run in turns.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time

from benchmarks.common import machine, ratio, table

ROUNDS, STEPS = 3, 4
WAYS = ("glibc's own", "kept")


def steps(keep: bool) -> None:
    """Prints the seconds of a step, the pages that the kernel handed out during it, and the highest memory in MiB."""
    from esol.base.machine import keep_memory

    if keep:
        keep_memory()
    import torch

    from esol.config import BackboneConfig
    from esol.models.backbones import build_backbone
    from esol.models.irn_net import IrnNet
    from esol.stages.irn import IrnConfig, IrnTask

    torch.set_num_threads(1)
    backbone = build_backbone(BackboneConfig("timm:tf_efficientnet_lite0", "none", output_stride=16, freeze="all"))
    task = IrnTask(IrnNet(backbone), IrnConfig()).train()
    image = torch.randint(0, 256, (16, 3, 256, 256), dtype=torch.uint8)
    target = torch.randint(0, 3, (16, 1, 8, 8)).repeat_interleave(32, 2).repeat_interleave(32, 3)[:, 0]
    batch = {"image": image, "labels": torch.zeros(16, 2), "key": [""] * 16, "target": target.to(torch.uint8)}
    seconds, faults = [], []
    for _ in range(1 + STEPS):
        begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with torch.autocast("cpu", torch.bfloat16):
            losses, _ = task(batch)
        losses["loss"].backward()
        seconds.append(time.perf_counter() - begun)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(statistics.median(seconds[1:]), statistics.median(faults[1:]), peak)


def main() -> None:
    if len(sys.argv) > 1:
        steps(sys.argv[1] == WAYS[1])
        return
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.memory", way]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[way].append([float(number) for number in printed.split()])
    rows = [[way, *(statistics.median(numbers) for numbers in zip(*own, strict=True))] for way, own in found.items()]
    seconds = {way: [own[0] for own in each] for way, each in found.items()}
    headings = ("memory", "seconds a step", "pages from the kernel a step", "peak memory, MiB")
    print(f"{machine()}, one thread\n\n{table(headings, rows)}\n\nratio of seconds {ratio(seconds, *WAYS):.2f}")


if __name__ == "__main__":
    main()
