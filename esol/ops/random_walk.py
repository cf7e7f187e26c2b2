"""Random walk: class maps spread along the affinities of near pixels (PSA, IRN), without a dense matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from esol.ops.pairs import pair_offsets, pair_windows

TAIL = 1e-7  # sum of the coefficients that are left out, at most
ROOM = 2**25  # floats of neighbours at a time on a GPU


@torch.no_grad()
def random_walk(maps: Tensor, affinity: Tensor, radius: int, beta: float, steps: int = 256) -> Tensor:
    """Class maps times T^steps: T is the affinity matrix ** beta, elementwise, each column divided by its sum.

    maps (B, n, h, w), n may be 0; affinity: pairs (B, K, h, w) in 0..1 of `pair_offsets(radius)`, that of a pixel with
    itself is 1; beta above 0. Returns float32 (B, n, h, w). ValueError where the shapes do not fit, or beta or steps.
    The result of PSA and IRN (`to_transition_matrix`), who square a dense matrix of (hw)^2; memory here is about K + 6n
    floats a pixel, on a GPU 7K + 6n and up to 256 MiB. A step makes every pixel a mean of those around it: a map stays
    between its extremes.

    T is self-adjoint when pixels weigh what their columns sum to. Its eigenvalues are in -1..1, where x^steps is nearly
    a Chebyshev series of 5.3 sqrt(steps) terms: 84 products instead of 256 (Sachdeva and Vishnoi, "Faster Algorithms
    via Approximation Theory", 2014). In that weighted 2-norm, what is left out is at most 1e-7 of the map.
    """
    batch, count, height, width = maps.shape
    if affinity.shape != (batch, len(pair_offsets(radius)), height, width):
        raise ValueError(f"affinity {tuple(affinity.shape)} does not fit maps {tuple(maps.shape)} at radius {radius}")
    if beta <= 0 or steps < 0:
        raise ValueError(f"beta must be above 0 and steps not below, got {beta} and {steps}")
    maps = maps.float()
    if not maps.numel():
        return maps.clone()
    shifts, weights = _row_after_row(affinity.float(), radius, beta)
    length = weights.shape[-1]
    terms = maps.new_zeros(3, batch, count, length + max(shifts, default=0))
    image = (..., slice(width))
    terms[0, :, :, :length].view(batch, count, height, -1)[image] = maps
    result = _chebyshev(terms, weights, shifts, steps)[..., :length].view(batch, count, height, -1)[image]
    return torch.clamp(result, maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True))


def _row_after_row(affinity: Tensor, radius: int, beta: float) -> tuple[list[int], Tensor]:
    """How much further on each pair's second pixel is, and the weights (B, K, 1, h * row), in a layout without borders.

    The layout has radius - 1 empty pixels behind every row, so that the way to the second pixel is the same for all
    pixels and a product is K long slices. What leaves the image lands on an empty pixel; there the weight is 0.
    """
    offsets, (batch, _, height, width) = pair_offsets(radius), affinity.shape
    row = width + radius - 1
    weights = affinity.new_zeros(batch, len(offsets), height, row)
    for k, offset in enumerate(offsets):
        first, _ = pair_windows(offset, height, width)
        weights[:, k][first] = affinity[:, k][first] ** beta
    return [dy * row + dx for dy, dx in offsets], weights.view(batch, len(offsets), 1, height * row)


def _chebyshev(terms: Tensor, weights: Tensor, shifts: list[int], steps: int) -> Tensor:
    """x^steps of the walk: terms (3, B, n, length), the maps in the first, room for the last three terms of the series.

    A product is written x_j + sum_i A_ij (x_i - x_j) / sum_i A_ij: it keeps constants exactly and rounds in proportion
    to the differences. Summing A_ij x_i rounds alike in every step: in float32, 256 steps are wrong by up to 5e-4.
    """
    length = weights.shape[-1]
    share = terms.new_ones(terms.shape[1], 1, terms.shape[3])
    for k, shift in enumerate(shifts):
        share[..., :length] += weights[:, k]
        share[..., shift : shift + length] += weights[:, k]
    share.reciprocal_()
    add = _all_at_once(terms, weights, shifts) if terms.is_cuda else _pair_by_pair(terms, weights, shifts)
    coefficients = _coefficients(steps)
    result = terms[0] * coefficients[0]
    for degree, coefficient in enumerate(coefficients[1:], 1):
        new = terms[degree % 3].zero_()
        add((degree - 1) % 3)
        new.mul_(share).add_(terms[(degree - 1) % 3])
        if degree > 1:
            new.mul_(2).sub_(terms[(degree - 2) % 3])
        result.add_(new, alpha=coefficient)
    return result


def _pair_by_pair(terms: Tensor, weights: Tensor, shifts: list[int]) -> Callable[[int], None]:
    """Adds sum_j A_ij (x_j - x_i) of term `which` to the term after it: in slices, next to no memory."""
    length = weights.shape[-1]
    difference = terms.new_empty((*terms.shape[1:3], length))
    pairs = [  # slices made once; the three terms take turns
        [
            (x[..., :length], x[..., s : s + length], weights[:, k], y[..., :length], y[..., s : s + length])
            for k, s in enumerate(shifts)
        ]
        for x, y in ((terms[i], terms[(i + 1) % 3]) for i in range(3))
    ]

    def add(which: int) -> None:
        for first, second, weight, to_first, to_second in pairs[which]:
            torch.sub(second, first, out=difference)
            to_first.addcmul_(weight, difference)
            to_second.addcmul_(weight, difference, value=-1)

    return add


def _all_at_once(terms: Tensor, weights: Tensor, shifts: list[int]) -> Callable[[int], None]:
    """The same from the neighbours' side, for a GPU, where it is the number of kernels that takes the time.

    Neighbours are both ways of every pair, in one gather: 2K floats a pixel and map, in parts of ROOM floats.
    """
    length = weights.shape[-1]
    ways = torch.tensor([*shifts, *(-s for s in shifts)], dtype=torch.int64, device=terms.device)[:, None]
    place = torch.arange(length, device=terms.device) + ways
    inside = place >= 0  # behind the last pixel weights are 0 already
    place.clamp_(0, length - 1)
    forth = weights[:, :, 0]
    back = forth.gather(2, place[len(shifts) :].expand_as(forth))
    both = torch.cat((forth, back), 1)[:, None] * inside
    size = max(ROOM // terms[0, ..., :length].numel(), 1)
    parts = [(place[i : i + size], both[:, :, i : i + size]) for i in range(0, len(place), size)]

    def add(which: int) -> None:
        x, y = terms[which][..., :length], terms[(which + 1) % 3][..., :length]
        for near, weight in parts:
            y += (x[..., near] - x[..., None, :]).mul_(weight).sum(2)

    return add


def _coefficients(steps: int) -> list[float]:
    """Chebyshev coefficients of x^steps from degree 0 on, until the rest sums to TAIL; all >= 0, their sum is 1."""
    whole, so_far, found = 2**steps, 0, []
    for degree in range(steps + 1):
        odd = (steps - degree) % 2
        exact = 0 if odd else math.comb(steps, (steps - degree) // 2) * (2 if degree else 1)
        found.append(exact / whole)
        so_far += exact
        if (whole - so_far) / whole <= TAIL:
            break
    return found
