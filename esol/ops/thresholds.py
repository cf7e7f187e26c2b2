"""Thresholds that a photo's own class maps name: no mask and no number found on another set is needed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 256


def auto_threshold(score: Tensor) -> float:
    """The threshold between background and object of one photo's best class map: score (H, W) in 0..1 -> 0..1.

    The geometric mean of two classical rules on the histogram, Otsu's (least variance inside both parts) and Li's
    (least cross entropy between the map and its two-valued copy). Otsu's is too high where objects are small, since a
    few bright pixels hardly change a variance, Li's too low where much of the photo is half bright; they err to
    opposite sides. A map of one value has no object: the threshold is that value, which nothing exceeds.
    Sources: Otsu (IEEE SMC 1979); Li and Lee (Pattern Recognition 1993).
    """
    low, high = float(score.min()), float(score.max())
    if high <= low:
        return high
    level = (score.flatten().float() * (BINS - 1)).round().long().clamp_(0, BINS - 1)
    count = torch.bincount(level, minlength=BINS).cpu().double()
    share = count / count.sum()
    value = torch.arange(BINS, dtype=torch.float64) / (BINS - 1)
    below, mass = share.cumsum(0), (share * value).cumsum(0)
    above = 1 - below
    inside = (below > 0) & (above > 1e-9)  # a threshold at this level leaves pixels on both sides
    inside[-1] = False
    mean_below = mass / below.clamp_min(1e-12)
    mean_above = (mass[-1] - mass) / above.clamp_min(1e-12)
    between = torch.where(inside, below * above * (mean_above - mean_below).square(), -1)
    entropy = mass * mean_below.clamp_min(1e-12).log() + (mass[-1] - mass) * mean_above.clamp_min(1e-12).log()
    entropy = torch.where(inside, entropy, -math.inf)
    otsu, li = (float(value[int(rule.argmax())]) + 0.5 / (BINS - 1) for rule in (between, entropy))
    return min(math.sqrt(otsu * li), high)


def background_power(threshold: float) -> float:
    """alpha of PSA's background (1 - best)^alpha that meets the best map at a threshold in 0..1."""
    threshold = min(max(threshold, 1e-3), 1 - 1e-3)
    return math.log(threshold) / math.log(1 - threshold)


def power_threshold(alpha: float) -> float:
    """The inverse of background_power, by halving: t of t = (1 - t)^alpha."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle < (1 - middle) ** alpha else (low, middle)
    return low
