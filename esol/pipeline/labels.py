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
    maps: StageShards

    def labels(self, image: Tensor, maps: Tensor, classes: Tensor) -> Tensor:
        """Photo uint8 (3, H, W), class maps (n, H, W) in 0..1 of the classes (n,) -> label map uint8 (H, W)."""
        raise NotImplementedError

    def open(self) -> None:
        self.maps = StageShards(self.context, "localize")

    def make(self, samples: Sequence[Sample]) -> list[Label]:
        device, found = self.context.engine.device, []
        for sample in samples:
            arrays = self.maps.arrays(sample.ordinal, "maps.npz")
            full = torch.from_numpy(arrays["full"]).to(device).float() / 255
            classes = torch.from_numpy(arrays["classes"]).to(device)
            found.append(self.labels(sample.image.to(device), full, classes).cpu().numpy())
        return found

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
