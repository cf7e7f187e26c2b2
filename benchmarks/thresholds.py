"""The row `thresholds` of python -m benchmarks: mIoU at 100 thresholds, in one pass and threshold by threshold."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.common import CLASSES
from benchmarks.rows import Comparison, Photos
from esol.base.palette import VOID
from esol.ops.metrics import ThresholdCurve
from esol.ops.seeds import best_class

PHOTOS = 8
Scene = tuple[NDArray[np.uint8], Tensor, Tensor]


def compared(photos: Photos) -> Iterator[Comparison]:
    """Made-up maps of two classes a photo, of the photos' size."""
    made = [scene(photos.side * 3 // 4, photos.side, seed) for seed in range(PHOTOS)]
    yield Comparison(
        f"{PHOTOS} photos of {photos.side} pixels, all thresholds",
        lambda: by_threshold(made),
        {"": lambda: in_one_pass(made)},
        lambda mine, want: float(np.abs(mine - want).max()),
        {"": 1e-12},
    )


def scene(height: int, width: int, seed: int) -> Scene:
    """Truth (H, W) with a void rim, maps (2, H, W) in 0..1 and their classes: blobs of which the maps know the most."""
    generator = torch.Generator().manual_seed(seed)
    knots = torch.rand(1, 4, max(height // 48, 2), max(width // 48, 2), generator=generator)
    known, noise = F.interpolate(knots, (height, width), mode="bicubic")[0].clamp(0, 1).split(2)
    classes = torch.randperm(CLASSES, generator=generator)[:2]
    best, which = known.max(0)
    truth = torch.where(best > 0.6, classes[which] + 1, 0)
    truth[(best - 0.6).abs() < 0.01] = VOID
    return truth.to(torch.uint8).numpy(), (0.7 * known + 0.3 * noise).contiguous(), classes


def in_one_pass(made: list[Scene]) -> NDArray[np.float64]:
    """mIoU at every threshold, as localize scores its maps."""
    curve = ThresholdCurve(CLASSES)
    for truth, maps, classes in made:
        winner, score = (tensor.numpy() for tensor in best_class(maps, classes))
        curve.update(truth, winner, score)
    return np.array([score.miou for score in curve.scores()])


def by_threshold(made: list[Scene]) -> NDArray[np.float64]:
    """The same as IRN's evaluation does it, once a threshold: it is a map of its own, and the highest map wins."""
    found = []
    for threshold in ThresholdCurve(CLASSES).thresholds:
        confusion = np.zeros((CLASSES + 1, CLASSES + 1), np.int64)
        for truth, maps, classes in made:
            background = np.full((1, *truth.shape), threshold, np.float32)
            labels = np.concatenate(([0], classes.numpy() + 1))
            said = labels[np.concatenate((background, maps.numpy())).argmax(0)]
            valid = truth != VOID
            pairs = truth[valid].astype(np.int64) * (CLASSES + 1) + said[valid]
            confusion += np.bincount(pairs, minlength=confusion.size).reshape(confusion.shape)
        there, hit = confusion.sum(1), np.diag(confusion)
        shown = there > 0
        found.append(float(np.mean(hit[shown] / (there + confusion.sum(0) - hit)[shown])))
    return np.array(found)
