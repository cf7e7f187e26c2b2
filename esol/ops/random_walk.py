"""Random walk: class maps spread along the affinities of near pixels (PSA, IRN), without a dense matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from esol.ops.pairs import pair_offsets, pair_windows

TAIL = 1e-7  # sum of the coefficients that are left out, at most
ROOM = 2**25  # floats of neighbours at a time on a GPU


@torch.no_grad()
def random_walk(
    maps: Sequence[Tensor], affinity: Sequence[Tensor], radius: int, beta: float, steps: int | Sequence[int] = 256
) -> list[Tensor]:
    """Class maps times T^steps: T is the affinity matrix ** beta, elementwise, each column divided by its sum.

    Of each photo: maps (n, h, w), n may be 0; affinity: pairs (K, h, w) in 0..1 of `pair_offsets(radius)`, that of a
    pixel with itself is 1; the steps, or one number for all. beta above 0. Returns float32 (n, h, w) of each.
    ValueError where the shapes do not fit, or beta or steps.

    The result of PSA and IRN (`to_transition_matrix`), who square a dense matrix of (hw)^2; memory here is about K + 6n
    floats a pixel, on a GPU 7K + 6n and up to 256 MiB. A step makes every pixel a mean of those around it: a map stays
    between its extremes. Photos of any sizes walk side by side: on a CPU with the same bits as alone, on a GPU with
    hardly more kernels than the one of most steps.

    T is self-adjoint when pixels weigh what their columns sum to. Its eigenvalues are in -1..1, where x^steps is nearly
    a Chebyshev series of 5.3 sqrt(steps) terms: 84 products instead of 256 (Sachdeva and Vishnoi, "Faster Algorithms
    via Approximation Theory", 2014). In that weighted 2-norm, what is left out is at most 1e-7 of the map.
    """
    count = len(pair_offsets(radius))
    each = [steps] * len(maps) if isinstance(steps, int) else steps
    for own, pairs, number in zip(maps, affinity, each, strict=True):
        if pairs.shape != (count, *own.shape[1:]):
            raise ValueError(f"affinity {tuple(pairs.shape)} does not fit maps {tuple(own.shape)} at radius {radius}")
        if beta <= 0 or number < 0:
            raise ValueError(f"beta must be above 0 and steps not below, got {beta} and {number}")
    found = [own.float().clone() for own in maps]
    some = [i for i, own in enumerate(found) if own.numel()]
    if not some:
        return found
    start = [found[i] for i in some]
    # In the layout the photos stand behind each other, all with rows of one length: that of the widest photo's and
    # radius - 1 empty pixels. So the way to a pair's second pixel is the same for all pixels, and a product is K long
    # slices. What leaves a photo lands on an empty pixel or in the next photo, and has the weight 0.
    row = max(own.shape[2] for own in start) + radius - 1
    shifts = [dy * row + dx for dy, dx in pair_offsets(radius)]
    lengths = [own.shape[1] * row for own in start]
    weights = _weights([affinity[i].float() for i in some], radius, beta, row)
    terms = start[0].new_zeros(3, max(len(own) for own in start), sum(lengths) + max(shifts, default=0))
    result = terms.new_zeros(terms.shape[1], sum(lengths))
    for own, place in zip(start, terms[0, :, : sum(lengths)].split(lengths, 1), strict=True):
        _rows(place, own).copy_(own)
    _chebyshev(terms, weights, shifts, result.split(lengths, 1), [_coefficients(each[i]) for i in some])
    for i, own, place in zip(some, start, result.split(lengths, 1), strict=True):
        found[i] = torch.clamp(_rows(place, own), own.amin((1, 2), keepdim=True), own.amax((1, 2), keepdim=True))
    return found


def _rows(place: Tensor, maps: Tensor) -> Tensor:
    """The pixels of a photo's maps (n, h, w) in its place in the layout, (at least n, h * row)."""
    return place[: len(maps)].view(len(maps), maps.shape[1], -1)[..., : maps.shape[2]]


def _weights(affinity: Sequence[Tensor], radius: int, beta: float, row: int) -> Tensor:
    """The pairs' weights in the layout, (K, pixels of all photos)."""
    lengths = [own.shape[1] * row for own in affinity]
    weights = affinity[0].new_zeros(len(affinity[0]), sum(lengths))
    for own, place in zip(affinity, weights.split(lengths, 1), strict=True):
        height, width = own.shape[1:]
        for k, offset in enumerate(pair_offsets(radius)):
            first, _ = pair_windows(offset, height, width)
            place[k].view(height, row)[first] = own[k][first] ** beta
    return weights


def _chebyshev(
    terms: Tensor, weights: Tensor, shifts: list[int], result: Sequence[Tensor], series: Sequence[list[float]]
) -> None:
    """x^steps of the walk: terms (3, n, pixels), the maps in the first, room for the last three terms of the series.

    result: the place of each photo, (n, own pixels); series: the coefficients of each.

    A product is written x_j + sum_i A_ij (x_i - x_j) / sum_i A_ij: it keeps constants exactly and rounds in proportion
    to the differences. Summing A_ij x_i rounds alike in every step: in float32, 256 steps are wrong by up to 5e-4.
    """
    length = weights.shape[1]
    share = terms.new_ones(terms.shape[2])
    for weight, shift in zip(weights, shifts, strict=True):
        share[:length] += weight
        share[shift : shift + length] += weight
    share.reciprocal_()
    add = _all_at_once(terms, weights, shifts) if terms.is_cuda else _pair_by_pair(terms, weights, shifts)
    lengths = [place.shape[1] for place in result]
    photos = [term[:, :length].split(lengths, 1) for term in terms]
    for place, first, own in zip(result, photos[0], series, strict=True):
        torch.mul(first, own[0], out=place)
    for degree in range(1, max(len(own) for own in series)):
        new = terms[degree % 3].zero_()
        add((degree - 1) % 3)
        new.mul_(share).add_(terms[(degree - 1) % 3])
        if degree > 1:
            new.mul_(2).sub_(terms[(degree - 2) % 3])
        for place, part, own in zip(result, photos[degree % 3], series, strict=True):
            if degree < len(own):
                place.add_(part, alpha=own[degree])


def _pair_by_pair(terms: Tensor, weights: Tensor, shifts: list[int]) -> Callable[[int], None]:
    """Adds sum_j A_ij (x_j - x_i) of term `which` to the term after it: in slices, next to no memory."""
    length = weights.shape[1]
    difference = terms.new_empty(terms.shape[1], length)
    pairs = [  # slices made once; the three terms take turns
        [
            (x[:, :length], x[:, s : s + length], weight, y[:, :length], y[:, s : s + length])
            for weight, s in zip(weights, shifts, strict=True)
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
    length = weights.shape[1]
    ways = torch.tensor([*shifts, *(-s for s in shifts)], dtype=torch.int64, device=terms.device)[:, None]
    place = torch.arange(length, device=terms.device) + ways
    inside = place >= 0  # behind the last pixel weights are 0 already
    place.clamp_(0, length - 1)
    both = torch.cat((weights, weights.gather(1, place[len(shifts) :]))) * inside
    size = max(ROOM // (terms.shape[1] * length), 1)
    parts = list(zip(place.split(size), both.split(size), strict=True))

    def add(which: int) -> None:
        x, y = terms[which][:, :length], terms[(which + 1) % 3][:, :length]
        for near, weight in parts:
            y += (x[:, near] - x[:, None]).mul_(weight).sum(1)

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
