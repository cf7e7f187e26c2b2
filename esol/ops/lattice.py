"""The permutohedral lattice of Adams, Baek and Davis (2010), which filters with Gaussian kernels in linear time.

A pixel's feature lies in a simplex of d + 1 lattice points and hands its values to them (splat), each of the d + 1 axes
is blurred with (1/2, 1, 1/2), and the pixel collects the values (slice). Every step is a sparse matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Sizes = tuple[tuple[int, int], ...]
"""Height and width of each photo; their pixels stand behind each other, row by row."""


class _Sparse(NamedTuple):
    """A sparse matrix by rows: row r holds weights[s:t] at columns[s:t], s = starts[r], t = starts[r + 1].

    columns, starts: int32; weights: float32. With few dense columns embedding_bag is the fastest product on one core,
    up to 2.5x torch's own for CSR tensors.
    """

    columns: Tensor
    weights: Tensor
    starts: Tensor

    def __matmul__(self, x: Tensor) -> Tensor:
        return F.embedding_bag(
            self.columns, x, self.starts, mode="sum", per_sample_weights=self.weights, include_last_offset=True
        )


class Kernel:
    """compat * N K N, K the Gaussian of unit deviation between features (d, n) on the lattice, N = 1 / sqrt(K 1).

    Between pixels of different photos, which stand behind each other in the features, K is 0.
    """

    def __init__(self, features: Tensor, sizes: Sizes, compat: float) -> None:
        d, n = features.shape
        keys, weights, strides = _simplices(features, [height * width for height, width in sizes])
        ordered, pixels = torch.empty_like(keys), torch.empty_like(keys)
        for row, *out in zip(keys, ordered, pixels, strict=True):  # corners of different index share no lattice point
            torch.sort(row, stable=True, out=out)
        first = torch.ones_like(keys, dtype=torch.bool)
        torch.ne(ordered[:, 1:], ordered[:, :-1], out=first[:, 1:])
        point = first.flatten().cumsum(0, dtype=torch.int32).sub_(1).view_as(keys)
        starts = first.flatten().nonzero()[:, 0]
        self.blurs = _blurs(ordered.flatten().index_select(0, starts), strides)

        corners = torch.empty_like(point).scatter_(1, pixels, point).T.flatten()
        every = torch.arange(0, corners.numel() + 1, d + 1, dtype=torch.int32, device=corners.device)
        starts = F.pad(starts, (0, 1), value=corners.numel()).int()
        self.splat = _Sparse(pixels.flatten().int(), weights.gather(1, pixels).flatten(), starts)
        self.slice = _Sparse(corners, weights.T.flatten() / (1 + 2.0**-d), every)  # Adams' scale, as in pydensecrf
        norm = self(features.new_ones(n, 1)).add_(1e-20).rsqrt_()
        self.splat.weights.mul_(norm[:, 0].index_select(0, self.splat.columns))
        self.slice.weights.view(n, d + 1).mul_(norm * compat)

    def __call__(self, q: Tensor) -> Tensor:
        """(n, L) -> (n, L)."""
        values = self.splat @ q
        for blur in self.blurs:
            values = blur @ values
        return self.slice @ values


def _simplices(features: Tensor, pixels: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The simplex around each feature: keys of its corners, int64 (d + 1, n), barycentric weights (d + 1, n), strides.

    Corner k's coordinates are all k modulo d + 1, so that (coordinate - k) / (d + 1), the cell, and k name it. Its key
    is k * size + photo * cells + sum over the first d axes of stride * cell (coordinates add up to 0, so the last one
    is redundant). Within a photo the points have the same order whatever stands beside it. pixels: how many each photo
    has; strides: int64 (d + 2,), of the d axes, 0 for the last, then size.
    """
    d = len(features)
    elevated = _elevate(features)
    cell = (elevated * (1 / (d + 1))).round_()
    rank = _rank(elevated - cell * (d + 1))
    rank += cell.sum(0).to(torch.int8)  # rounded off the plane: move the axes with the largest error
    wrap = (rank < 0).to(torch.int8) - (rank > d).to(torch.int8)
    rank += wrap * (d + 1)
    cell += wrap
    position = d - rank.long()  # of each axis, in the order in which its residue grows

    residue = (elevated - cell * (d + 1)).mul_(1 / (d + 1))
    ascending = torch.empty_like(residue).scatter_(0, position, residue)
    weights = ascending.clone()
    weights[1:] -= ascending[:-1]
    weights[0] += 1 - ascending[d]

    whole = cell[:d].long()
    low = whole.amin(1, keepdim=True) - 2  # room for the neighbours of the outermost points
    spans = (whole.amax(1) + 3 - low[:, 0]).tolist()
    cells = math.prod(spans)
    size = cells * len(pixels)
    if size * (d + 1) >= 2**63:
        raise ValueError("the kernel's standard deviations are too small for these images")
    strides = whole.new_tensor([*(math.prod(spans[i + 1 :]) for i in range(d)), 0, size])
    keys = torch.empty_like(position).scatter_(0, position, strides[: d + 1, None].expand_as(position))
    # Corner k lies one cell lower than corner k - 1 along the axis at position k - 1, on its left in this order.
    first = ((whole - low) * strides[:d, None]).sum(0)
    for number, own in enumerate(first.split(list(pixels))):
        own += number * cells
    return torch.cat((first[None], size - keys[:-1])).cumsum(0), weights, strides


