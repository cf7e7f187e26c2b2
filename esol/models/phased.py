"""Dilated depthwise convolutions, as undilated ones of every d-th pixel: the same sums, faster on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 16  # channels that oneDNN's kernels for products of bf16 matrices take at once
WIDE = 8  # grid pixels of padding from which on oneDNN's own kernels are slow, forward (benchmarks/phased.py)


class PhasedConv2d(nn.Module):
    """A square depthwise convolution of stride 1 that keeps the size; it takes over the weights of `conv`.

    A pixel meets only pixels that lie a multiple of the dilation d from it, so that the d * d grids of every d-th pixel
    are convolved each by itself, as further images of the batch (Shensa, the a trous algorithm, 1992). Where its
    weights do not learn and its padding is narrow it is the convolution as it was, and so it is on other devices and
    for an exported graph.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = conv.weight
        self.bias = conv.bias
        self.dilation, self.padding = conv.dilation[0], conv.dilation[0] * (conv.kernel_size[0] // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same size, channels last."""
        d, (batch, channels, height, width) = self.dilation, x.shape
        learns = torch.is_grad_enabled() and self.weight.requires_grad
        as_it_was = x.device.type != "cpu" or torch.compiler.is_exporting()
        if as_it_was or not (learns or self.padding >= WIDE):
            return F.conv2d(x, self.weight, self.bias, 1, self.padding, d, channels)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        rows, columns = -(-height // d), -(-width // d)
        x = F.pad(x, (0, columns * d - width, 0, rows * d - height)).permute(0, 2, 3, 1)
        grids = x.reshape(batch, rows, d, columns, d, channels).permute(2, 4, 0, 1, 3, 5)
        grids = grids.reshape(d * d * batch, rows, columns, channels).permute(0, 3, 1, 2)
        if learns:
            y = _Depthwise.apply(grids, self.weight, self.bias)
        else:
            y = F.conv2d(grids, self.weight, self.bias, 1, self.padding // d, 1, channels)
        y = y.permute(0, 2, 3, 1).reshape(d, d, batch, rows, columns, channels).permute(2, 3, 0, 4, 1, 5)
        return y.reshape(batch, rows * d, columns * d, channels)[:, :height, :width].permute(0, 3, 1, 2)


class _Depthwise(torch.autograd.Function):
    """An undilated depthwise convolution that keeps the size, in the type of x; weight and bias may have another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias = bias is not None
        bias = None if bias is None else bias.to(x.dtype)
        return F.conv2d(x, weight.to(x.dtype), bias, 1, weight.shape[-1] // 2, 1, x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        below = None
        if ctx.needs_input_grad[0]:
            turned = weight.flip(2, 3).to(x.dtype)
            below = F.conv2d(upstream, turned, None, 1, weight.shape[-1] // 2, 1, x.shape[1])
        bias = upstream.sum((0, 2, 3), dtype=weight.dtype) if ctx.bias else None
        return below, _weight_gradient(x, upstream, weight.shape[-1]).to(weight.dtype), bias


def _weight_gradient(x: Tensor, upstream: Tensor, side: int) -> Tensor:
    """The gradient of a depthwise convolution's weights (C, 1, side, side), its input and upstream gradient given.

    In bf16 every channel is convolved with its block of 16, of which only the diagonal is wanted: processors with
    products of bf16 matrices are through with all of it in a fifteenth of the time of oneDNN's own depthwise kernel,
    whose result for a dilated one is nonsense on grids of more than 28 pixels (torch 2.15; benchmarks/phased.py).
    """
    channels = x.shape[1]
    block = BLOCK if x.dtype == torch.bfloat16 and channels % BLOCK == 0 else 1
    _, found, _ = torch.ops.aten.convolution_backward(
        upstream, x, x.new_zeros(channels, block, side, side), None, [1, 1], [side // 2] * 2, [1, 1], False, [0, 0],
        channels // block, [False, True, False],
    )  # fmt: skip
    blocks = found.view(channels // block, block, block, side, side).diagonal(dim1=1, dim2=2)
    return blocks.permute(0, 3, 1, 2).reshape(channels, 1, side, side)


def phase_dilations(net: nn.Module) -> None:
    """Puts PhasedConv2d in the place of every convolution of net that it is faster than; names stay."""
    for parent in list(net.modules()):
        for name, conv in list(parent.named_children()):
            if type(conv) is nn.Conv2d and _gains(conv):
                setattr(parent, name, PhasedConv2d(conv))


def _gains(conv: nn.Conv2d) -> bool:
    side, dilation = conv.kernel_size[0], conv.dilation[0]
    padding = dilation * (side // 2)
    depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.stride == (1, 1) and side % 2 == 1
    square = conv.kernel_size == (side, side) and conv.dilation == (dilation,) * 2 and conv.padding == (padding,) * 2
    return depthwise and square and conv.padding_mode == "zeros" and (side > 3 or dilation > 1)
