"""`esol export-masks`: a run's masks with their photos for annotation tools and other trainers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from esol.base.errors import CheckpointError, DataError, EsolError
from esol.base.progress import progress
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.samples import decode_mask, encode_png
from esol.deploy.mask_formats import FORMATS
from esol.deploy.masked import Masked
from esol.engines import make_engine
from esol.pipeline import records
from esol.pipeline.context import Context
from esol.pipeline.inference import InferenceStage
from esol.pipeline.records import Manifest
from esol.pipeline.registry import table
from esol.report.tables import best_masks
from esol.tracking.tracker import Tracker
from esol.training.loop import StopSignal


def export_masks(
    run_dir: Path, kind: str, out: Path, stage: str = "", split: str = "", confidence: bool = False
) -> list[str]:
    """Writes the masks of a stage in a format, and returns lines on what it wrote and what the format cannot hold.

    stage: "" for the judge's choice; split: "" for all photos that have a mask; confidence: 16-bit maps beside the
    masks, for which the stage scores the photos once more. out: a new or empty folder. EsolError where there is no such
    run, stage, format or split.
    """
    found = records.finished(run_dir)
    made = [name for name, own in found.items() if own.makes in ("masks", "predictions")]
    stage = stage or best_masks(found)
    if stage not in made:
        raise CheckpointError(f"{run_dir} has no masks of {stage or 'any stage'}; it has: {', '.join(made) or 'none'}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EsolError(f"--out {out}: choose a new or an empty folder")
    own = records.need(run_dir, stage)
    data = found[stage].ran_with.data
    index = Index.load(data.root, data.cache)
    photos, masks = ShardReader(index, data.cache), ShardReader(Index.load(run_dir / stage))
    place = {str(key): i for i, key in enumerate(index.keys)}
    wanted = {str(key) for key in index.keys[index.split(split)]} if split else set(place)
    keys = [(i, str(key)) for i, key in enumerate(masks.index.keys) if str(key) in wanted]
    split_of = np.full(len(index), split or "train", dtype=object)
    for name, ordinals in index.splits.items() if not split else ():
        split_of[ordinals] = name
    if kind not in FORMATS:
        raise DataError(f"--to {kind}: the formats are {', '.join(FORMATS)}")
    writer = FORMATS[kind](out, index.classes)
    with (
        _confidences(run_dir, own, photos, confidence) as sure_of,
        progress("export", len(keys), "photos", visible=True) as advance,
    ):
        for done, (number, key) in enumerate(keys, 1):
            ordinal = place[key]
            mask = decode_mask(masks.read(number, "mask.png"), f"{stage}, {key}", len(index.classes))
            file = f"{key}.{index.image_ext(ordinal)}"
            writer.add(Masked(key, file, photos.image(ordinal), mask, str(split_of[ordinal])))
            if sure_of is not None:
                sure = (sure_of(ordinal, mask) * 65535).round().astype(np.uint16)
                writer.save(f"confidence/{key}.png", encode_png(Image.fromarray(sure)))
            advance(done, key)
    writer.close()
    lines = [f"{out}: {len(keys)} photos with the masks of {stage}, as {kind}"]
    return lines + [f"{kind} cannot hold {what}: {count}" for what, count in sorted(writer.lost.items())]


@contextlib.contextmanager
def _confidences(
    run_dir: Path, own: Manifest, reader: ShardReader, wanted: bool
) -> Iterator[Callable[[int, NDArray[np.uint8]], NDArray[np.float32]] | None]:
    """What says how sure a stage is of its mask of a photo, float (H, W), without its CRF; None: not wanted."""
    if not wanted:
        yield None
        return
    config = replace(own.ran_with, run_dir=str(run_dir))
    engine = make_engine(replace(config.engine, name="accelerate"), config.seed)  # whatever trained it
    tracker = Tracker(config, False, reader.index.hash, 1)
    stage = table()[own.stage](Context(config, engine, tracker, reader.index, reader, StopSignal(), resume=False))
    if not isinstance(stage, InferenceStage) or type(stage).confidence is InferenceStage.confidence:
        raise EsolError(f"{own.stage} does not say how sure it is of its masks: leave --confidence out")
    stage.open()

    @torch.no_grad()
    def sure_of(ordinal: int, mask: NDArray[np.uint8]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = stage.confidence(stage.sample(ordinal), mask)
        return found

    try:
        yield sure_of
    finally:
        engine.close()
