"""Stage evaluate: what DeepLab predicts for data.eval_split, scored where there is truth, with and without the CRF."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esol.config import MASK_STAGES
from esol.localization import entries, save_sheet, stands_on
from esol.models.deeplab import DeepLab
from esol.networks import trained_deeplab
from esol.ops.dense_crf import mean_field, unary_from_probabilities
from esol.ops.metrics import confusion_matrix, score
from esol.ops.segmentation import probabilities
from esol.pipeline import store
from esol.pipeline.context import Context, Results
from esol.pipeline.inference import Members, StageShards, Tally, over_shards, photo, pictured, truth_of
from esol.report.judge import Evidence, Label
from esol.report.pictures import paint
from shards.samples import encode_mask


def evaluate(context: Context, folder: Path) -> Results:
    """Writes the label maps as shards that mirror the input; holds one photo and one shard's PNGs."""
    net = trained_deeplab(context.config, len(context.index.classes)).to(context.engine.device).eval()
    split, num_labels = context.config.data.eval_split, len(context.index.classes) + 1
    learned, known = _learned_from(context), context.index.labels

    def work(ordinals: NDArray[np.int64], tally: Tally) -> Iterator[tuple[int, Members]]:
        tally |= {key: np.zeros((num_labels, num_labels), np.int64) for key in ("plain", "crf")}
        evidence = Evidence.empty(num_labels - 1)
        for ordinal in map(int, ordinals):
            image = photo(context, ordinal)
            plain, refined = _one(context, image, net)
            classes = np.flatnonzero(known[ordinal]).tolist() if known is not None else []
            taught = learned.label_map(ordinal, "mask.png") if learned and ordinal in learned else None
            evidence.add(image.numpy(), refined, classes, seeds=taught)
            if (truth := truth_of(context, ordinal, plain.shape, split)) is not None:
                tally["plain"] += confusion_matrix(truth, plain, num_labels)
                tally["crf"] += confusion_matrix(truth, refined, num_labels)
            yield ordinal, {"mask.png": encode_mask(refined)}
        tally |= evidence.tally()

    tally = over_shards(context, "evaluate", folder, (split,), work)
    if not context.engine.is_main:
        return {}
    _draw(context, net)
    return _results(context, tally) | Evidence.of(tally).numbers(context.index.classes)


def _learned_from(context: Context) -> StageShards | None:
    """The masks that DeepLab learned from, if a stage made them."""
    masks = store.results(context.run_dir)["segment"]["masks"]
    return StageShards(context, masks) if masks in MASK_STAGES else None


def _one(context: Context, image: Tensor, net: DeepLab) -> tuple[Label, Label]:
    """Label maps without and with the CRF."""
    config, image = context.config.evaluate, image.to(context.engine.device)
    with context.engine.autocast():
        found = probabilities(image[None], net, scales=config.scales, flip=config.flip, combine=config.combine)[0]
    plain = found.argmax(0).to(torch.uint8).cpu().numpy()
    if not config.crf.iterations:
        return plain, plain
    refined = mean_field(image, [unary_from_probabilities(found)], config.crf)[0]
    return plain, refined.argmax(0).to(torch.uint8).cpu().numpy()


def _results(context: Context, tally: Tally) -> Results:
    config = context.config
    about = stands_on(config.data.eval_split, config.segment.model)
    about |= {"masks": store.results(context.run_dir)["segment"]["masks"]}
    about |= {"photos": len(context.index.split(config.data.eval_split))}
    if not tally["plain"].any():
        return about
    last = score(tally["crf"])
    results = about | entries("plain_", score(tally["plain"]))
    if config.evaluate.crf.iterations:
        results |= entries("crf_", last)
    for name, values in (("iou", last.iou), ("precision", last.precision), ("recall", last.recall)):
        for label, value in zip(("background", *context.index.classes), values.tolist(), strict=True):
            if not np.isnan(value):  # a class that the truth lacks, or precision of one that is predicted nowhere
                results[f"{name}_{label}"] = 100 * value
    return results


def _draw(context: Context, net: DeepLab) -> None:
    rows, split = [], context.config.data.eval_split
    for ordinal in pictured(context, split):
        image = photo(context, ordinal)
        plain, refined = _one(context, image, net)
        pixels = image.permute(1, 2, 0).numpy()
        tiles = [pixels, paint(pixels, plain), paint(pixels, refined)]
        if (truth := truth_of(context, ordinal, plain.shape, split)) is not None:
            tiles.append(paint(pixels, truth))
        rows.append((str(context.index.keys[ordinal]), tiles))
    headings = ["photo", "prediction", "with CRF", "truth"]
    save_sheet(context, "evaluate", rows, headings[: max((len(tiles) for _, tiles in rows), default=0)])
