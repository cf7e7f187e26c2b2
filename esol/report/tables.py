"""The numbers of a run as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esol.config import MASK_STAGES
from esol.ops.class_maps import SOURCES
from esol.pipeline import store

_SPOKEN = {"body_recall": "recall of the body", "miou": "mIoU"}


def results_table(run_dir: Path) -> str:
    """All numbers of a run as Markdown: the scores, then each kind of stage; EsolError where there is none."""
    results = store.results(run_dir)
    lines = [*summary(results).splitlines(), *(f"\nout of date: {line}" for line in store.outdated(run_dir))]
    training = {name: own for name, own in results.items() if name not in ("localize", "evaluate", *MASK_STAGES)}
    lines += ["", "| stage | metric | value |", "|---|---|---|"]
    lines += [
        f"| {stage} | {name} | {_text(value)} |" for stage, own in training.items() for name, value in own.items()
    ]
    seeds = results.get("localize", {})
    sources = [source for source in SOURCES if seeds.keys() & {f"{source}_miou", f"{source}_judge"}]
    if sources:
        lines += ["", "| seeds | " + " | ".join(sources) + " |", "|---|" + "---|" * len(sources)]
        for name in (key.removeprefix("cam_") for key in seeds if key.startswith("cam_")):
            lines.append(f"| {name} | " + " | ".join(_text(seeds.get(f"{source}_{name}")) for source in sources) + " |")
        lines += ["", *verdicts(seeds)]
    masks = {name: results[name] for name in MASK_STAGES if results.get(name, {}).keys() & {"plain_miou", "judge"}}
    if masks:
        keys = list(dict.fromkeys(key for own in masks.values() for key in own))
        lines += ["", "| pseudo masks | " + " | ".join(masks) + " |", "|---|" + "---|" * len(masks)]
        for key in keys:
            row = (_text(own[key]) if key in own else "" for own in masks.values())
            lines.append(f"| {key} | " + " | ".join(row) + " |")
        lines += [
            "",
            "crf: after the dense CRF; best: without it, at the threshold that is best here; judge ranks masks without",
            "any truth, by the photos' edges and labels; the highest is the best guess (docs/refine.md).",
        ]
    if "plain_miou" in results.get("evaluate", {}):
        lines += ["", per_class(results["evaluate"])]
    return "\n".join(lines)


def summary(results: dict[str, dict[str, Any]]) -> str:
    """Every mIoU of a run with the split and the initial weights that it stands on; Markdown."""
    rows = []
    seeds = results.get("localize", {})
    for source in (source for source in SOURCES if f"{source}_miou" in seeds):
        what = f"seeds of {source}, best threshold {_text(seeds[f'{source}_threshold'], '.2f')}"
        rows.append((what, seeds, f"{source}_"))
    for name in MASK_STAGES:
        own = results.get(name, {})
        at = f" at threshold {own['threshold']}" if "threshold" in own else ""
        for prefix, how in (("plain_", ""), ("crf_", " + CRF")):
            if f"{prefix}miou" in own:
                rows.append((f"{name}{at}{how}", own, prefix))
    own = results.get("evaluate", {})
    for prefix, how in (("plain_", ""), ("crf_", " + CRF")):
        if f"{prefix}miou" in own:
            rows.append((f"DeepLab, learned from {own['masks']}{how}", own, prefix))
    lines = ["| what | split | mIoU | precision | recall | initial weights |", "|---|---|---|---|---|---|"]
    for what, own, prefix in rows:
        measures = " | ".join(_text(own[prefix + name], ".2f") for name in ("miou", "precision", "recall"))
        lines.append(f"| {what} | {own.get('split', '')} | {measures} | {own.get('initial_weights', '')} |")
    return "\n".join(lines) if rows else "nothing was scored: no split of the run has masks"


def per_class(scores: dict[str, Any]) -> str:
    """IoU, precision and recall of every class in evaluate's results, the last step's; Markdown."""
    names = ("iou", "precision", "recall")
    classes = dict.fromkeys(key.split("_", 1)[1] for key in scores if key.startswith(("iou_", "recall_")))
    lines = ["| class | IoU | precision | recall |", "|---|---|---|---|"]
    for label in classes:
        values = (scores.get(f"{name}_{label}") for name in names)
        lines.append(f"| {label} | " + " | ".join(_text(value, ".2f") for value in values) + " |")
    return "\n".join(lines)


def _text(value: float | str | None, form: str = ".4g") -> str:
    return "-" if value is None else value if isinstance(value, str) else format(value, form)


def verdicts(seeds: dict[str, Any]) -> list[str]:
    """One line each on whether Expansion raised recall and Shrinkage precision, whichever way it went."""
    recall = "body_recall" if "cam_body_recall" in seeds else "recall"
    lines = []
    start = "decide" if "decide_miou" in seeds else "cam"
    for source, before, aim in (("expand", start, recall), ("shrink", "expand", "precision")):
        if f"{source}_miou" not in seeds:
            continue
        keys = (f"at_cam_{aim}", "miou")
        if None in (seeds[f"{which}_{key}"] for which in (before, source) for key in keys):
            continue  # not to be measured on these photos
        parts = []
        for name, where in ((aim, "at the CAM's threshold"), ("miou", "at the best threshold of each")):
            key = f"at_cam_{name}" if name == aim else name
            old, new = seeds[f"{before}_{key}"], seeds[f"{source}_{key}"]
            way = "up" if new > old else "down" if new < old else "unchanged"
            parts.append(f"{_SPOKEN.get(name, name)} {way} {where} ({old:.1f} -> {new:.1f})")
        key = f"at_cam_{aim}"
        done = (
            "does what it is for"
            if seeds[f"{source}_{key}"] > seeds[f"{before}_{key}"]
            else "does not do what it is for"
        )
        lines.append(f"{source} against {before}: {'; '.join(parts)}. It {done} here.")
    return lines
