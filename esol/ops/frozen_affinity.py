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


def doubly_stochastic(attention: Tensor) -> Tensor:
    """Attention (n, n), not negative -> the symmetric matrix d_i A_ij d_j whose rows and columns sum to 1.

    A is the mean of attention both ways. Source: Sinkhorn and Knopp, 1967, in its symmetric form.
    """
    both = (attention + attention.T) / 2
    scale = torch.ones_like(both[0])
    for _ in range(ROUNDS):
        scale = (scale / (both @ scale).clamp_min(1e-30)).sqrt()
    return both * (scale[:, None] * scale)
