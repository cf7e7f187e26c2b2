"""Pairs of near pixels: which there are, how alike their two pixels are (IRN, PSA), what the labels say of them.

A pair tensor is (B, K, h, w): entry [b, k, y, x] belongs to pixel (y, x) and pixel (y + dy_k, x + dx_k), with (dy_k,
dx_k) offset k of `pair_offsets`. Every pair stands there once; it is 0 where its second pixel is outside the image.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = 255  # label of pixels that belong to no pair
Window = tuple[Any, ...]  # (..., rows, columns) of a tensor that ends in (h, w)


@lru_cache
def pair_offsets(radius: int) -> tuple[tuple[int, int], ...]:
    """Half of the pixels (dy, dx) nearer than radius: row 0 from dx = 1 on, then rows 1, 2, ... from left to right.

    radius in grid pixels; 34 offsets at radius 5, 152 at radius 10. The other half are the same pairs, reversed.
    """
    reach = range(1 - radius, radius)
    return tuple((y, x) for y in range(radius) for x in reach if (y, x) > (0, 0) and y * y + x * x < radius * radius)


def pair_windows(offset: tuple[int, int], height: int, width: int) -> tuple[Window, Window]:
    """The pairs of one offset that are inside the image: the index of their first pixels, and of their second ones."""
    dy, dx = offset
    columns = max(width - abs(dx), 0)
    first = (..., slice(max(height - dy, 0)), slice(max(-dx, 0), max(-dx, 0) + columns))
    second = (..., slice(min(dy, height), height), slice(max(dx, 0), max(dx, 0) + columns))
    return first, second


def boundary_affinity(edge: Tensor, radius: int) -> Tensor:
    """1 - the highest edge on the way between the two pixels, both included (IRN): (B, h, w) -> pairs (B, K, h, w).

    edge in 0..1; computed in float32. On the way is every grid point of the pair's bounding box nearer than 1 to the
    line. The gradient goes to the highest point, to the first of them, row by row, where several are equally high.
    """
    affinity: Tensor = _BoundaryAffinity.apply(edge.float(), radius)
    return affinity


@lru_cache
def _path(offset: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Grid points on the way from (0, 0) to the offset, both included."""
    dy, dx = offset
    box = ((y, x) for y in range(dy + 1) for x in range(min(0, dx), max(0, dx) + 1))
    return tuple((y, x) for y, x in box if (dy * x - dx * y) ** 2 < dy * dy + dx * dx)


class _BoundaryAffinity(torch.autograd.Function):
    """Keeps two bytes a pair, which pixel was the highest: at radius 10 a pixel has 152 pairs of 2 to 22 points."""

    @staticmethod
    def forward(ctx: Any, edge: Tensor, radius: int) -> Tensor:
        offsets, (batch, height, width) = pair_offsets(radius), edge.shape
        # Floats from 0 up sort like their bits. With the position below them, one maximum finds height and place; the
        # positions fall, so that the first of equals wins.
        place = torch.arange(height * width, device=edge.device).view(height, width)
        last = height * width - 1
        keys = (edge.contiguous().view(torch.int32).long() << 32) + (last - place)
        affinity = edge.new_zeros(batch, len(offsets), height, width)
        kind = torch.int16 if radius * width < 2**15 else torch.int32
        winner = torch.empty(affinity.shape if ctx.needs_input_grad[0] else (0,), dtype=kind, device=edge.device)
        for k, offset in enumerate(offsets):
            first, _ = pair_windows(offset, height, width)
            rows, columns = first[1:]
            best = keys[first].clone()
            if not best.numel():
                continue
            for y, x in _path(offset):
                moved = (..., slice(y, rows.stop + y), slice(columns.start + x, columns.stop + x))
                torch.maximum(best, keys[moved], out=best)
            affinity[:, k][first] = 1 - (best >> 32).int().view(edge.dtype)
            if ctx.needs_input_grad[0]:
                winner[:, k][first] = (last - (best & 0xFFFFFFFF) - place[first]).to(kind)
        ctx.save_for_backward(winner)
        ctx.radius = radius
        return affinity

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (winner,) = ctx.saved_tensors
        batch, _, height, width = winner.shape
        gradient = upstream.new_zeros(batch * height * width)
        place = torch.arange(len(gradient), device=winner.device).view(batch, height, width)
        for k, offset in enumerate(pair_offsets(ctx.radius)):
            first, _ = pair_windows(offset, height, width)
            where = winner[:, k][first] + place[first]
            gradient.scatter_add_(0, where.flatten(), upstream[:, k][first].flatten())
        return gradient.view(batch, height, width).neg_(), None


def feature_affinity(features: Tensor, radius: int) -> Tensor:
    """exp(-mean over the channels of |f_i - f_j|) (PSA): features (B, C, h, w) -> pairs (B, K, h, w).

    Computed in float32, in float64 for float64 features. The differences, K times the features, are not kept: the
    gradient computes them again, some channels at a time.
    """
    wide = features if features.dtype == torch.float64 else features.float()
    affinity: Tensor = _FeatureAffinity.apply(wide, radius)
    return affinity


def _blocks(features: Tensor) -> list[slice]:
    """Channels at a time: few enough for a processor's cache (three to eight times faster), enough to fill a GPU."""
    most = 2**19 if features.device.type == "cpu" else 2**24
    step = max(1, most // max(1, features[:, 0].numel()))
    return [slice(start, start + step) for start in range(0, features.shape[1], step)]


class _FeatureAffinity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, radius: int) -> Tensor:
        batch, channels, height, width = features.shape
        windows = [pair_windows(offset, height, width) for offset in pair_offsets(radius)]
        affinity = features.new_zeros(batch, len(windows), height, width)
        for block in _blocks(features):
            some = features[:, block]
            for k, (first, second) in enumerate(windows):
                affinity[:, k][first] += (some[first] - some[second]).abs_().sum(1)
        for k, (first, _) in enumerate(windows):
            affinity[:, k][first] = (affinity[:, k][first] / -channels).exp_()
        ctx.save_for_backward(features, affinity)
        ctx.windows = windows
        return affinity

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        features, affinity = ctx.saved_tensors
        gradient = torch.zeros_like(features)
        pull = upstream * affinity / features.shape[1]
        for block in _blocks(features):
            some, towards = features[:, block], gradient[:, block]
            for k, (first, second) in enumerate(ctx.windows):
                change = (some[first] - some[second]).sign_().mul_(pull[:, k : k + 1][first])
                towards[first] -= change
                towards[second] += change
        return gradient, None


def pair_labels(labels: Tensor, radius: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs are (both background, of one foreground class, of two different labels): three bool (B, K, h, w).

    labels uint8 or int64 (B, h, w): 0 background, 1..C classes, 255 ignored: its pairs are in none of the three.
    """
    offsets, (batch, height, width) = pair_offsets(radius), labels.shape
    shape = (batch, len(offsets), height, width)
    background, foreground, different = (torch.zeros(shape, dtype=torch.bool, device=labels.device) for _ in range(3))
    for k, offset in enumerate(offsets):
        first, second = pair_windows(offset, height, width)
        a, b = labels[first], labels[second]
        known = (a != IGNORED) & (b != IGNORED)
        background[:, k][first] = (a == 0) & (b == 0)
        foreground[:, k][first] = known & (a == b) & (a != 0)
        different[:, k][first] = known & (a != b)
    return background, foreground, different
