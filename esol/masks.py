"""Stages seed_masks, psa_masks and irn_masks: pseudo masks, scored with and without the dense CRF."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esol.base.errors import DataError
from esol.config import MaskConfig
from esol.data.transforms import decode_gray
from esol.localization import entries, save_sheet, stands_on, write_curves
from esol.models import affinity_net, irn_net
from esol.models.regrid import on_grid
from esol.networks import trained_affinity_net, trained_irn_net
from esol.ops.metrics import VOID, Score, ThresholdCurve, confusion_matrix, score
from esol.ops.pseudo_labels import irn_scores, psa_scores, pseudo_mask
from esol.ops.saliency import saliency_channels, saliency_labels, spectral_residual
from esol.ops.seeds import best_class
from esol.pipeline.context import Context, Results
from esol.pipeline.inference import Members, StageShards, Tally, mask_splits, over_shards, photo, pictured, truth_of
from esol.report.judge import Evidence, Label
from esol.report.pictures import heat, paint
from shards.samples import encode_mask

Scores = Callable[[Tensor, dict[str, NDArray[np.generic]]], Tensor]


def seed_masks(context: Context, folder: Path) -> Results:
    """The class maps themselves."""

    def scores(image: Tensor, maps: dict[str, NDArray[np.generic]]) -> Tensor:
        return torch.from_numpy(maps["full"]).to(image.device).float() / 255

    return _masks(context, "seed_masks", context.config.seed_masks, folder, scores)


def psa_masks(context: Context, folder: Path) -> Results:
    """The class maps after a walk on AffinityNet's affinities."""
    config, device = context.config.psa_masks, context.engine.device
    net = trained_affinity_net(context.config).to(device).eval()

    def scores(image: Tensor, maps: dict[str, NDArray[np.generic]]) -> Tensor:
        with context.engine.autocast():
            features = net(on_grid(image, affinity_net.STRIDE))[0]
        low = torch.from_numpy(maps["stride4"]).to(device)
        return psa_scores(low, features.float(), (image.shape[1], image.shape[2]), config)

    return _masks(context, "psa_masks", config, folder, scores)


def irn_masks(context: Context, folder: Path) -> Results:
    """The class maps after a walk that boundaries hold up; the boundary is the mean over the image and its mirror."""
    config, device = context.config.irn_masks, context.engine.device
    net = trained_irn_net(context.config).to(device).eval()

    def scores(image: Tensor, maps: dict[str, NDArray[np.generic]]) -> Tensor:
        inputs = on_grid(image, irn_net.STRIDE)
        with context.engine.autocast():
            logits = net(torch.cat((inputs, inputs.flip(3))))[0][:, 0].float()
        edge = ((logits[0] + logits[1].flip(1)) / 2).sigmoid()
        low = torch.from_numpy(maps["stride4"]).to(device)
        return irn_scores(low, edge, (image.shape[1], image.shape[2]), config)

    return _masks(context, "irn_masks", config, folder, scores)


@dataclass(frozen=True)
class _Made:
    """Of one sample: photo, classes, scores, label maps without and with CRF, and the classes that the walk lost."""

    image: Tensor
    classes: Tensor
    scores: Tensor
    plain: Label
    refined: Label
    seeds: Label
    lost: list[int]


@torch.no_grad()
def _masks(context: Context, name: str, config: MaskConfig, folder: Path, scores: Scores) -> Results:
    maps, num_labels = StageShards(context, "localize"), len(context.index.classes) + 1

    def work(ordinals: NDArray[np.int64], tally: Tally) -> Iterator[tuple[int, Members]]:
        curve, evidence = ThresholdCurve(num_labels - 1), Evidence.empty(num_labels - 1)
        tally |= {key: np.zeros((num_labels, num_labels), np.int64) for key in ("plain", "crf")}
        for ordinal in map(int, ordinals):
            made = _one(context, maps, ordinal, config, scores)
            evidence.add(
                made.image.cpu().numpy(), made.refined, made.classes.tolist(), lost=made.lost, seeds=made.seeds
            )
            if (truth := truth_of(context, ordinal, made.plain.shape)) is not None:
                winner, best = (t.cpu().numpy() for t in best_class(made.scores, made.classes))
                curve.update(truth, winner, best)
                for key, label in (("plain", made.plain), ("crf", made.refined)):
                    said = np.where(label == VOID, 0, label)  # void counts as background here
                    tally[key] += confusion_matrix(truth, said, num_labels)
            yield ordinal, {"mask.png": encode_mask(made.refined)}
        tally |= {"curve": curve.counts} | evidence.tally()

    tally = over_shards(context, name, folder, mask_splits(context), work)
    if not context.engine.is_main:
        return {}
    _draw(context, name, maps, config, scores)
    results = _results(context, config, folder, tally) if tally["plain"].any() else {}
    return results | Evidence.of(tally).numbers(context.index.classes, name)


