"""Seeds: class maps and a threshold make a label map."""

from __future__ import annotations

import torch
from torch import Tensor


def best_class(maps: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The strongest class of each pixel and its score: maps (n, H, W), classes (n,) -> int64 (H, W), float32 (H, W).

    Without classes (n = 0) every score is 0, so that every threshold makes background of it.
    """
    if len(classes) == 0:
        return torch.zeros(maps.shape[1:], dtype=torch.int64, device=maps.device), maps.new_zeros(maps.shape[1:])
    score, which = maps.max(0)
    return classes[which], score


def seed(maps: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Label map uint8 (H, W): 0 where the best map is <= threshold, else class index + 1."""
    winner, score = best_class(maps, classes)
    return torch.where(score > threshold, winner + 1, 0).to(torch.uint8)
