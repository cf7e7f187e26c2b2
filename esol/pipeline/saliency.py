"""Saliency maps as another cue of the mask stages: where they come from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esol.base.errors import ConfigError, DataError, EsolError
from esol.config import Config
from esol.data.index import Index
from esol.data.samples import decode_gray
from esol.ops.saliency import spectral_residual
from esol.pipeline.context import Context
from esol.pipeline.inference import Sample


def saliency_map(context: Context, sample: Sample, image: Tensor) -> Tensor | None:
    """The sample's saliency map (H, W) in 0..1, if the config wants one."""
    config = context.config.saliency
    if config.source == "none":
        return None
    if config.source == "spectral-residual":
        return spectral_residual(image)
    if config.source == "shards":
        data = context.reader.read(sample.ordinal, "saliency.png")
    else:
        path = Path(config.folder, f"{sample.key}.png")
        if not path.resolve().is_relative_to(Path(config.folder).resolve()):
            raise DataError(f"{sample.name}: its key leads out of saliency.folder")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{sample.name}: saliency map {path} cannot be read ({error.strerror})") from error
    values = decode_gray(data, f"{sample.name}, saliency")
    if values.shape != sample.size:
        raise DataError(f"{sample.name}: the saliency map is {values.shape}, the image {sample.size}")
    return torch.from_numpy(values).to(image.device).float() / 255


def lacking_maps(config: Config, index: Index) -> Iterator[EsolError]:
    """An error for what is missing of the maps of every photo that masks are made for."""
    cue, data = config.saliency, config.data
    masked = np.union1d(index.split(data.mask_split), index.split(data.score_split))
    if cue.source == "shards":
        yield from without(index, "saliency.png", masked, "saliency.source = shards")
    elif cue.source == "folder":
        folder = Path(cue.folder)
        if not folder.is_dir():
            yield DataError(f"saliency.folder = {folder}: there is no such folder")
            return
        there = {path.name for path in folder.iterdir()}
        lacking = [str(key) for key in index.keys[masked] if f"{key}.png" not in there]
        if lacking:
            yield DataError(
                f"saliency.folder = {folder} lacks {len(lacking)} of {len(masked)} maps, the first is {lacking[0]}.png"
            )
    elif cue.source == "spectral-residual":
        try:
            import cv2.saliency  # noqa: F401
        except ImportError as error:
            yield ConfigError(
                f'saliency.source = spectral-residual needs OpenCV ({error}): pip install "esol[saliency]"'
            )


def without(index: Index, member: str, ordinals: NDArray[np.int64], why: str) -> Iterator[EsolError]:
    """An error where some of the photos have no such member."""
    known = index.members.get(member)
    lacking = ordinals if known is None else ordinals[known[ordinals, 0] < 0]
    if len(lacking):
        yield DataError(
            f"{why}, but {len(lacking)} of {len(ordinals)} photos in {index.root} have no {member}, "
            f"the first is {index.keys[lacking[0]]}"
        )
