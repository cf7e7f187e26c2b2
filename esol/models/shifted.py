"""3x3 convolutions of a wide dilation to few channels, as one product a pixel whose results are moved and added."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ShiftedConv2d(nn.Conv2d):
    """A convolution of stride 1 that keeps the size; its weights are named and shaped as nn.Conv2d's.

    oneDNN's kernels are made for many output channels; DeepLab's have a label each. Here every pixel is multiplied with
    all taps at once, k * k * outputs numbers, and each tap's numbers are moved to the pixel that they count for: a
    matrix product, and sums over the few outputs (benchmarks/shifted.py). The sums are float32 at least, whatever the
    product is computed in. On other devices and for an exported graph it is the convolution as it was.
    """

    def __init__(self, channels: int, outputs: int, kernel: int, dilation: int) -> None:
        super().__init__(channels, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, outputs, H, W)."""
        if x.device.type != "cpu" or torch.compiler.is_exporting():
            return super().forward(x)
        assert self.bias is not None
        outputs, channels, kernel, _ = self.weight.shape
        taps = self.weight.permute(2, 3, 0, 1).reshape(-1, channels)
        products = F.linear(x.permute(0, 2, 3, 1), taps).unflatten(3, (kernel * kernel, outputs))
        moved: Tensor = _Moved.apply(products, self.dilation[0])
        return (moved + self.bias.to(moved.dtype)).permute(0, 3, 1, 2)


def _moves(taps: int, dilation: int, height: int, width: int) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Of every tap: rows and columns of the pixels that it counts for, and of those that it looks at."""
    side = round(taps**0.5)
    reach = [dilation * (i - side // 2) for i in range(side)]

    def spans(offset: int, size: int) -> tuple[slice, slice]:
        first, last = min(max(0, -offset), size), max(min(size, size - offset), 0)
        return slice(first, max(first, last)), slice(first + offset, max(first, last) + offset)

    found = []
    for dy in reach:
        for dx in reach:
            rows, columns = spans(dy, height), spans(dx, width)
            found.append(((rows[0], columns[0]), (rows[1], columns[1])))
    return found


class _Moved(torch.autograd.Function):
    """Products (B, H, W, taps, outputs) -> their sums (B, H, W, outputs), float32 or float64."""

    @staticmethod
    def forward(ctx: Any, products: Tensor, dilation: int) -> Tensor:
        batch, height, width, taps, outputs = products.shape
        wide = torch.float64 if products.dtype == torch.float64 else torch.float32
        total = products.new_zeros(batch, height, width, outputs, dtype=wide)
        for tap, (to, seen) in enumerate(_moves(taps, dilation, height, width)):
            total[:, *to] += products[:, *seen, tap]
        ctx.like = (taps, dilation, products.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        taps, dilation, kind = ctx.like
        batch, height, width, outputs = upstream.shape
        gradient = upstream.new_zeros(batch, height, width, taps, outputs, dtype=kind)
        for tap, (to, seen) in enumerate(_moves(taps, dilation, height, width)):
            gradient[:, *seen, tap] = upstream[:, *to]
        return gradient, None
