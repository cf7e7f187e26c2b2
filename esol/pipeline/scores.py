"""What a stage has to say of its result: scores against the truth, and other numbers and words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from esol.base.errors import CheckpointError
from esol.config import Auto
from esol.ops.metrics import Score


@dataclass(frozen=True)
class Scores:
    """How good label maps are, by the truth, in percent; NaN where that cannot be measured on these photos.

    split: whose photos; threshold: that made the label maps of scores, "auto" where each photo has its own, None where
    none did; miou, precision, recall: means over background and classes; more: what else was measured of them all;
    classes: class -> measure ("iou", "precision", "recall") -> percent.
    """

    split: str
    miou: float
    precision: float
    recall: float
    threshold: float | Auto | None = None
    more: dict[str, float] = field(default_factory=dict)
    classes: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, score: Score, split: str, threshold: float | Auto | None = None, **more: float) -> Scores:
        """A Score in percent, without its classes."""
        miou, precision, recall = 100 * score.miou, 100 * score.mean_precision, 100 * score.mean_recall
        return cls(split, miou, precision, recall, threshold, more)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Scores:
        """What asdict and JSON made of one: null is NaN again."""
        numbers = {name: _number(tree[name]) for name in ("miou", "precision", "recall")}
        more = {name: _number(value) for name, value in tree["more"].items()}
        classes = {c: {m: _number(v) for m, v in own.items()} for c, own in tree["classes"].items()}
        split, threshold = tree["split"], tree["threshold"]
        if not isinstance(split, str) or not (threshold in (None, "auto") or isinstance(threshold, float)):
            raise TypeError(f"split = {split!r}, threshold = {threshold!r}")
        return cls(split, **numbers, threshold=threshold, more=more, classes=classes)


def by_class(score: Score, classes: tuple[str, ...], *measures: str) -> dict[str, dict[str, float]]:
    """Class, background first -> measure -> percent. measures: names of Score's fields."""
    return {
        name: {measure: 100 * float(getattr(score, measure)[i]) for measure in measures}
        for i, name in enumerate(("background", *classes))
    }


@dataclass
class Results:
    """What a stage came to. scores: of its label maps by name ("cam", "plain", "crf"); others: numbers and words.

    last: which of the scores is that of the label maps that were written, whose classes need no name before them.
    """

    scores: dict[str, Scores] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    last: str = ""

    def flat(self) -> dict[str, Any]:
        """All of it under names such as crf_miou, cam_iou_dog and iou_dog: for results.json, MLflow and the screen."""
        found: dict[str, Any] = {}
        for name, own in self.scores.items():
            found |= {f"{name}_miou": own.miou, f"{name}_precision": own.precision, f"{name}_recall": own.recall}
            found |= {f"{name}_{measure}": value for measure, value in own.more.items()}
            if isinstance(own.threshold, float):
                found[f"{name}_threshold"] = own.threshold
            prefix = "" if name == self.last else f"{name}_"
            for label, values in own.classes.items():
                found |= {f"{prefix}{measure}_{label}": value for measure, value in values.items()}
        return found | self.others

    def tree(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return {"scores": {name: asdict(own) for name, own in self.scores.items()}, "last": self.last}


def scores_from(tree: Mapping[str, Any], where: str) -> dict[str, Scores]:
    """The scores of a manifest; CheckpointError where they cannot be read."""
    try:
        return {name: Scores.from_tree(own) for name, own in tree["scores"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: its scores cannot be read ({error!r:.200})") from error


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
