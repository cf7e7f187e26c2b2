"""The random walk against IRN's dense squared matrix: error, time, memory, growth with the image. One core.

python -m benchmarks.random_walk [--dense-squarings 8]   prints Markdown tables; 5 to 10 minutes, 2 GB.
python -m benchmarks.random_walk --gpu-alone             the walk on a GPU, which the first prints too if there is one
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import esol.ops.random_walk as walk_module
from benchmarks.common import interleaved, machine, once, table
from benchmarks.rows import Comparison, Photos, relative
from esol.ops.pairs import boundary_affinity, pair_offsets, pair_windows
from esol.ops.random_walk import random_walk

RADIUS, BETA, SQUARINGS, CLASSES = 5, 10, 8, 2
VOC_GRID = (94, 125)  # a quarter of 375 x 500


def scene(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Made-up maps (1, 2, h, w), one blob each, and affinity of closed edges around regions some 12 pixels wide."""
    generator = torch.Generator().manual_seed(0)
    field = torch.rand(1, 1, max(height // 12, 2), max(width // 12, 2), generator=generator)
    level = F.interpolate(field, (height, width), mode="bicubic", align_corners=True)[0]
    edge = 0.9 * (1 - 8 * (level - 0.5).abs()).clamp(0, 1) + 0.02 * torch.rand(1, height, width, generator=generator)
    y, x = torch.arange(height).view(-1, 1) / height, torch.arange(width) / width
    maps = [torch.exp(-30 * ((y - b) ** 2 + (x - a) ** 2)) for b, a in ((0.3, 0.4), (0.7, 0.6))]
    return torch.stack(maps)[None], boundary_affinity(edge, RADIUS)


def links(affinity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every pair of the image both ways, and every pixel with itself: row, column, affinity."""
    height, width = affinity.shape[2:]
    place = torch.arange(height * width).view(height, width)
    found = [(place.flatten(), place.flatten(), affinity.new_ones(height * width))]
    for k, offset in enumerate(pair_offsets(RADIUS)):
        first, second = pair_windows(offset, height, width)
        i, j, value = place[first].flatten(), place[second].flatten(), affinity[0, k][first].flatten()
        found += [(i, j, value), (j, i, value)]
    row, column, value = (torch.cat(parts) for parts in zip(*found, strict=True))
    return row, column, value


def dense_walk(maps: Tensor, affinity: Tensor, squarings: int) -> tuple[Tensor, float]:
    """The reference in float32, and the seconds of its squarings alone."""
    size = maps[0, 0].numel()
    row, column, value = links(affinity)
    dense = torch.zeros(size, size)
    dense[row, column] = value
    transition, spare = dense.pow_(BETA), torch.empty_like(dense)
    transition /= transition.sum(0, keepdim=True)
    start = time.perf_counter()
    for _ in range(squarings):
        torch.matmul(transition, transition, out=spare)
        transition, spare = spare, transition
    took = time.perf_counter() - start
    return (maps.view(-1, size) @ transition).view(maps.shape), took


def exact_walk(maps: Tensor, affinity: Tensor) -> Tensor:
    """Every step by itself, in float64."""
    size = maps[0, 0].numel()
    row, column, value = links(affinity)
    weight = value.double() ** BETA
    weight /= weight.new_zeros(size).index_add_(0, column, weight)[column]
    walked = maps.double().view(-1, size)
    for _ in range(2**SQUARINGS):
        walked = torch.zeros_like(walked).index_add_(1, column, walked[:, row] * weight)
    return walked.view(maps.shape)


def against_dense(squarings: int) -> None:
    """Errors, times and memory at the size of a VOC photo."""
    maps, affinity = scene(*VOC_GRID)
    walk = partial(walked, maps, affinity)
    exact, ours = exact_walk(maps, affinity), walk()
    found: dict[str, list[Any]] = {"dense": [], "ours": [once(walk) for _ in range(10)]}
    start = time.perf_counter()
    memory = rise(lambda: found["dense"].extend(dense_walk(maps, affinity, squarings)))
    slow = time.perf_counter() - start
    dense, squaring = found["dense"]
    fast = statistics.median(found["ours"] + [once(walk) for _ in range(10)])
    rows = [["this walk", *errors(ours, exact), fast, "1", f"{extra_memory(*VOC_GRID):.1f}"]]
    if squarings == SQUARINGS:
        how = "every squaring measured"
        rows.append(["dense", *errors(dense, exact), slow, f"{slow / fast:.0f}", memory])
        rows.append(["this walk against dense", *errors(ours, dense), "", "", ""])
    else:
        how = f"{squarings} of {SQUARINGS} squarings measured, the others extrapolated"
        slow += squaring * (SQUARINGS / squarings - 1)
        rows.append(["dense", "not run", "not run", slow, f"{slow / fast:.0f}", memory])
    print(f"{VOC_GRID[0]} x {VOC_GRID[1]}, radius {RADIUS}, beta {BETA}, 256 steps, {CLASSES} classes; dense: {how}.")
    print("Errors against 256 single steps in float64: largest / largest value, mean / mean value. Memory: how far the")
    print("highest resident memory of the process (this walk: a fresh one) rises above that before, to 0.5 MiB.\n")
    print(table(["float32", "largest error", "mean error", "seconds", "times slower", "extra memory, MiB"], rows), "\n")


def errors(got: Tensor, want: Tensor) -> list[float]:
    """Largest difference / largest value, mean difference / mean value."""
    off = (got.double() - want.double()).abs()
    return [float(off.max() / want.abs().max()), float(off.mean() / want.abs().mean())]


def compared(photos: Photos) -> Iterator[Comparison]:
    """The row `walk` of python -m benchmarks: on PSA's grid; main has the larger one of IRN."""
    height, width = -(-photos.side * 3 // 32), -(-photos.side // 8)
    maps, affinity = scene(height, width)
    yield Comparison(
        f"{height} x {width} grid, 256 steps, {CLASSES} classes",
        lambda: dense_walk(maps, affinity, SQUARINGS)[0],
        {"": partial(walked, maps, affinity)},
        relative,
        {"": 2e-4},  # of which the dense float32 matrix has about a half against float64
    )


def growth() -> None:
    """Time and memory by image size, the sizes in turn."""
    sides = (128, 256, 384, 512, 768, 1024, 4096)
    cases = {side: partial(walked, *scene(side // 4, side // 4)) for side in sides}
    found = interleaved({str(side): partial(once, case) for side, case in cases.items()}, rounds=7)
    rows = []
    for side in sides:
        grid, took = side // 4, found[str(side)]
        middle, least = (1e6 * value / grid**2 for value in (statistics.median(took), min(took)))
        memory = f"{extra_memory(grid, grid):.1f}"
        rows.append([side, f"{grid} x {grid}", statistics.median(took), middle, least, memory])
    print(f"By side of a square image (grid: a quarter of it), {CLASSES} classes, 7 rounds; memory as above.\n")
    headings = ["image", "grid", "seconds", "microseconds per grid pixel", "in the fastest round", "extra memory, MiB"]
    print(table(headings, rows))


def on_gpu() -> None:
    """All neighbours at once, as on every GPU, and pair by pair, as on the CPU; both on the GPU, in turn."""
    rows: list[list[object]] = []
    for grid in (VOC_GRID, (256, 256)):
        here = scene(*grid)
        exact, there = exact_walk(*here), [tensor.cuda() for tensor in here]
        cases = {"all at once": partial(waited, *there), "pair by pair": partial(pair_by_pair, *there)}
        off = {name: errors(case(), exact) for name, case in cases.items()}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        waited(*there)
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
        found = interleaved({name: partial(once, case) for name, case in cases.items()}, rounds=15)
        off["one core"] = errors(waited(*here), exact)
        found["one core"] = [once(partial(waited, *here)) for _ in range(5)]
        for name, took in found.items():
            own = f"{memory:.0f}" if name == "all at once" else ""
            rows.append([f"{grid[0]} x {grid[1]}", name, *off[name], 1e3 * statistics.median(took), own])
    print(f"On a GPU, {CLASSES} classes, medians of 15; the last row of each size on the CPU, of 5. Errors as above.\n")
    print(table(["grid", "float32", "largest error", "mean error", "ms", "extra memory, MiB"], rows))


def walked(maps: Tensor, affinity: Tensor) -> Tensor:
    """The walk of one photo, as the scenes have it."""
    return torch.stack(random_walk(list(maps), list(affinity), RADIUS, BETA))


def waited(maps: Tensor, affinity: Tensor) -> Tensor:
    """The walk to its end, on the CPU then."""
    return walked(maps, affinity).cpu()


def pair_by_pair(maps: Tensor, affinity: Tensor) -> Tensor:
    """The same on a GPU as the CPU does it."""
    with patch.object(walk_module, "_all_at_once", walk_module._pair_by_pair):
        return waited(maps, affinity)


def extra_memory(height: int, width: int) -> float:
    """MiB by which a fresh process grows while it walks."""
    # Every block over 64 kB goes back to the system when it is freed: none is left over from before to be used unseen.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found: float = pool.apply(_walk_and_watch, (height, width))
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
    return found


def _walk_and_watch(height: int, width: int) -> float:
    torch.set_num_threads(1)
    walked(*scene(16, 16))  # loads what torch loads on first use
    inputs = scene(height, width)
    return rise(lambda: walked(*inputs))


def rise(function: Callable[[], object]) -> float:
    """MiB by which this process's resident memory rises above what it was, at its highest (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1])


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense-squarings", type=int, default=SQUARINGS, choices=range(1, SQUARINGS + 1))
    parser.add_argument("--gpu-alone", action="store_true", help="leave out what runs on the CPU alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine() + ", one thread\n")
    if not options.gpu_alone:
        against_dense(options.dense_squarings)
        growth()
    if torch.cuda.is_available():
        on_gpu()


if __name__ == "__main__":
    main()
