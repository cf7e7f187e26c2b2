"""Pictures and tables of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from esol.config import MASK_STAGES
from esol.palette import voc_palette
from esol.pipeline import store

SOURCES = ("cam", "decide", "expand", "shrink")
_SPOKEN = {"body_recall": "recall of the body", "miou": "mIoU"}
TILE = 200  # pixels, long side of a picture's tile
_HEAT = np.array([[12, 7, 60], [86, 15, 109], [187, 55, 84], [249, 142, 8], [252, 255, 164]], np.float32)

Pixels = NDArray[np.uint8]


def heat(image: Pixels, values: NDArray[np.floating]) -> Pixels:
    """A class map (H, W) in 0..1 over its photo (H, W, 3)."""
    place = np.clip(np.nan_to_num(values), 0, 1).astype(np.float32) * (len(_HEAT) - 1)
    low = np.minimum(place.astype(int), len(_HEAT) - 2)
    colours = _HEAT[low] + (_HEAT[low + 1] - _HEAT[low]) * (place - low)[..., None]
    return (0.35 * image + 0.65 * colours).astype(np.uint8)


def paint(image: Pixels, mask: NDArray[np.integer]) -> Pixels:
    """A label map (H, W), 0 background and 255 void, over its photo (H, W, 3)."""
    colours = voc_palette()[mask]
    blend = (0.4 * image + 0.6 * colours).astype(np.uint8)
    return np.where((mask == 0)[..., None], (0.75 * image).astype(np.uint8), blend)


def sheet(rows: Sequence[tuple[str, Sequence[Pixels]]], headings: Sequence[str]) -> Image.Image:
    """Rows of equally many pictures, each row with a caption, under column headings."""
    if not rows:
        raise ValueError("a sheet needs at least one row")
    columns, margin, line = len(headings), 6, 16
    tiles = [[_tile(picture) for picture in pictures] for _, pictures in rows]
    heights = [max(tile.height for tile in row) for row in tiles]
    size = (columns * (TILE + margin) + margin, line + sum(h + line + margin for h in heights) + margin)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, heading in enumerate(headings):
        draw.text((margin + column * (TILE + margin), 3), heading, fill="black")
    top = line
    for (caption, _), row, height in zip(rows, tiles, heights, strict=True):
        for column, tile in enumerate(row):
            canvas.paste(tile, (margin + column * (TILE + margin), top + margin))
        draw.text((margin, top + margin + height + 2), caption, fill="gray")
        top += height + line + margin
    return canvas


def _tile(pixels: Pixels) -> Image.Image:
    image = Image.fromarray(pixels)
    scale = TILE / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


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
