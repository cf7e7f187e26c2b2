"""Depthwise convolutions of a wide dilation, as undilated ones of every d-th pixel: the same sums, faster on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDE = 8  # grid pixels of padding from which on oneDNN's kernels of 5x5 and more are slow (benchmarks/phased.py)


class PhasedConv2d(nn.Module):
    """A square depthwise convolution of stride 1 that keeps the size; it takes over the weights of `conv`.

    A pixel meets only pixels that lie a multiple of the dilation d from it, so that the d * d grids of every d-th pixel
    are convolved each by itself, as further images of the batch (Shensa, the a trous algorithm, 1992). On other devices
    and for an exported graph it is the convolution as it was.
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
        if x.device.type != "cpu" or torch.compiler.is_exporting():
            return F.conv2d(x, self.weight, self.bias, 1, self.padding, d, channels)
        rows, columns = -(-height // d), -(-width // d)
        x = F.pad(x, (0, columns * d - width, 0, rows * d - height)).permute(0, 2, 3, 1)
        grids = x.reshape(batch, rows, d, columns, d, channels).permute(2, 4, 0, 1, 3, 5)
        grids = grids.reshape(d * d * batch, rows, columns, channels).permute(0, 3, 1, 2)
        y = F.conv2d(grids, self.weight, self.bias, 1, self.padding // d, 1, channels).permute(0, 2, 3, 1)
        y = y.reshape(d, d, batch, rows, columns, channels).permute(2, 3, 0, 4, 1, 5)
        return y.reshape(batch, rows * d, columns * d, channels)[:, :height, :width].permute(0, 3, 1, 2)


def phase_wide_dilations(net: nn.Module) -> None:
    """Puts PhasedConv2d in the place of every convolution of net that it is faster than; names stay."""
    for parent in list(net.modules()):
        for name, conv in list(parent.named_children()):
            if type(conv) is nn.Conv2d and _is_wide(conv):
                setattr(parent, name, PhasedConv2d(conv))


def _is_wide(conv: nn.Conv2d) -> bool:
    side, dilation = conv.kernel_size[0], conv.dilation[0]
    padding = dilation * (side // 2)
    depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.stride == (1, 1) and side % 2 == 1
    square = conv.kernel_size == (side, side) and conv.dilation == (dilation,) * 2 and conv.padding == (padding,) * 2
    return depthwise and square and conv.padding_mode == "zeros" and side > 3 and dilation > 1 and padding >= WIDE
