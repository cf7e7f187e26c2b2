"""Pairs of near pixels: which there are, how alike their two pixels are (IRN, PSA), what the labels say of them.

A pair tensor is (B, K, h, w): entry [b, k, y, x] belongs to pixel (y, x) and pixel (y + dy_k, x + dx_k), with (dy_k,
dx_k) offset k of `pair_offsets`. Every pair stands there once; it is 0 where its second pixel is outside the image.

What has two forms goes offset by offset on a CPU, whose cache has room for one, and through all at once on a GPU
and in compiled code, where the number of kernels is what takes the time.
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


def at_once(values: Tensor) -> bool:
    """Whether all offsets are to be computed together where these values are."""
    return values.device.type != "cpu" or torch.compiler.is_compiling()


def offsets_on(radius: int, device: torch.device) -> Tensor:
    """`pair_offsets` as long (K, 2) on a device."""
    return ways(radius, device)[:, 0]


def pair_places(radius: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Whether a pair is inside the image, bool (K, h * w), and its second pixel's place row by row, long (K, h * w).

    That of a pair outside is its first pixel's.
    """
    dy, dx = offsets_on(radius, device)[..., None, None].unbind(1)
    row, column = torch.arange(height, device=device)[:, None] + dy, torch.arange(width, device=device) + dx
    inside = ((row < height) & (column >= 0) & (column < width)).flatten(1)
    return inside, torch.arange(height * width, device=device) + inside * (dy * width + dx).flatten(1)


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


def ways(radius: int, device: torch.device) -> Tensor:
    """Of every offset itself, then the points on the way to it, then itself again: long (K, points, 2).

    A constant in compiled code, which esol.engines.compiled says: to say it here would load the compiler everywhere.
    """
    return _ways_on(radius, device)


@lru_cache
def _ways_on(radius: int, device: torch.device) -> Tensor:
    """Kept, because a GPU would have to wait for numbers from the host; compiled code has them as a constant."""
    offsets = pair_offsets(radius)
    longest = max(len(_path(offset)) for offset in offsets)
    ways = [(offset, *_path(offset), *(offset,) * (longest - len(_path(offset)))) for offset in offsets]
    return torch.tensor(ways, device=device)


class _BoundaryAffinity(torch.autograd.Function):
    """Keeps two bytes a pair, which pixel was the highest: at radius 10 a pixel has 152 pairs of 2 to 22 points."""

    @staticmethod
    def forward(ctx: Any, edge: Tensor, radius: int) -> Tensor:
        highest = _highest_at_once if at_once(edge) else _highest_by_offset
        affinity, winner = highest(edge, radius, ctx.needs_input_grad[0])
        ctx.save_for_backward(winner)
        ctx.radius = radius
        return affinity

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (winner,) = ctx.saved_tensors
        returned = _returned_at_once if at_once(upstream) else _returned_by_offset
        return returned(winner, upstream, ctx.radius).neg_(), None


def _keys(edge: Tensor, radius: int) -> tuple[Tensor, Tensor, torch.dtype]:
    """Numbers (B, h, w) whose maximum finds height and place, the places (h, w), and the type of a way in places.

    Floats from 0 up sort like their bits. The positions below them fall, so that the first of equals wins.
    """
    height, width = edge.shape[1:]
    place = torch.arange(height * width, device=edge.device).view(height, width)
    keys = (edge.contiguous().view(torch.int32).long() << 32) + (height * width - 1 - place)
    return keys, place, torch.int16 if radius * width < 2**15 else torch.int32


def _highest_by_offset(edge: Tensor, radius: int, learns: bool) -> tuple[Tensor, Tensor]:
    """The affinity, and how many places behind its first pixel a pair has its highest one (empty unless it learns)."""
    offsets, (batch, height, width) = pair_offsets(radius), edge.shape
    (keys, place, kind), last = _keys(edge, radius), height * width - 1
    affinity = edge.new_zeros(batch, len(offsets), height, width)
    winner = torch.empty(affinity.shape if learns else (0,), dtype=kind, device=edge.device)
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
        if learns:
            winner[:, k][first] = (last - (best & 0xFFFFFFFF) - place[first]).to(kind)
    return affinity, winner


def _highest_at_once(edge: Tensor, radius: int, learns: bool) -> tuple[Tensor, Tensor]:
    """What _highest_by_offset gives; one gather of all pairs for each point of the longest way."""
    batch, height, width = edge.shape
    (keys, place, kind), last = _keys(edge, radius), height * width - 1
    keys, place = keys.flatten(1), place.flatten()
    inside, _ = pair_places(radius, height, width, edge.device)
    best = keys[:, None]
    for y, x in ways(radius, edge.device).permute(1, 2, 0)[..., None].unbind():
        best = torch.maximum(best, keys[:, place + inside * (y * width + x)])
    affinity = ((1 - (best >> 32).int().view(edge.dtype)) * inside).view(batch, -1, height, width)
    winner = (last - (best & 0xFFFFFFFF) - place) * inside if learns else best.new_empty(0)
    return affinity, winner.to(kind).view(affinity.shape if learns else (0,))


def _returned_by_offset(winner: Tensor, upstream: Tensor, radius: int) -> Tensor:
    """What the pairs' gradients add up to at their highest points: (B, h, w)."""
    batch, _, height, width = winner.shape
    gradient = upstream.new_zeros(batch * height * width)
    place = torch.arange(len(gradient), device=winner.device).view(batch, height, width)
    for k, offset in enumerate(pair_offsets(radius)):
        first, _ = pair_windows(offset, height, width)
        where = winner[:, k][first] + place[first]
        gradient.scatter_add_(0, where.flatten(), upstream[:, k][first].flatten())
    return gradient.view(batch, height, width)


def _returned_at_once(winner: Tensor, upstream: Tensor, radius: int) -> Tensor:
    """What _returned_by_offset gives, in one sum."""
    batch, _, height, width = winner.shape
    inside, _ = pair_places(radius, height, width, winner.device)
    place = torch.arange(batch * height * width, device=winner.device).view(batch, 1, -1)
    gradient = upstream.new_zeros(batch * height * width)
    gradient.scatter_add_(0, (winner.flatten(2) + place).flatten(), (upstream.flatten(2) * inside).flatten())
    return gradient.view(batch, height, width)


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
    return (_labels_at_once if at_once(labels) else _labels_by_offset)(labels, radius)


def _labels_by_offset(labels: Tensor, radius: int) -> tuple[Tensor, Tensor, Tensor]:
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


def _labels_at_once(labels: Tensor, radius: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, height, width = labels.shape
    inside, second = pair_places(radius, height, width, labels.device)
    a = labels.flatten(1)
    b = torch.where(inside, a[:, second], IGNORED)
    a = a[:, None]
    known = (a != IGNORED) & (b != IGNORED)
    kinds = ((a == 0) & (b == 0), known & (a == b) & (a != 0), known & (a != b))
    background, foreground, different = (kind.view(batch, -1, height, width) for kind in kinds)
    return background, foreground, different