def _one(context: Context, maps: StageShards, ordinal: int, config: MaskConfig, scores: Scores) -> _Made:
    device = context.engine.device
    image = photo(context, ordinal).to(device)
    arrays = maps.arrays(ordinal, "maps.npz")
    classes = torch.from_numpy(arrays["classes"]).to(device)
    full = torch.from_numpy(arrays["full"]).to(device).float() / 255
    found = scores(image, arrays)
    saliency, labels, channels = _saliency(context, ordinal, image), None, None
    if saliency is not None:
        cue = context.config.saliency
        labels = saliency_labels(found, saliency, floor=cue.floor, conflict=cue.conflict)
        channels = saliency_channels(found, saliency, floor=cue.floor)
    plain, refined = pseudo_mask(image, found, classes, config, labels, channels)
    lost = [c for c in classes.tolist() if not bool((refined == c + 1).any())]
    own = context.config.seed_masks
    if not lost:
        own = replace(own, crf=replace(own.crf, iterations=0))  # nobody will look at the seeds' edges
    seeds, sharp = pseudo_mask(image, full, classes, own)
    if saliency is None:
        refined = stand_in(refined, sharp, lost)
    return _Made(image, classes, found, plain.cpu().numpy(), refined.cpu().numpy(), seeds.cpu().numpy(), lost)


def stand_in(mask: Tensor, seeds: Tensor, lost: list[int]) -> Tensor:
    """The mask (H, W) with the seeds' pixels of the lost classes in its background.

    A photo's label says that the class is there, so that a mask without it is known to be wrong.
    """
    wanted = torch.tensor([c + 1 for c in lost], dtype=seeds.dtype, device=seeds.device)
    return torch.where(torch.isin(seeds, wanted) & (mask == 0), seeds, mask)


def _saliency(context: Context, ordinal: int, image: Tensor) -> Tensor | None:
    """The sample's saliency map (H, W) in 0..1, if the config wants one."""
    config, reader = context.config.saliency, context.reader
    if config.source == "none":
        return None
    if config.source == "spectral-residual":
        return spectral_residual(image)
    name = reader.name(ordinal)
    if config.source == "shards":
        data = reader.read(ordinal, "saliency.png")
    else:
        path = Path(config.folder, f"{context.index.keys[ordinal]}.png")
        if not path.resolve().is_relative_to(Path(config.folder).resolve()):
            raise DataError(f"{name}: its key leads out of saliency.folder")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{name}: saliency map {path} cannot be read ({error.strerror})") from error
    values = decode_gray(data, f"{name}, saliency")
    if values.shape != tuple(image.shape[1:]):
        raise DataError(f"{name}: the saliency map is {values.shape}, the image {tuple(image.shape[1:])}")
    return torch.from_numpy(values).to(image.device).float() / 255


def _results(context: Context, config: MaskConfig, folder: Path, tally: Tally) -> Results:
    """At the stated threshold without and with CRF; best_*: without CRF at the threshold of the highest mIoU."""
    curve = ThresholdCurve(len(context.index.classes))
    curve.add(tally["curve"])
    write_curves(context, folder, {"plain": curve})
    best, last = curve.best(), score(tally["crf"])
    results: Results = {"threshold": config.threshold, **entries("plain_", score(tally["plain"]))}
    if config.crf.iterations:
        results |= entries("crf_", last)
    results |= {"best_threshold": best.threshold, "best_miou": 100 * best.miou}
    return results | by_class(context, last)


def by_class(context: Context, last: Score) -> Results:
    """What a score of the written masks stands on, and the IoU of every class in percent."""
    names = ("background", *context.index.classes)
    results = stands_on(context.config.data.score_split, context.config.model)
    return results | {f"iou_{name}": 100 * float(iou) for name, iou in zip(names, last.iou, strict=True)}


def _draw(context: Context, name: str, maps: StageShards, config: MaskConfig, scores: Scores) -> None:
    rows = []
    headings = ["photo", "best score", f"above {config.threshold}", "with CRF", "truth"]
    for ordinal in pictured(context):
        made = _one(context, maps, ordinal, config, scores)
        pixels = made.image.permute(1, 2, 0).cpu().numpy()
        tiles = [pixels, heat(pixels, best_class(made.scores, made.classes)[1].cpu().numpy())]
        tiles += [paint(pixels, made.plain), paint(pixels, made.refined)]
        if (truth := truth_of(context, ordinal, made.plain.shape)) is not None:
            tiles.append(paint(pixels, truth))
        present = ", ".join(context.index.classes[c] for c in made.classes.tolist())
        rows.append((f"{context.index.keys[ordinal]}: {present}", tiles))
    save_sheet(context, name, rows, headings)
