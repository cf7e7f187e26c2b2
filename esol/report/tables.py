"""The numbers of a run as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esol.pipeline import records
from esol.pipeline.records import Manifest
from esol.pipeline.scores import Scores

_MEASURES = ("miou", "precision", "recall")
_SPOKEN = {"body_recall": "recall of the body", "miou": "mIoU"}


def results_table(run_dir: Path) -> str:
    """All numbers of a run as Markdown: the scores, then each kind of stage; EsolError where there is none."""
    found = records.finished(run_dir)
    lines = [*summary(found).splitlines(), *(f"\nout of date: {line}" for line in records.outdated(run_dir))]
    lines += ["", "| stage | metric | value |", "|---|---|---|"]
    lines += [
        f"| {stage} | {name} | {_text(value)} |"
        for stage, own in found.items()
        if own.makes not in ("maps", "masks", "predictions")
        for name, value in own.results.items()
    ]
    for own in found.values():
        if own.makes == "maps" and (columns := _by_source(own)):
            lines += ["", *_columns("seeds", columns), "", *verdicts(own.scores)]
    masks = {name: own.results for name, own in found.items() if own.makes == "masks" and _judged_or_scored(own)}
    if masks:
        lines += [
            "",
            *_columns("pseudo masks", masks),
            "",
            "crf: after the dense CRF; best: without it, at the threshold that is best here; judge ranks masks without",
            "any truth, by the photos' edges and labels; the highest is the best guess (docs/refine.md).",
        ]
    for own in found.values():
        if own.makes == "predictions" and own.last_scores:
            lines += ["", per_class(own.last_scores)]
    return "\n".join(lines)


def summary_rows(found: Mapping[str, Manifest]) -> list[tuple[str, Scores, str]]:
    """Every score of a run that stands by itself: of what, its scores, the initial weights that it stands on."""
    rows = []
    for name, own in found.items():
        for which, scores in own.scores.items():
            if (what := _spoken_of(name, own, which, scores)) is not None:
                rows.append((what, scores, own.results.get("initial_weights", "")))
    return rows


def summary(found: Mapping[str, Manifest]) -> str:
    """Every mIoU of a run with the split and the initial weights that it stands on; Markdown."""
    rows = summary_rows(found)
    lines = ["| what | split | mIoU | precision | recall | initial weights |", "|---|---|---|---|---|---|"]
    for what, scores, weights in rows:
        measures = " | ".join(_text(getattr(scores, name), ".2f") for name in _MEASURES)
        lines.append(f"| {what} | {scores.split} | {measures} | {weights} |")
    return "\n".join(lines) if rows else "nothing was scored: no split of the run has masks"


def _spoken_of(stage: str, own: Manifest, which: str, scores: Scores) -> str | None:
    """What a score is of, for people; None for one that stands beside another, at another threshold."""
    crf = {"plain": "", "crf": " + CRF"}
    if own.makes == "maps":
        return None if "_at_" in which else f"seeds of {which}, best threshold {_text(scores.threshold, '.2f')}"
    if which not in crf:
        return None
    if own.makes == "predictions":
        return f"DeepLab, learned from {own.results['masks']}{crf[which]}"
    return stage + ("" if scores.threshold is None else f" at threshold {scores.threshold}") + crf[which]


def _judged_or_scored(own: Manifest) -> bool:
    return bool(own.scores) or "judge" in own.results


def _by_source(own: Manifest) -> dict[str, dict[str, Any]]:
    """Source -> name -> number, of all that is known of its class maps."""
    columns: dict[str, dict[str, Any]] = {}
    for name, scores in own.scores.items():
        source, at, how = name.partition("_at_")
        prefix, column = f"at_{how}_" if at else "", columns.setdefault(source, {})
        column |= {prefix + measure: getattr(scores, measure) for measure in _MEASURES}
        column |= {prefix + measure: value for measure, value in scores.more.items()}
        column |= {} if at else {"threshold": scores.threshold}
        column |= {f"iou_{label}": values["iou"] for label, values in scores.classes.items()}
    for name, number in own.results.items():
        if name.endswith("_judge"):
            columns.setdefault(name.removesuffix("_judge"), {})["judge"] = number
    return columns


def _columns(what: str, columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table with a column for each name."""
    lines = [f"| {what} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for key in dict.fromkeys(key for own in columns.values() for key in own):
        row = (_text(own[key]) if key in own else "" for own in columns.values())
        lines.append(f"| {key} | " + " | ".join(row) + " |")
    return lines


def per_class(scores: Scores) -> str:
    """IoU, precision and recall of every class; Markdown."""
    lines = ["| class | IoU | precision | recall |", "|---|---|---|---|"]
    for label, values in scores.classes.items():
        if values:  # a class that the truth lacks has none
            cells = (_text(values.get(name), ".2f") for name in ("iou", "precision", "recall"))
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _text(value: float | str | None, form: str = ".4g") -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return "-" if math.isnan(value) else format(value, form)


def verdicts(scores: Mapping[str, Scores]) -> list[str]:
    """One line each on whether Expansion raised recall and Shrinkage precision, whichever way it went."""
    body = "cam" in scores and "body_recall" in scores["cam"].more
    lines = []
    start = "decide" if "decide" in scores else "cam"
    for source, before, aim in (
        ("expand", start, "body_recall" if body else "recall"),
        ("shrink", "expand", "precision"),
    ):
        if not {source, before} <= scores.keys():
            continue
        parts, done = [], False
        for name, suffix, where in (
            (aim, "_at_cam", "at the CAM's threshold"),
            ("miou", "", "at the best threshold of each"),
        ):
            old, new = (_value(scores[which + suffix], name) for which in (before, source))
            done = new > old if name == aim else done
            way = "up" if new > old else "down" if new < old else "unchanged"
            parts.append((old, new, f"{_SPOKEN.get(name, name)} {way} {where} ({old:.1f} -> {new:.1f})"))
        if any(math.isnan(value) for old, new, _ in parts for value in (old, new)):
            continue  # not to be measured on these photos
        said = "does what it is for" if done else "does not do what it is for"
        lines.append(f"{source} against {before}: {'; '.join(text for *_, text in parts)}. It {said} here.")
    return lines


def _value(scores: Scores, name: str) -> float:
    return float(getattr(scores, name) if name in _MEASURES else scores.more[name])
