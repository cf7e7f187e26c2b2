"""How good label maps are: confusion matrices, and the exact curve over all thresholds in one pass. Numpy only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esol.base.named import Named
from esol.base.palette import VOID

Counts = NDArray[np.int64]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """One more number of label maps, besides mIoU, precision and recall.

    count(truth, mask, labels): whole numbers that add up over photos, of uint8 (H, W) twice, 255 in the truth being
    void; value(counts): their sum as a number, in percent.
    """

    count: Callable[[NDArray[np.uint8], NDArray[np.uint8], int], Counts]
    value: Callable[[Counts], float]


METRICS: Named[Metric] = Named("metric")  # by name; each is measured of all masks and predictions


@dataclass(frozen=True)
class Score:
    """IoU, precision and recall of each class (C+1,), background first, at one threshold.

    nan where the truth has no pixel of a class (`unscored`): no mean counts it. Precision is nan too where a class is
    predicted nowhere.
    """

    threshold: float
    iou: Values
    precision: Values
    recall: Values

    @property
    def unscored(self) -> list[int]:
        """Classes without a pixel in the truth."""
        return [int(i) for i in np.flatnonzero(np.isnan(self.recall))]

    @property
    def miou(self) -> float:
        """Mean IoU over the scored classes, background among them."""
        return _mean(self.iou)

    @property
    def mean_precision(self) -> float:
        """Mean precision over the scored classes that are predicted somewhere."""
        return _mean(self.precision)

    @property
    def mean_recall(self) -> float:
        """Mean recall over the scored classes."""
        return _mean(self.recall)


def confusion_matrix(truth: NDArray[np.integer], predicted: NDArray[np.integer], num_labels: int) -> Counts:
    """Pixels by (truth, prediction), int64 (num_labels, num_labels); 255 in the truth is left out.

    ValueError where the two differ in shape or a number is no label.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"truth {truth.shape} and prediction {predicted.shape} differ in shape")
    valid = truth != VOID
    for name, labels in (("truth", truth[valid]), ("prediction", predicted[valid])):
        if labels.size and not 0 <= labels.min() <= labels.max() < num_labels:
            raise ValueError(f"{name} holds {labels.min()}..{labels.max()}, labels are 0..{num_labels - 1}")
    pair = truth[valid].astype(np.int64) * num_labels + predicted[valid]
    return np.bincount(pair, minlength=num_labels**2).reshape(num_labels, num_labels)


def score(confusion: Counts, threshold: float = float("nan")) -> Score:
    """The scores of a confusion matrix (C+1, C+1)."""
    hit, said, there = np.diag(confusion), confusion.sum(0), confusion.sum(1)
    return _score(threshold, hit, said, there)


class ThresholdCurve:
    """mIoU, precision and recall at every threshold i/bins, exact, from one pass over the images.

    The threshold never changes which foreground class wins a pixel, only whether it beats the background; so a
    histogram over (truth, winner, score bin) holds all. `counts`, int64 (C+1, C, bins+1), is a plain sum: curves of
    ranks or shards add up in any order. Recall of a region only: give a truth that is 255 outside it.
    """

    def __init__(self, num_classes: int, bins: int = 100) -> None:
        self.num_classes = num_classes
        self.thresholds = (np.arange(bins) / bins).astype(np.float32)
        self.counts: Counts = np.zeros((num_classes + 1, num_classes, bins + 1), dtype=np.int64)

    def update(self, truth: NDArray[np.integer], winner: NDArray[np.integer], score: NDArray[np.float32]) -> None:
        """One image: truth (H, W) 0 background, 1..C, 255 void; winner (H, W) 0..C-1 and its float32 score (H, W)."""
        valid = truth != VOID
        level = np.searchsorted(self.thresholds, score[valid].astype(np.float32), side="left")  # thresholds below score
        cell = (truth[valid].astype(np.int64) * self.num_classes + winner[valid]) * self.counts.shape[2] + level
        self.counts += np.bincount(cell, minlength=self.counts.size).reshape(self.counts.shape)

    def add(self, counts: Counts) -> None:
        """Takes in the counts of another curve over the same classes and bins."""
        if counts.shape != self.counts.shape:
            raise ValueError(f"counts of shape {counts.shape} cannot be added to {self.counts.shape}")
        self.counts += counts

    def scores(self) -> list[Score]:
        """One Score per threshold; a pixel is foreground where its score is above it, ties are background."""
        above = self.counts[..., ::-1].cumsum(2)[..., ::-1][..., 1:]  # (C+1, C, bins): score > thresholds[i]
        there = self.counts.sum((1, 2))
        foreground = np.arange(self.num_classes)
        background = there[:, None] - above.sum(1)  # (C+1, bins), said to be background
        hit = np.concatenate((background[:1], above[foreground + 1, foreground]))
        said = np.concatenate((background.sum(0, keepdims=True), above.sum(0)))
        return [_score(float(t), hit[:, i], said[:, i], there) for i, t in enumerate(self.thresholds)]

    def best(self) -> Score:
        """The score at the threshold of the highest mIoU (the lowest such threshold)."""
        return max(self.scores(), key=lambda s: (np.nan_to_num(s.miou, nan=-1), -s.threshold))

    def at(self, threshold: float) -> Score:
        """The score at the threshold of the curve that is nearest."""
        return self.scores()[int(np.abs(self.thresholds - threshold).argmin())]


def _score(threshold: float, hit: Counts, said: Counts, there: Counts) -> Score:
    scored = there > 0
    return Score(
        threshold,
        iou=_ratio(hit, said + there - hit, scored),
        precision=_ratio(hit, said, scored & (said > 0)),
        recall=_ratio(hit, there, scored),
    )


def _ratio(above: Counts, below: Counts, where: NDArray[np.bool_]) -> Values:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=where)


def _mean(values: Values) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
