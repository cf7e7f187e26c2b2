"""Stage localize: class maps of all trained stages, scored as seeds and written as shards that mirror the input."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from esol.base.files import atomic_write
from esol.base.schema import finite
from esol.config import BackboneConfig, LocalizeConfig
from esol.data.transforms import decode_mask
from esol.networks import CamNets, initial_weights, trained_cam
from esol.ops.class_maps import SOURCES, ClassMaps, class_maps
from esol.ops.metrics import VOID, Score, ThresholdCurve
from esol.ops.seeds import best_class, seed
from esol.pipeline.context import Context, Results
from esol.pipeline.inference import Members, Tally, mask_splits, over_shards, photo, pictured, truth_of
from esol.pipeline.judging import add_seeds, all_ranks, map_source, sampled_photos
from esol.report.judge import Evidence
from esol.report.pictures import heat, paint, sheet

PAPER_THRESHOLD = 0.15  # IRN's evaluation threshold: reported beside the best one
PART = "part.png"  # optional member, 255 on an object's telling part: recall is then also given for the rest, the body


def localize(context: Context, folder: Path) -> Results:
    """Makes and writes the maps of data.mask_split and data.score_split, and scores those of the latter."""
    nets = trained_cam(context.config, len(context.index.classes), context.engine.device)
    sources = tuple(source for source, net in zip(SOURCES, nets, strict=True) if net is not None)
    judged = _judge(context, nets) if len(sources) > 1 and context.config.localize.write == "auto" else {}
    written = map_source({name: own["judge"] for name, own in judged.items()}, context.config.localize.write, sources)

    def work(ordinals: NDArray[np.int64], tally: Tally) -> Iterator[tuple[int, Members]]:
        config = context.config.localize
        curves: dict[str, ThresholdCurve] = {}
        images = {int(o): photo(context, int(o)) for o in ordinals}
        for group in _same_size(images, config.batch):
            found = _maps(context, config, nets, [images[o] for o in group], group)
            for ordinal, maps in zip(group, found, strict=True):
                _count(context, curves, ordinal, maps)
                yield ordinal, {"maps.npz": _pack(maps[written])}
        tally.update({source: curve.counts for source, curve in curves.items()})

    tally = over_shards(context, "localize", folder, mask_splits(context), work)
    if not context.engine.is_main:
        return {}
    curves = {source: ThresholdCurve(len(context.index.classes)) for source in tally if tally[source].any()}
    for source, curve in curves.items():
        curve.add(tally[source])
    results, thresholds = _results(curves, context.index.classes) if curves else ({}, {})
    results |= {"write": written} | {f"{name}_judge": own["judge"] for name, own in judged.items()}
    write_curves(context, folder, curves)
    draw(context, "localize", nets, thresholds=thresholds)
    return results | stands_on(context.config.data.score_split, context.config.model)


def _judge(context: Context, nets: CamNets) -> dict[str, dict[str, float]]:
    """What the judge finds in the maps of every stage, on a sample of the photos, on every rank; a collective."""
    evidence: dict[str, Evidence] = {}
    for ordinal in sampled_photos(context)[context.engine.rank :: context.engine.world_size]:
        maps = _maps(context, context.config.localize, nets, [photo(context, ordinal)], [ordinal])[0]
        add_seeds(context, evidence, ordinal, maps)
    return {name: own.numbers(context.index.classes, name) for name, own in all_ranks(context, evidence).items()}


def _same_size(images: dict[int, torch.Tensor], batch: int) -> Iterator[list[int]]:
    groups: dict[torch.Size, list[int]] = defaultdict(list)
    for ordinal, image in images.items():
        groups[image.shape].append(ordinal)
    for group in groups.values():
        for start in range(0, len(group), batch):
            yield group[start : start + batch]


def _maps(
    context: Context, config: LocalizeConfig, nets: CamNets, images: list[torch.Tensor], ordinals: list[int]
) -> list[dict[str, ClassMaps]]:
    device = context.engine.device
    labels = torch.from_numpy(np.stack([context.reader.labels(o) for o in ordinals]))
    with context.engine.autocast():
        return class_maps(
            torch.stack(images).to(device),
            labels.to(device),
            *nets,
            scales=config.scales,
            flip=config.flip,
            long_side=config.long_side,
        )


def _count(context: Context, curves: dict[str, ThresholdCurve], ordinal: int, maps: dict[str, ClassMaps]) -> None:
    """Adds the image to the curve of every source, and to that of the body where the shard tells parts from bodies."""
    members, reader = context.index.members, context.reader
    whole = truth_of(context, ordinal, tuple(maps["cam"].full.shape[1:]))
    if whole is None:
        return
    truths = {"": whole}
    if PART in members and members[PART][ordinal, 0] >= 0:
        part = decode_mask(reader.read(ordinal, PART), reader.name(ordinal))
        truths["_body"] = np.where(part > 0, np.uint8(VOID), whole)
    for source, own in maps.items():
        winner, score = (t.cpu().numpy() for t in best_class(own.full, own.classes))
        for suffix, truth in truths.items():
            curve = curves.setdefault(source + suffix, ThresholdCurve(len(context.index.classes)))
            curve.update(truth, winner, score)


def _pack(maps: ClassMaps) -> bytes:
    """maps.npz: classes int64 (n,), stride 4 float16 (n, H/4, W/4), full uint8 (n, H, W) in 1/255."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        classes=maps.classes.cpu().numpy(),
        stride4=maps.low.cpu().numpy().astype(np.float16),
        full=(maps.full * 255).round().to(torch.uint8).cpu().numpy(),
    )
    return buffer.getvalue()


