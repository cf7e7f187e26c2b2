"""DeepLab's pyramid on a CPU: a product a pixel whose results are moved, against PyTorch's convolutions, in turns.

    python -m benchmarks.shifted

One row is the forward and backward pass of all four branches, on features such as a training step has them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common import interleaved, machine, ratio, table
from esol.models.shifted import ShiftedConv2d

SHAPES = ((8, 1280, 29, 7), (4, 2048, 41, 21), (2, 2048, 41, 81))  # photos, channels, side of the grid, labels
RATES = (6, 12, 18, 24)
ROUNDS = 5


def step(layers: nn.ModuleList, x: Tensor, dtype: torch.dtype) -> Callable[[], float]:
    """A call that returns the milliseconds of a forward and backward pass; one went before it."""

    def call() -> float:
        x.grad = None
        begun = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            total = sum(layer(x) for layer in layers)
        total.float().square().mean().backward()  # type: ignore[union-attr]
        return 1e3 * (time.perf_counter() - begun)

    call()
    return call


def main() -> None:
    torch.set_num_threads(1)
    rows: list[list[object]] = []
    for dtype in (torch.bfloat16, torch.float32):
        for photos, channels, side, labels in SHAPES:
            moved = nn.ModuleList(ShiftedConv2d(channels, labels, 3, rate) for rate in RATES)
            plain = nn.ModuleList(nn.Conv2d(channels, labels, 3, padding=rate, dilation=rate) for rate in RATES)
            plain.load_state_dict(moved.state_dict())
            x = torch.randn(photos, channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
            x.requires_grad_()
            cases = {"plain": step(plain, x, dtype), "moved": step(moved, x, dtype)}
            found = interleaved(cases, ROUNDS)
            what = f"{photos} photos, {channels} channels, {side}x{side}, {labels} labels"
            medians = [statistics.median(own) for own in found.values()]
            rows.append([what, str(dtype)[6:], *medians, ratio(found, "plain", "moved")])
    print(f"{machine()}, one thread\n\n{table(('what', 'precision', 'plain, ms', 'moved, ms', 'ratio'), rows)}")


if __name__ == "__main__":
    main()
