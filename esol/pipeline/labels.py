"""The stages that make label maps for affinity networks out of class maps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from esol.base.palette import VOID
from esol.data.samples import encode_mask
from esol.pipeline.inference import InferenceStage, Members, Sample, Tally
from esol.pipeline.made import StageShards
from esol.pipeline.scores import Results
from esol.report.judge import Label
from esol.report.pictures import Pixels, paint


class LabelStage(InferenceStage[Label]):
    """A stage that makes label maps for an affinity network to learn from, with void where nothing is sure."""

    makes = "labels"
    needs = ("localize",)
    beside = True
    maps: StageShards

    def labels(self, images: Sequence[Tensor], maps: Sequence[Tensor], classes: Sequence[Tensor]) -> list[Tensor]:
        """Of photos uint8 (3, H, W) and class maps (n, H, W) in 0..1 of their classes (n,): label maps uint8 (H, W)."""
        raise NotImplementedError

    def open(self) -> None:
        self.maps = StageShards(self.context, "localize")

    def make(self, samples: Sequence[Sample]) -> list[Label]:
        device = self.context.engine.device
        arrays = [self.maps.arrays(sample.ordinal, "maps.npz") for sample in samples]
        full = [torch.from_numpy(own["full"]).to(device).float() / 255 for own in arrays]
        classes = [torch.from_numpy(own["classes"]).to(device) for own in arrays]
        found = self.labels([sample.image.to(device) for sample in samples], full, classes)
        return [labels.cpu().numpy() for labels in found]

    def members(self, sample: Sample, made: Label) -> Members:
        return {"label.png": encode_mask(made)}

    def count(self, sample: Sample, made: Label) -> Tally:
        sure, known = made != VOID, np.zeros(made.shape, bool)
        if sample.truth is not None:
            known = sure & (sample.truth != VOID)
        right = int((made == sample.truth)[known].sum()) if known.any() else 0
        return {"pixels": np.array((made.size, sure.sum(), known.sum(), right), np.int64)}

    def tiles(self, sample: Sample, made: Label) -> dict[str, Pixels]:
        return {"labels, white is void": paint(sample.pixels, made)}

    def results(self, tally: Tally) -> Results:
        """labelled: percent of the pixels; accuracy: percent of the labelled ones where the truth is known."""
        pixels, labelled, known, right = tally["pixels"].tolist()
        return Results(
            others={"labelled": 100 * labelled / pixels} | ({"accuracy": 100 * right / known} if known else {})
        )
