"""The numbers of a run as tables."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esol.base.strangers import markdown
from esol.pipeline import records
from esol.pipeline.masks import highest
from esol.pipeline.records import Manifest
from esol.pipeline.scores import Scores

_MEASURES = ("miou", "precision", "recall")
_SPOKEN = {"body_recall": "recall of the body", "miou": "mIoU"}


@dataclass(frozen=True)
class StageRow:
    """A finished stage in a line: seconds, the judge's number, mIoU of what it wrote, None where there is none."""

    name: str
    seconds: float
    judge: float | None
    miou: float | None
    remark: str


def stage_rows(found: Mapping[str, Manifest]) -> list[StageRow]:
    """The stages of a run, in order."""
    return [_row(name, own, name == best_masks(found)) for name, own in found.items()]


def _row(name: str, own: Manifest, best: bool) -> StageRow:
    results, judge, remark = own.results, own.results.get("judge"), ""
    if own.makes == "maps":
        judge = results.get(f"{results.get('write')}_judge")
        remark = f"hands on the maps of {markdown(str(results.get('write')))}"
    elif own.makes in ("masks", "predictions"):
        parts = ["the judge's choice"] if best else []
        parts += [f"{results['lost']:.0f} % of the labels lost"] if results.get("lost") else []
        parts += [f"learned from {markdown(results['masks'])}"] if "masks" in results else []
        remark = "; ".join(parts)
    elif isinstance(results.get("loss"), float):
        remark = f"loss {results['loss']:.3g}"
    return StageRow(
        name, results.get("seconds") or 0.0, judge, own.last_scores.miou if own.last_scores else None, remark
    )


def headline(found: Mapping[str, Manifest]) -> dict[str, float]:
    """The numbers by which runs are compared, those that there are: mIoU of the CAM, of the maps, of the judge's masks
    and of DeepLab, what the judge says of the latter two, the labels that the masks lost, minutes."""
    numbers: dict[str, float | None] = {"minutes": sum(row.seconds for row in stage_rows(found)) / 60}
    for name, own in found.items():
        miou = own.last_scores.miou if own.last_scores else None
        if own.makes == "maps":
            written = {"cam_miou": "cam", "maps_miou": own.results.get("write")}
            numbers |= {short: own.scores[source].miou for short, source in written.items() if source in own.scores}
        elif name == best_masks(found) or own.makes == "predictions":
            kind = "masks" if own.makes == "masks" else "predictions"
            numbers |= {f"{kind}_miou": miou, f"{kind}_judge": own.results.get("judge")}
            numbers |= {f"{kind}_labels_lost": own.results.get("lost")} if own.makes == "masks" else {}
    return {name: float(value) for name, value in numbers.items() if isinstance(value, (int, float))}


def best_masks(found: Mapping[str, Manifest]) -> str:
    """The mask stage with the highest judge, "" where there is none."""
    judged = {n: own.results.get("judge") for n, own in found.items() if own.makes == "masks"}
    return highest({name: judge for name, judge in judged.items() if judge is not None})


def short_report(run_dir: Path) -> str:
    """A line for each stage, in Markdown, and what to look at; EsolError where no stage has finished."""
    found = records.finished(run_dir)
    lines = ["| stage | seconds | judge | mIoU | |", "|---|---|---|---|---|"]
    for row in stage_rows(found):
        numbers = ("" if value is None else _text(value, ".2f") for value in (row.judge, row.miou))
        lines.append(f"| {row.name} | {row.seconds:.0f} | {' | '.join(numbers)} | {row.remark} |")
    total = sum(row.seconds for row in stage_rows(found))
    lines += ["", f"{total / 60:.1f} minutes in all"]
    if best := best_masks(found):
        others = [name for name, own in found.items() if own.makes == "masks" and name != best]
        against = f" before {', '.join(others)}" if others else ""
        lines.append(f"the judge, which needs no drawn masks, takes {best}{against}: {run_dir / best}")
    lines += [f"out of date: {line}" for line in records.outdated(run_dir)]
    return "\n".join(lines)