def _elevate(features: Tensor) -> Tensor:
    """(d, n) -> (d + 1, n), on the plane of zero sum, scaled so that splat, blur and slice have unit deviation."""
    d = len(features)
    # Rounded to float32 where pydensecrf rounds: the last bit says on which side of a border a feature lies, and so
    # which lattice points exist.
    deviation = torch.tensor(math.sqrt(2 / 3) * (d + 1)).item()
    elevated = features.new_empty(d + 1, features.shape[1])
    total = torch.zeros_like(features[0])
    for j in range(d, 0, -1):
        own = features[j - 1] * (deviation / math.sqrt(j * (j + 1)))
        torch.sub(total, own * j, out=elevated[j])
        total += own
    elevated[0] = total
    return elevated


def _rank(residue: Tensor) -> Tensor:
    """int8 (d + 1, n): 0 for a pixel's largest residue; of equal ones the first axis comes last, as in pydensecrf."""
    rank = torch.zeros_like(residue, dtype=torch.int8)
    for i in range(len(residue)):
        for j in range(i + 1, len(residue)):
            smaller = residue[i] < residue[j]
            rank[i] += smaller
            rank[j] += ~smaller
    return rank


def _blurs(keys: Tensor, strides: Tensor) -> list[_Sparse]:
    """(1/2, 1, 1/2) along each axis of the lattice; keys: of all its points, ascending. Absent neighbours count as 0.

    The neighbour along axis j has all coordinates 1 lower but coordinate j, which is d higher; the other is its mirror.
    """
    m, d, size = len(keys), len(strides) - 2, strides[-1]
    me = torch.arange(m, device=keys.device)
    starts = torch.arange(0, 3 * m + 1, 3, dtype=torch.int32, device=keys.device)
    lower = keys + torch.where(keys >= size, -size, d * size - strides[:-1].sum())
    blurs = []
    for stride in strides[:-1]:
        wanted = lower + stride
        found = torch.searchsorted(keys, wanted).clamp_(max=m - 1)
        there = keys.index_select(0, found) == wanted
        columns = torch.stack((me, me, me), 1).int()  # an absent neighbour: the point itself, weight 0
        columns[:, 1] = torch.where(there, found, me)
        columns[:, 2] = F.pad(me, (0, 1)).scatter_(0, torch.where(there, found, m), me)[:m]
        weights = columns.ne(me[:, None]).float().mul_(0.5)
        weights[:, 0] = 1
        blurs.append(_Sparse(columns.flatten(), weights.flatten(), starts))
    return blurs


@lru_cache(maxsize=4)
def spatial_kernel(sizes: Sizes, sxy: float, compat: float, device: torch.device) -> Kernel:
    return Kernel(positions(sizes, sxy, device), sizes, compat)


def positions(sizes: Sizes, sxy: float, device: torch.device) -> Tensor:
    """x and y of each pixel in its photo, in units of sxy, (2, n)."""
    places = []
    for height, width in sizes:
        y, x = (torch.arange(side, device=device, dtype=torch.float32) for side in (height, width))
        y, x = y / y.new_tensor(sxy), x / x.new_tensor(sxy)  # a plain number on a GPU is multiplied by its reciprocal
        places.append(torch.stack((x.expand(height, width), y[:, None].expand(height, width))).flatten(1))
    return torch.cat(places, 1)
