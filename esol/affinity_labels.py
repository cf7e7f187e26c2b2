"""Stages psa_labels and irn_labels: label maps from class maps, what AffinityNet and IRNet learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esol.localization import save_sheet
from esol.ops import pseudo_labels
from esol.ops.metrics import VOID
from esol.pipeline.context import Context, Results
from esol.pipeline.inference import Members, StageShards, Tally, mask_splits, over_shards, photo, pictured, truth_of
from esol.report.pictures import paint
from shards.samples import encode_mask

Synthesis = Callable[[Tensor, Tensor, Tensor], Tensor]


def psa_labels(context: Context, folder: Path) -> Results:
    """PSA: dense CRF on the class maps with a low and a high background."""
    config = context.config.psa_labels
    return _labels(context, "psa_labels", folder, partial(pseudo_labels.psa_labels, config=config))


def irn_labels(context: Context, folder: Path) -> Results:
    """IRN: dense CRF on the seeds at a high and a low threshold."""
    config = context.config.irn_labels
    return _labels(context, "irn_labels", folder, partial(pseudo_labels.irn_labels, config=config))


def _labels(context: Context, name: str, folder: Path, synthesis: Synthesis) -> Results:
    """results: labelled, percent of the pixels; right, percent of the labelled ones where the truth is known."""
    maps = StageShards(context, "localize")

    def work(ordinals: NDArray[np.int64], tally: Tally) -> Iterator[tuple[int, Members]]:
        counts = np.zeros(4, np.int64)  # pixels, labelled ones, labelled ones of known truth, right ones
        for ordinal in map(int, ordinals):
            label = _one(context, maps, ordinal, synthesis)[1]
            sure = label != VOID
            counts[:2] += label.size, sure.sum()
            if (truth := truth_of(context, ordinal, label.shape)) is not None:
                known = sure & (truth != VOID)
                counts[2:] += known.sum(), (label == truth)[known].sum()
            yield ordinal, {"label.png": encode_mask(label)}
        tally["pixels"] = counts

    pixels, labelled, known, right = over_shards(context, name, folder, mask_splits(context), work)["pixels"].tolist()
    if context.engine.is_main:
        _draw(context, name, maps, synthesis)
    return {"labelled": 100 * labelled / pixels} | ({"right": 100 * right / known} if known else {})


def _one(
    context: Context, maps: StageShards, ordinal: int, synthesis: Synthesis
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    image = photo(context, ordinal)
    arrays = maps.arrays(ordinal, "maps.npz")
    full = torch.from_numpy(arrays["full"]).to(context.engine.device).float() / 255
    classes = torch.from_numpy(arrays["classes"]).to(context.engine.device)
    label = synthesis(image.to(context.engine.device), full, classes)
    return image.permute(1, 2, 0).numpy(), label.cpu().numpy()


def _draw(context: Context, name: str, maps: StageShards, synthesis: Synthesis) -> None:
    rows = []
    for ordinal in pictured(context):
        pixels, label = _one(context, maps, ordinal, synthesis)
        tiles = [pixels, paint(pixels, label)]
        if (truth := truth_of(context, ordinal, label.shape)) is not None:
            tiles.append(paint(pixels, truth))
        rows.append((str(context.index.keys[ordinal]), tiles))
    save_sheet(context, name, rows, ["photo", "labels, white is void", "truth"])