def aligned(text: str) -> str:
    """Markdown with its tables as columns of plain text, numbers to the right."""
    lines, block = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            block.append([re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells])
            continue
        lines += _columns_of(block)
        block = []
        lines.append(line)
    return "\n".join(lines[:-1])


def _columns_of(block: list[list[str]]) -> list[str]:
    rows = [cells for cells in block if not all(set(cell) <= {"-"} and cell for cell in cells)]
    if not rows:
        return []
    count = max(map(len, rows))
    rows = [cells + [""] * (count - len(cells)) for cells in rows]
    widths = [max(len(row[c]) for row in rows) for c in range(count)]
    right = [all(_is_number(row[c]) for row in rows[1:]) and any(row[c] for row in rows[1:]) for c in range(count)]
    return [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    ]


def _is_number(cell: str) -> bool:
    try:
        float(cell or "0")
    except ValueError:
        return cell == "-"
    return True


def results_table(run_dir: Path) -> str:
    """All numbers of a run as Markdown: the scores, then each kind of stage; EsolError where there is none."""
    found = records.finished(run_dir)
    lines = [*summary(found).splitlines(), *(f"\nout of date: {line}" for line in records.outdated(run_dir))]
    lines += ["", "| stage | metric | value |", "|---|---|---|"]
    lines += [
        f"| {stage} | {markdown(name)} | {_text(value)} |"
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
        lines.append(f"| {what} | {markdown(scores.split)} | {measures} | {markdown(weights)} |")
    return "\n".join(lines) if rows else "nothing was scored: no split of the run has masks"


def _spoken_of(stage: str, own: Manifest, which: str, scores: Scores) -> str | None:
    """What a score is of, for people; None for one that stands beside another, at another threshold."""
    crf = {"plain": "", "crf": " + CRF"}
    if own.makes == "maps":
        return (
            None if "_at_" in which else f"seeds of {markdown(which)}, best threshold {_text(scores.threshold, '.2f')}"
        )
    if which not in crf:
        return None
    if own.makes == "predictions":
        return f"DeepLab, learned from {markdown(own.results.get('masks', '?'))}{crf[which]}"
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
    lines = [f"| {what} | " + " | ".join(map(markdown, columns)) + " |", "|---|" + "---|" * len(columns)]
    for key in dict.fromkeys(key for own in columns.values() for key in own):
        row = (_text(own[key]) if key in own else "" for own in columns.values())
        lines.append(f"| {markdown(key)} | " + " | ".join(row) + " |")
    return lines


def per_class(scores: Scores) -> str:
    """IoU, precision and recall of every class; Markdown."""
    lines = ["| class | IoU | precision | recall |", "|---|---|---|---|"]
    for label, values in scores.classes.items():
        if values:  # a class that the truth lacks has none
            cells = (_text(values.get(name), ".2f") for name in ("iou", "precision", "recall"))
            lines.append(f"| {markdown(label)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _text(value: float | str | None, form: str = ".4g") -> str:
    if value is None or isinstance(value, str):
        return markdown(value or "-")
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
        if not {source, before, f"{source}_at_cam", f"{before}_at_cam"} <= scores.keys():
            continue
        parts = []
        for name, suffix, where in (
            (aim, "_at_cam", "at the CAM's threshold"),
            ("miou", "", "at the best threshold of each"),
        ):
            old, new = (_value(scores[which + suffix], name) for which in (before, source))
            way = "up" if new > old else "down" if new < old else "unchanged"
            parts.append((old, new, f"{_SPOKEN.get(name, name)} {way} {where} ({old:.1f} -> {new:.1f})"))
        if any(math.isnan(value) for old, new, _ in parts for value in (old, new)):
            continue  # not to be measured on these photos
        lines.append(f"{source} against {before}: {'; '.join(text for *_, text in parts)}.")
    return lines


def _value(scores: Scores, name: str) -> float:
    return float(getattr(scores, name) if name in _MEASURES else scores.more.get(name, math.nan))
