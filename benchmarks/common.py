"""What every benchmark prints above its table: where and with what it was measured."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

CLASSES = 20  # of a network whose photos have none of their own: as many as VOC has


def machine() -> str:
    """One line: date, processor, cores, device, versions."""
    import torch

    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "numpy", "webdataset"))
    cores = len(os.sched_getaffinity(0))
    return f"{time.strftime('%Y-%m-%d')}, {cores} cores of {cpu}{gpu}, Python {platform.python_version()}, {packages}"


def once(work: Callable[[], object]) -> float:
    """Seconds that a call takes, until the GPU has nothing left to do, if there is one."""
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def wait() -> None:
    """Until the GPU has nothing left to do."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs every case once per round, in turn, so that a machine whose speed drifts treats all alike."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            found[name].append(case())
    return found


def ratio(found: dict[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of name / base."""
    return statistics.median(a / b for a, b in zip(found[name], found[base], strict=True))


def ratios(before: list[float], now: list[float]) -> tuple[float, float, float]:
    """Median, least and most of before / now, round by round."""
    each = [a / b for a, b in zip(before, now, strict=True)]
    return statistics.median(each), min(each), max(each)


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats with four digits."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for row in rows:
        lines.append("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in row) + " |")
    return "\n".join(lines)
