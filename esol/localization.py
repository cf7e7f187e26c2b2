"""Stage localize: class maps of all trained stages, scored as seeds and written as shards that mirror the input.

One shard is one unit of work, done by one rank: its maps go into a tar file of the same name, its pixel counts into
<shard>.counts.npz beside it, each written whole or not at all. What a killed job has finished is kept.
"""

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

from esol.config import LocalizeConfig
from esol.context import Context, Results
from esol.data.index import scan_shard, write_index
from esol.data.transforms import decode, decode_mask
from esol.errors import DataError
from esol.files import atomic_write
from esol.localize.class_maps import ClassMaps, class_maps
from esol.localize.seeds import best_class, seed
from esol.loop import Stopped
from esol.metrics import Score, ThresholdCurve
from esol.models.cam_net import CamNet
from esol.models.expansion import Expansion, Shrinkage
from esol.networks import trained_expansion, trained_net, trained_shrinkage
from esol.progress import progress
from esol.report import heat, paint, sheet
from shards.writer import write_mirror_shard

PAPER_THRESHOLD = 0.15  # IRN's evaluation threshold: reported beside the best one
PART = "part.png"  # optional member, 255 on an object's telling part: recall is then also given for the rest, the body


def localize(context: Context, folder: Path) -> Results:
    """Makes, scores and writes the maps of the split `data.score_split`."""
    engine, index = context.engine, context.index
    ordinals = index.split(context.config.data.score_split)
    shards = np.unique(index.shard_of[ordinals])
    nets = _trained(context)
    _discard_foreign(context, folder)
    if advice := advice_on_shards(len(shards), len(ordinals), engine.world_size):
        context.say(advice)
    mine = shards[engine.rank :: engine.world_size]
    total = int(np.isin(index.shard_of[ordinals], mine).sum())
    with progress("localize", total, "images of this process", engine.is_main) as advance:
        done = 0
        for shard in mine:
            members = ordinals[index.shard_of[ordinals] == shard]
            if not _finished(folder, index.shards[shard].name):
                _localize_shard(context, folder, int(shard), members, nets)
            done += len(members)
            advance(done, index.shards[shard].name)
            if context.stop:
                break
    if engine.any(bool(context.stop)):
        raise Stopped(f"{context.stop.name or 'a signal to another rank'}: localize stopped after whole shards")
    engine.barrier("the shards of all ranks")
    if not engine.is_main:
        return {}
    names = [index.shards[s].name for s in shards]
    records = [scan_shard(folder, name) for name in names]
    write_index(folder, index.classes, {context.config.data.score_split: range(len(ordinals))}, records)
    curves = _add_counts(folder, names, len(index.classes))
    results, thresholds = _results(curves, index.classes)
    _write_curves(context, folder, curves)
    draw(context, "localize", *nets, thresholds=thresholds)
    return results


def advice_on_shards(shards: int, samples: int, world_size: int) -> str:
    """What to say where processes outnumber shards, else nothing: a shard is the unit of work here."""
    if shards >= world_size:
        return ""
    return (
        f"localize: the split lies in {shards} shards, fewer than {world_size} processes: some have nothing to do. "
        f"To use all, create the set again with --samples-per-shard {max(1, samples // world_size)} or fewer"
    )


def _trained(context: Context) -> tuple[CamNet, Expansion | None, Shrinkage | None]:
    stages, device = context.config.stages, context.engine.device
    net = trained_net(context).to(device).eval()
    expansion = trained_expansion(context, net).to(device).eval() if "expand" in stages else None
    shrinkage = None
    if "shrink" in stages and expansion is not None:
        shrinkage = trained_shrinkage(context, expansion).to(device).eval()
    return net, expansion, shrinkage


def _discard_foreign(context: Context, folder: Path) -> None:
    """Removes what a run with other settings left in the folder."""
    mark = folder / "fingerprint.json"  # of the settings that the shards beside it were made with
    if context.engine.is_main:
        stamp = json.dumps({"fingerprint": context.fingerprint})
        if not mark.exists() or mark.read_text() != stamp:
            for path in (*folder.glob("shard-*"), folder / "index.json", folder / "curves.json"):
                path.unlink(missing_ok=True)
            atomic_write(mark, stamp)
    context.engine.barrier("the main rank to clear the folder of localize")


def _finished(folder: Path, name: str) -> bool:
    return (folder / name).exists() and (folder / f"{name}.counts.npz").exists()


def _localize_shard(context: Context, folder: Path, shard: int, ordinals: NDArray[np.int64], nets: Any) -> None:
    """One shard: maps of its samples in order, in batches of images of one size, then the two files."""
    reader, config = context.reader, context.config.localize
    curves: dict[str, ThresholdCurve] = {}
    samples: dict[int, dict[str, Any]] = {}
    try:
        images = {int(o): decode(reader.image(int(o)), reader.name(int(o))) for o in ordinals}
    except DataError as error:
        raise DataError(f"{error}; localize needs every sample of its split") from error
    for group in _same_size(images, config.batch):
        for ordinal, maps in zip(group, _maps(context, config, nets, [images[o] for o in group], group), strict=True):
            _count(context, curves, ordinal, maps)
            chosen = maps[config.write] if config.write in maps else maps[list(maps)[-1]]
            samples[ordinal] = {"__key__": str(context.index.keys[ordinal]), "maps.npz": _pack(chosen)}
    name = context.index.shards[shard].name
    counts = {key: curve.counts for key, curve in curves.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **counts)  # type: ignore[arg-type]
    write_mirror_shard(folder, name, (samples[int(o)] for o in ordinals))
    atomic_write(folder / f"{name}.counts.npz", buffer.getvalue())