def _results(curves: dict[str, ThresholdCurve], classes: tuple[str, ...]) -> tuple[Results, dict[str, float]]:
    """Flat results and the best threshold by source; *_at_cam: at the threshold that is best for the CAM."""
    results: Results = {}
    best = {source: curve.best() for source, curve in curves.items() if not source.endswith("_body")}
    for source, score in best.items():
        results |= entries(f"{source}_", score)
        results |= entries(f"{source}_at_cam_", curves[source].at(best["cam"].threshold))
        results |= entries(f"{source}_at_{PAPER_THRESHOLD:g}_", curves[source].at(PAPER_THRESHOLD))
        results[f"{source}_threshold"] = score.threshold
        if f"{source}_body" in curves:
            results[f"{source}_body_recall"] = _foreground_recall(curves[f"{source}_body"].at(score.threshold))
            at_cam = curves[f"{source}_body"].at(best["cam"].threshold)
            results[f"{source}_at_cam_body_recall"] = _foreground_recall(at_cam)
        for name, iou in zip(("background", *classes), score.iou, strict=True):
            results[f"{source}_iou_{name}"] = 100 * float(iou)
    return results, {source: score.threshold for source, score in best.items()}


def stands_on(split: str, model: BackboneConfig) -> Results:
    """What is printed beside a score."""
    return {"split": split, "initial_weights": initial_weights(model)}


def entries(prefix: str, score: Score) -> Results:
    """mIoU, precision and recall in percent."""
    values = {"miou": score.miou, "precision": score.mean_precision, "recall": score.mean_recall}
    return {prefix + name: 100 * value for name, value in values.items()}


def _foreground_recall(score: Score) -> float:
    return 100 * float(np.nanmean(score.recall[1:]))


def write_curves(context: Context, folder: Path, curves: dict[str, ThresholdCurve]) -> None:
    """curves.json, and the same points for MLflow."""
    table: dict[str, list[dict[str, float]]] = {}
    for source, curve in curves.items():
        table[source] = [{"threshold": s.threshold, **entries("", s)} for s in curve.scores()]
        for step, row in enumerate(table[source]):
            values = {f"{source}_curve_{name}": row[name] for name in ("miou", "precision", "recall")}
            context.tracker.metrics(step, values)
    atomic_write(folder / "curves.json", json.dumps(finite(table), indent=1, allow_nan=False))


def draw(context: Context, name: str, nets: CamNets, thresholds: dict[str, float] | None = None) -> None:
    """pictures/<name>.png: the same images after each stage, maps of every trained stage, seeds of the last, truth."""
    index, config = context.index, context.config
    rows: list[tuple[str, list[Any]]] = []
    headings: list[str] = []
    for ordinal in pictured(context):
        image = photo(context, ordinal)
        maps = _maps(context, config.localize, nets, [image], [ordinal])[0]
        pixels = image.permute(1, 2, 0).numpy()
        last = list(maps)[-1]
        threshold = (thresholds or {}).get(last, PAPER_THRESHOLD)
        tiles = {"photo": pixels}
        for source, own in maps.items():
            tiles[source] = heat(pixels, best_class(own.full, own.classes)[1].cpu().numpy())
        tiles[f"seeds of {last} at {threshold:.2f}"] = paint(
            pixels, seed(maps[last].full, maps[last].classes, threshold).cpu().numpy()
        )
        if (truth := truth_of(context, ordinal, pixels.shape[:2])) is not None:
            tiles["truth"] = paint(pixels, truth)
        present = ", ".join(index.classes[c] for c in maps[last].classes.tolist())
        rows.append((f"{index.keys[ordinal]}: {present}", list(tiles.values())))
        headings = max(headings, list(tiles), key=len)
    save_sheet(context, name, rows, headings)


def save_sheet(context: Context, name: str, rows: list[tuple[str, list[Any]]], headings: list[str]) -> None:
    """pictures/<name>.png, in MLflow as well."""
    if rows:
        path = context.run_dir / "pictures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        sheet(rows, headings).save(path)
        context.tracker.picture(path)
