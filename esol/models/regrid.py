"""Features of one image on grids of several strides: feature (i, j) of stride s looks at pixel (i * s, j * s)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pad_to_grid(image: Tensor, stride: int) -> Tensor:
    """(B, 3, H, W), its last row and column repeated until both sides are a multiple of the stride plus one.

    At such sizes the features look where this module says, whatever the network's padding. Networks that TensorFlow
    trained (timm's tf_*) pad by the image's size: at multiples of the stride they look half a stride or more beside it.
    """
    # Indices whatever the size, and no branch: what torch.export notes of it then holds for every size.
    rows, columns = (
        torch.arange((n + stride - 2) // stride * stride + 1, device=image.device).clamp(max=n - 1)
        for n in image.shape[2:]
    )
    return image[:, :, rows][:, :, :, columns]


def regrid(features: Tensor, stride: int, target: int, size: tuple[int, int] | None = None) -> Tensor:
    """Features (B, C, h, w) of one stride on the grid of another, one a multiple of the other, cut or padded to size.

    A finer grid is subsampled, a coarser one enlarged bilinearly, both without a shift; beyond the last feature it is
    repeated. size None: as many rows and columns as there are without padding.
    """
    if stride < target:
        features = features[..., :: target // stride, :: target // stride]
    elif stride > target:
        height, width = ((n - 1) * (stride // target) + 1 for n in features.shape[2:])
        features = F.interpolate(features, (height, width), mode="bilinear", align_corners=True)
    if size is None:
        return features
    features = features[..., : size[0], : size[1]]
    below, right = size[0] - features.shape[2], size[1] - features.shape[3]
    return F.pad(features, (0, right, 0, below), mode="replicate") if below or right else features


def fuse(
    conv: nn.Conv2d, features: Sequence[Tensor], strides: Sequence[int], target: int, size: tuple[int, int]
) -> Tensor:
    """The 1x1 convolution of all features, concatenated on the grid of stride target: (B, conv's channels, *size).

    strides: of the features, in rising order. Every grid is projected first and then enlarged, which is linear, so that
    the numbers are the same and the work of a coarse level is that of its own grid.
    """
    total, start = None, 0
    for stride, group in groupby(zip(features, strides, strict=True), key=lambda pair: pair[1]):
        x = torch.cat([feature for feature, _ in group], 1)
        part = F.conv2d(x, conv.weight[:, start : start + x.shape[1]])
        start += x.shape[1]
        part = regrid(part, stride, target, size)
        total = part if total is None else total + part
    assert total is not None
    return total if conv.bias is None else total + conv.bias[:, None, None]


def squeeze_to_grid(image: Tensor, stride: int) -> Tensor:
    """uint8 (3, H, W) -> float (1, 3, H', W'), a few pixels smaller: the grid's corners are then the image's."""
    size = [(-(-side // stride) - 1) * stride + 1 for side in image.shape[1:]]
    return F.interpolate(image[None].float(), size, mode="bilinear", align_corners=True)


def grid_size(image: Tensor, factor: float, stride: int) -> tuple[int, int]:
    """The multiples of the stride plus one that are nearest to factor times the size of an image (..., H, W)."""
    height, width = (max(1, round((factor * side - 1) / stride)) * stride + 1 for side in image.shape[-2:])
    return height, width


def scale_to_grid(image: Tensor, factor: float, stride: int) -> Tensor:
    """(B, 3, H, W) -> float (B, 3, H', W') of grid_size.

    At such sizes the features' outermost columns sit on the outermost pixels, so that maps mirror and enlarge without a
    shift; at multiples of the stride they are half a stride off.
    """
    size = grid_size(image, factor, stride)
    return F.interpolate(image.float(), size, mode="bilinear", align_corners=False, antialias=True)
