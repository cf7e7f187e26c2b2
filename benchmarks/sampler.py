"""The row `sampler` of python -m benchmarks: deform_conv against torchvision.ops.deform_conv2d."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torchvision
from torch import Tensor

from benchmarks.rows import Comparison, Photos, relative
from esol.models.sampler import deform_conv

SHAPES = [(8, 1280, 256, 14), (4, 2048, 256, 32)]
SIZES = [(14, 14), (13, 32), (7, 5), (1, 9)]
OFFSETS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": lambda o: o * 0,
    "small (deviation 0.7)": lambda o: o * 0.7,
    "whole numbers": lambda o: (o * 3).round(),
    "over the border (deviation 8)": lambda o: o * 8,
    "a third far outside (1e4)": lambda o: torch.where(o > 0.43, o * 1e4, o),
}


def theirs(x: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """The reference."""
    return torchvision.ops.deform_conv2d(x, offset, weight, padding=1)


def compared(photos: Photos) -> Iterator[Comparison]:
    """Forward, and backward to the offsets alone: x and the kernel are frozen. The difference is `error`'s."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    largest = error(device)
    for batch, before, after, side in SHAPES:
        x = torch.randn(batch, before, side, side, device=device)
        weight = torch.randn(after, before, 3, 3, device=device) / (3 * before**0.5)
        offset = (0.7 * torch.randn(batch, 18, side, side, device=device)).requires_grad_()
        yield Comparison(
            f"{before} -> {after} channels, {side}x{side}, batch {batch}",
            partial(gradient, theirs, x, weight, offset),
            {"": partial(gradient, deform_conv, x, weight, offset)},
            lambda mine, want: largest,
            {"": 1e-10},
        )


def gradient(function: Callable[..., Tensor], x: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """Forward and backward of the sum: the gradient of the offsets."""
    return torch.autograd.grad(function(x, weight, offset).sum(), offset)[0]


def error(device: str) -> float:
    """Largest relative difference in float64 over odd sizes and all kinds of offsets, of values and gradients."""
    found = 0.0
    for shape in OFFSETS.values():
        for height, width in SIZES:
            x = torch.randn(2, 64, height, width, dtype=torch.float64, device=device)
            weight = torch.randn(32, 64, 3, 3, dtype=torch.float64, device=device)
            offset = shape(torch.randn(2, 18, height, width, dtype=torch.float64, device=device)).requires_grad_()
            ours, want = deform_conv(x, weight, offset), theirs(x, weight, offset)
            upstream = torch.randn_like(ours)
            gradients = [torch.autograd.grad(y, offset, upstream)[0] for y in (ours, want)]
            found = max(found, relative(ours, want), relative(*gradients))
    return found
