"""A trained DeepLab, ready to predict photos of any size."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from esol.base.errors import CheckpointError, DataError
from esol.config import BackboneConfig, PredictionConfig
from esol.data.photos import upright_rgb
from esol.data.transforms import decode, within
from esol.engines.ranks import precision_of
from esol.models.backbones import build_backbone
from esol.models.deeplab import DeepLab
from esol.models.folded import for_inference
from esol.ops.segmentation import by_parts, enlarged_labels, logits_by_scale, strongest
from esol.pipeline import records
from esol.pipeline.model_file import ModelInfo, read_info
from esol.pipeline.weights import WEIGHTS
from esol.report.pictures import Pixels, paint

Photo = str | Path | Image.Image | Pixels
"""A file, a picture, or uint8 (H, W, 3) in RGB."""


def load_network(place: str | Path) -> tuple[DeepLab, ModelInfo]:
    """The network, in eval mode on the CPU, of a run directory, an exported folder or a .safetensors file.

    A run directory predicts as its evaluate stage did, before that has run as segment's header says. CheckpointError
    where there is no such model.
    """
    place = Path(place)
    run = records.is_run(place)
    older = run and records.made_by_another_version(place / "segment")  # its weights and header are as they were
    segment = records.need(place, "segment") if run and not older else None
    path = place / "segment" / WEIGHTS if run else place / WEIGHTS if place.is_dir() else place
    info = read_info(path)
    evaluated = records.read_manifest(place / "evaluate") if run else None
    if segment and evaluated and evaluated.consumed.get("segment") == segment.output:
        ran = evaluated.ran_with
        asked = info.precision if ran.engine.precision == "auto" else ran.engine.precision
        info = replace(info, evaluate=ran.section(PredictionConfig), precision=asked)
    model = BackboneConfig(info.backbone, output_stride=8, freeze="all")
    net = DeepLab(build_backbone(model, pretrained=False), len(info.classes) + 1, info.rates)
    try:
        net.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    return net.eval(), info


@dataclass(frozen=True)
class Prediction:
    """What a model says of a photo.

    mask: uint8 (H, W), 0 background, 1 + i for classes[i]; confidence: uint16 (H, W), the network's probability of the
    mask's label, before the CRF, in 1/65535; shares: label -> its share of the pixels, of those that are there; photo:
    uint8 (H, W, 3), upright, in RGB.
    """

    mask: NDArray[np.uint8]
    confidence: NDArray[np.uint16]
    shares: dict[str, float]
    classes: tuple[str, ...]
    photo: Pixels

    def overlay(self) -> Image.Image:
        """The mask in colours over the photo."""
        return Image.fromarray(paint(self.photo, self.mask))


class Model:
    """A model with its way to predict: photos larger than those that it learned from are made smaller first.

    fast: one scale, no flip, no CRF; full_size: photos are seen at their own size, whatever the model learned from.
    What is too large for the network at once goes through it in windows. On a GPU where there is one, and in the
    precision in which the model was evaluated, where the machine computes in it. Raises what load_network raises.
    """

    def __init__(self, model: str | Path, fast: bool = False, full_size: bool = False) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        net, self.info = load_network(model)
        self._precision = precision_of(self.info.precision, self.device)
        self.net = for_inference(net, self.device, self._precision)
        self.config, self.full_size = _fast(self.info.evaluate) if fast else self.info.evaluate, full_size

    def faster(self) -> Model:
        """The same network, as Model(..., fast=True) has it."""
        other = copy(self)
        other.config = _fast(self.config)
        return other

    def reduced(self, image: Tensor) -> Tensor:
        """uint8 (3, H, W) at the size that the network sees: its long side is info.photo_side at most."""
        return image if self.full_size else within(image, self.info.photo_side)

    def label_maps(
        self, images: list[Tensor], sizes: list[tuple[int, int]], tell: Callable[[str], None] | None = None
    ) -> list[tuple[NDArray[np.uint8], NDArray[np.uint16]]]:
        """Reduced photos -> mask and confidence of each at the photo's own size, as a Prediction has them.

        tell: hears which window is next, where photos go through the network in windows.
        """
        own, kind = self.config, self._precision
        moved = [image.to(self.device) for image in images]
        with torch.autocast(self.device.type, kind, enabled=kind is not None):
            found = logits_by_scale(moved, self.net, scales=own.scales, flip=own.flip, combine=own.combine, tell=tell)
        answers = [(np.empty(image.shape[1:], np.uint8), np.empty(image.shape[1:], np.uint16)) for image in moved]
        for i, part, before, after in by_parts(moved, found, own, tell):
            if after.shape[1:] == moved[i].shape[1:]:  # the photo in one part, whose probabilities can be enlarged
                answers[i] = enlarged_labels(after, before, sizes[i])
            else:
                mask, confidence = answers[i]
                mask[part.kept], confidence[part.kept] = strongest(after, before)
        return [self._at(*answer, size) for answer, size in zip(answers, sizes, strict=True)]

    @staticmethod
    def _at(
        mask: NDArray[np.uint8], confidence: NDArray[np.uint16], size: tuple[int, int]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
        """Both at the photo's own size, where they are not yet."""
        if mask.shape == size:
            return mask, confidence
        place = np.ix_(*(np.arange(n) * own // n for n, own in zip(size, mask.shape, strict=True)))
        return mask[place], confidence[place]

    def shares(self, labels: NDArray[np.uint8]) -> dict[str, float]:
        """The share of the pixels of each label that is there."""
        counts = np.bincount(labels.ravel(), minlength=len(self.info.classes) + 1)
        names = ("background", *self.info.classes)
        return {name: round(int(n) / labels.size, 6) for name, n in zip(names, counts, strict=True) if n}

    def predict(self, photo: Photo) -> Prediction:
        """The mask of one photo; DataError where it cannot be read."""
        image = _pixels(photo)
        mask, sure = self.label_maps([self.reduced(image)], [(image.shape[1], image.shape[2])])[0]
        return Prediction(mask, sure, self.shares(mask), self.info.classes, image.permute(1, 2, 0).numpy())


def _fast(config: PredictionConfig) -> PredictionConfig:
    return replace(config, scales=(1.0,), flip=False, crf=replace(config.crf, iterations=0))


def _pixels(photo: Photo) -> Tensor:
    """uint8 (3, H, W)."""
    if isinstance(photo, (str, Path)):
        try:
            return decode(Path(photo).read_bytes(), str(photo))
        except OSError as error:
            raise DataError(f"{photo}: cannot be read ({error.strerror})") from error
    values = np.array(upright_rgb(photo)) if isinstance(photo, Image.Image) else np.asarray(photo)
    if values.dtype != np.uint8 or values.ndim != 3 or values.shape[2] != 3:
        raise DataError(f"a photo must be uint8 (H, W, 3), not {values.dtype} {values.shape}")
    return torch.from_numpy(np.ascontiguousarray(values)).permute(2, 0, 1).contiguous()
