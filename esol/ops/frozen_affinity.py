"""How alike two places of a photo are to a network that has not been trained for it: by its features, its attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from esol.ops.pairs import pair_offsets, pair_windows

ROUNDS = 40  # of Sinkhorn's iteration: attention's rows and columns then sum to 1 within a thousandth


def cosine_affinity(levels: Sequence[Tensor], radius: int) -> Tensor:
    """The mean over the levels of the cosine between two features, 0 where it is negative: pairs (K, h, w) in 0..1.

    levels: features (C_l, h, w) of one photo on one grid, computed in float32. The photo's mean feature is taken out
    first: what all its places share says nothing about two of them.
    """
    each = [F.normalize(own.float() - own.float().mean((1, 2), keepdim=True), dim=0) for own in levels]
    height, width = each[0].shape[1:]
    affinity = each[0].new_zeros(len(pair_offsets(radius)), height, width)
    for k, offset in enumerate(pair_offsets(radius)):
        first, second = pair_windows(offset, height, width)
        affinity[k][first] = sum((own[first] * own[second]).sum(0) for own in each) / len(each)
    return affinity.clamp_(0, 1)


def normalised_cut(affinity: Tensor, labels: Tensor, radius: int) -> float:
    """How much of what is alike a label map parts, in 0..1: the mean over its labels of cut / association.

    affinity: pairs (K, h, w) of near pixels, not negative; labels (h, w), any numbers. The cut of a label is the sum of
    the affinities between its pixels and all others, the association that of its pixels to all. A map of one label
    says nothing, and counts as 1. Source: Shi and Malik, Normalized Cuts and Image Segmentation, 2000, for 2 labels the
    half of theirs.
    """
    names, part = torch.unique(labels, return_inverse=True)
    if len(names) < 2:
        return 1.0
    cut, association = (torch.zeros(len(names), dtype=torch.float64) for _ in range(2))
    height, width = labels.shape
    for k, offset in enumerate(pair_offsets(radius)):
        first, second = pair_windows(offset, height, width)
        own = affinity[k][first].double().flatten().cpu()
        a, b = (part[window].flatten().cpu() for window in (first, second))
        for side in (a, b):
            association += torch.bincount(side, own, len(names))
            cut += torch.bincount(side, own * (a != b), len(names))
    return float((cut / association.clamp_min(1e-12)).mean())


def doubly_stochastic(attention: Tensor) -> Tensor:
    """Attention (n, n), not negative -> the symmetric matrix d_i A_ij d_j whose rows and columns sum to 1.

    A is the mean of attention both ways. Source: Sinkhorn and Knopp, 1967, in its symmetric form.
    """
    both = (attention + attention.T) / 2
    scale = torch.ones_like(both[0])
    for _ in range(ROUNDS):
        scale = (scale / (both @ scale).clamp_min(1e-30)).sqrt()
    return both * (scale[:, None] * scale)