def _same_size(images: dict[int, torch.Tensor], batch: int) -> Iterator[list[int]]:
    groups: dict[torch.Size, list[int]] = defaultdict(list)
    for ordinal, image in images.items():
        groups[image.shape].append(ordinal)
    for group in groups.values():
        for start in range(0, len(group), batch):
            yield group[start : start + batch]


def _maps(
    context: Context, config: LocalizeConfig, nets: Any, images: list[torch.Tensor], ordinals: list[int]
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
    if "mask.png" not in members or members["mask.png"][ordinal, 0] < 0:
        return
    name = reader.name(ordinal)
    truths = {"": decode_mask(reader.read(ordinal, "mask.png"), name)}
    if PART in members and members[PART][ordinal, 0] >= 0:
        truths["_body"] = np.where(decode_mask(reader.read(ordinal, PART), name) > 0, np.uint8(255), truths[""])
    for source, own in maps.items():
        winner, score = (t.cpu().numpy() for t in best_class(own.full, own.classes))
        for suffix, truth in truths.items():
            if truth.shape != score.shape:
                raise DataError(f"{name}: the mask is {truth.shape}, the image {score.shape} (height, width)")
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


def _add_counts(folder: Path, names: list[str], num_classes: int) -> dict[str, ThresholdCurve]:
    """The curves of the whole split: sums of whole numbers, so in any order."""
    curves: dict[str, ThresholdCurve] = {}
    for name in names:
        with np.load(folder / f"{name}.counts.npz", allow_pickle=False) as counts:
            for key in counts.files:
                curves.setdefault(key, ThresholdCurve(num_classes)).add(counts[key])
    return curves


def _results(curves: dict[str, ThresholdCurve], classes: tuple[str, ...]) -> tuple[Results, dict[str, float]]:
    """Flat results and the best threshold by source; *_at_cam: at the threshold that is best for the CAM."""
    results: Results = {}
    best = {source: curve.best() for source, curve in curves.items() if not source.endswith("_body")}
    for source, score in best.items():
        results |= _entries(f"{source}_", score)
        results |= _entries(f"{source}_at_cam_", curves[source].at(best["cam"].threshold))
        results |= _entries(f"{source}_at_{PAPER_THRESHOLD:g}_", curves[source].at(PAPER_THRESHOLD))
        results[f"{source}_threshold"] = score.threshold
        if f"{source}_body" in curves:
            results[f"{source}_body_recall"] = _foreground_recall(curves[f"{source}_body"].at(score.threshold))
            at_cam = curves[f"{source}_body"].at(best["cam"].threshold)
            results[f"{source}_at_cam_body_recall"] = _foreground_recall(at_cam)
        for name, iou in zip(("background", *classes), score.iou, strict=True):
            results[f"{source}_iou_{name}"] = 100 * float(iou)
    return results, {source: score.threshold for source, score in best.items()}


def _entries(prefix: str, score: Score) -> Results:
    values = {"miou": score.miou, "precision": score.mean_precision, "recall": score.mean_recall}
    return {prefix + name: 100 * value for name, value in values.items()}


def _foreground_recall(score: Score) -> float:
    return 100 * float(np.nanmean(score.recall[1:]))


def _write_curves(context: Context, folder: Path, curves: dict[str, ThresholdCurve]) -> None:
    table: dict[str, list[dict[str, float]]] = {}
    for source, curve in curves.items():
        table[source] = [{"threshold": s.threshold, **_entries("", s)} for s in curve.scores()]
        for step, row in enumerate(table[source]):
            values = {f"{source}_curve_{name}": row[name] for name in ("miou", "precision", "recall")}
            context.tracker.metrics(step, values)
    atomic_write(folder / "curves.json", json.dumps(table, indent=1))


def draw(
    context: Context,
    name: str,
    net: CamNet,
    expansion: Expansion | None,
    shrinkage: Shrinkage | None,
    thresholds: dict[str, float] | None = None,
) -> None:
    """pictures/<name>.png: the same images after each stage, maps of every trained stage, seeds of the last, truth."""
    index, reader, config = context.index, context.reader, context.config
    split = index.split(config.data.score_split)
    count = min(config.tracking.pictures, len(split))
    rows: list[tuple[str, list[Any]]] = []
    headings: list[str] = []
    for module in (net, expansion, shrinkage):
        if module is not None:
            module.eval()
    for ordinal in split[np.linspace(0, len(split) - 1, count).astype(int)].tolist():
        image = decode(reader.image(ordinal), reader.name(ordinal))
        maps = _maps(context, config.localize, (net, expansion, shrinkage), [image], [ordinal])[0]
        pixels = image.permute(1, 2, 0).numpy()
        last = list(maps)[-1]
        threshold = (thresholds or {}).get(last, PAPER_THRESHOLD)
        tiles = {"photo": pixels}
        for source, own in maps.items():
            tiles[source] = heat(pixels, best_class(own.full, own.classes)[1].cpu().numpy())
        tiles[f"seeds of {last} at {threshold:.2f}"] = paint(
            pixels, seed(maps[last].full, maps[last].classes, threshold).cpu().numpy()
        )
        if "mask.png" in index.members and index.members["mask.png"][ordinal, 0] >= 0:
            tiles["truth"] = paint(pixels, decode_mask(reader.read(ordinal, "mask.png"), reader.name(ordinal)))
        present = ", ".join(index.classes[c] for c in maps[last].classes.tolist())
        rows.append((f"{index.keys[ordinal]}: {present}", list(tiles.values())))
        headings = max(headings, list(tiles), key=len)
    if rows:
        path = context.run_dir / "pictures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        sheet(rows, headings).save(path)
        context.tracker.picture(path)
