"""Stage vote_masks: every pixel gets the label that most of the run's mask stages gave it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from esol.config import VOTERS
from esol.localization import entries, save_sheet
from esol.masks import by_class, stand_in
from esol.ops.metrics import VOID, confusion_matrix, score
from esol.pipeline import store
from esol.pipeline.context import Context, Results
from esol.pipeline.inference import Members, StageShards, Tally, mask_splits, over_shards, photo, pictured, truth_of
from esol.pipeline.judging import judged_masks
from esol.report.judge import Evidence, Label
from esol.report.pictures import paint
from shards.samples import encode_mask


def majority(masks: NDArray[np.uint8]) -> Label:
    """The label that most masks (K, H, W) give a pixel; of equally many, the one that the foremost mask gives."""
    votes = (masks[:, None] == masks[None]).sum(1)
    return np.take_along_axis(masks, votes.argmax(0)[None], 0)[0]


def vote_masks(context: Context, folder: Path) -> Results:
    """The majority of the mask stages; where no two agree, the one that the judge ranks first decides."""
    judged = judged_masks(context.config, store.results(context.run_dir))
    names = [name for name in VOTERS if name in context.config.stages]
    voters = {name: StageShards(context, name) for name in sorted(names, key=lambda n: -judged.get(n, 0))}
    num_labels = len(context.index.classes) + 1

    def work(ordinals: NDArray[np.int64], tally: Tally) -> Iterator[tuple[int, Members]]:
        evidence = Evidence.empty(num_labels - 1)
        tally["crf"] = np.zeros((num_labels, num_labels), np.int64)
        for ordinal in map(int, ordinals):
            mask, masks, lost = _one(context, voters, ordinal)
            classes = np.flatnonzero(context.reader.labels(ordinal)).tolist()
            image = photo(context, ordinal).numpy()
            evidence.add(image, mask, classes, lost=lost, seeds=masks.get("seed_masks"))
            if (truth := truth_of(context, ordinal, mask.shape)) is not None:
                tally["crf"] += confusion_matrix(truth, np.where(mask == VOID, 0, mask), num_labels)
            yield ordinal, {"mask.png": encode_mask(mask)}
        tally |= evidence.tally()

    tally = over_shards(context, "vote_masks", folder, mask_splits(context), work)
    if not context.engine.is_main:
        return {}
    _draw(context, voters)
    results: Results = {}
    if tally["crf"].any():
        found = score(tally["crf"])
        results = entries("crf_", found) | by_class(context, found)
    return results | Evidence.of(tally).numbers(context.index.classes, "vote_masks")


def _one(context: Context, voters: dict[str, StageShards], ordinal: int) -> tuple[Label, dict[str, Label], list[int]]:
    """The vote, what was voted, and the classes that the vote had lost: their pixels are the first voter's."""
    masks = {name: shards.label_map(ordinal, "mask.png") for name, shards in voters.items()}
    vote = majority(np.stack(list(masks.values())))
    lost = [c for c in np.flatnonzero(context.reader.labels(ordinal)).tolist() if not (vote == c + 1).any()]
    first = torch.from_numpy(next(iter(masks.values())))
    return stand_in(torch.from_numpy(vote), first, lost).numpy(), masks, lost


def _draw(context: Context, voters: dict[str, StageShards]) -> None:
    rows = []
    for ordinal in pictured(context):
        mask, masks, _ = _one(context, voters, ordinal)
        pixels = photo(context, ordinal).permute(1, 2, 0).numpy()
        tiles = [pixels, *(paint(pixels, own) for own in masks.values()), paint(pixels, mask)]
        if (truth := truth_of(context, ordinal, mask.shape)) is not None:
            tiles.append(paint(pixels, truth))
        rows.append((str(context.index.keys[ordinal]), tiles))
    save_sheet(context, "vote_masks", rows, ["photo", *voters, "vote", "truth"])
