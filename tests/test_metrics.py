"""The threshold curve against one confusion matrix per threshold."""

import numpy as np
import pytest

from esol.base.palette import VOID
from esol.ops.metrics import ThresholdCurve, confusion_matrix, score

RNG = np.random.default_rng(0)


def images(count: int = 5, classes: int = 4) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Truth, winner, score; class 3 is never in the truth; many scores sit exactly on thresholds."""
    made = []
    for _ in range(count):
        truth = RNG.choice([0, 1, 2, 4, VOID], size=(13, 17))
        winner = RNG.integers(0, classes, size=truth.shape)
        level = RNG.random(truth.shape).astype(np.float32)
        ties = RNG.random(truth.shape) < 0.3
        level[ties] = (RNG.integers(0, 101, size=truth.shape) / 100).astype(np.float32)[ties]
        made.append((truth.astype(np.uint8), winner, level))
    return made


def curve_of(made: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> ThresholdCurve:
    curve = ThresholdCurve(4)
    for image in made:
        curve.update(*image)
    return curve


def test_curve_equals_a_confusion_matrix_per_threshold_with_ties_to_background() -> None:
    made = images()
    curve = curve_of(made)
    for got in curve.scores():
        threshold = np.float32(got.threshold)
        matrix = np.sum([confusion_matrix(t, np.where(s > threshold, w + 1, 0), 5) for t, w, s in made], axis=0)
        want = score(matrix)
        for name in ("iou", "precision", "recall"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
        assert got.unscored == [3]
        assert got.miou == np.delete(want.iou, 3).mean()
    best = curve.best()
    assert best.miou == max(s.miou for s in curve.scores())
    assert curve.at(0.15).threshold == pytest.approx(0.15)


def test_counts_of_parts_add_up_in_any_order() -> None:
    made = images(6)
    whole, parts = curve_of(made), [curve_of(made[4:]), curve_of(made[:1]), curve_of(made[1:4])]
    total = ThresholdCurve(4)
    for part in parts:
        total.add(part.counts)
    np.testing.assert_array_equal(total.counts, whole.counts)
    with pytest.raises(ValueError, match="cannot be added"):
        total.add(ThresholdCurve(3).counts)


def test_confusion_matrix_by_hand() -> None:
    truth, predicted = np.array([[0, 0, 1], [1, 2, 255]]), np.array([[0, 1, 1], [1, 0, 2]])
    matrix = confusion_matrix(truth, predicted, 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    result = score(matrix)
    np.testing.assert_allclose(result.iou, [1 / 3, 2 / 3, 0])
    np.testing.assert_allclose(result.recall, [1 / 2, 1, 0])
    np.testing.assert_array_equal(result.precision, [1 / 2, 2 / 3, np.nan])
    assert result.mean_precision == pytest.approx(7 / 12)


def test_perfect_and_empty() -> None:
    truth = np.array([[0, 1], [2, 2]], dtype=np.uint8)
    curve = ThresholdCurve(2)
    assert np.isnan(curve.best().miou)
    curve.update(truth, np.array([[0, 0], [1, 1]]), np.array([[0.0, 1.0], [0.6, 0.6]], dtype=np.float32))
    best = curve.best()
    assert (best.miou, best.threshold) == (1.0, 0.0)
    assert curve.at(0.6).miou < 1


def test_recall_of_a_region_by_void_outside_it() -> None:
    truth = np.array([[1, 1, 1, 0]], dtype=np.uint8)
    body = np.array([[False, True, True, False]])
    curve = ThresholdCurve(1)
    curve.update(np.where(body, truth, VOID), np.zeros((1, 4), int), np.array([[1, 0.9, 0.1, 0.5]], dtype=np.float32))
    assert curve.at(0.5).recall[1] == 0.5
    assert curve.at(0.5).unscored == [0]
