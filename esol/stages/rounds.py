"""Stages round_N and round_N_masks: a DeepLab of its own, and what it says of the photos that it learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from esol.config import Config, MaskConfig
from esol.pipeline.inference import Sample
from esol.pipeline.masks import mask_remarks, stand_in
from esol.pipeline.registry import STAGES, register
from esol.stages.evaluate import Predicted, PredictingStage
from esol.stages.segment import MAX_ROUNDS, ROUND, Segment, masks_of_round


class Round(Segment):
    """A network before the last one of segment.rounds, with the settings of segment."""

    default = False
    section = None
    shares = "segment"
    makes = "weights"


class RoundMasks(PredictingStage):
    """What a round's network says of the photos that it learned from, of a photo's own labels alone.

    Scales and mirror image are evaluate's; the CRF is that of the other masks, which is stronger: on photos that a
    network learned from it was 1.4 to 2.8 points better. Where the network loses a class that the photo is labelled
    with, the masks that it learned from stand in.
    """

    default = False
    shares = "evaluate"
    makes = "masks"
    shaped_by = ("data.mask_split", "data.score_split", "segment", "seed_masks")

    @classmethod
    def consumes(cls, config: Config) -> tuple[str, ...]:
        """The network, and all masks that it may have learned from."""
        return (cls.network, *STAGES[cls.network].consumes(config))

    def open(self) -> None:
        super().open()
        edges: MaskConfig = self.context.config.named("seed_masks")
        self.config = replace(self.config, crf=edges.crf)

    def labels(self, sample: Sample) -> list[int]:
        return [0, *(c + 1 for c in sample.classes)]

    def make(self, samples: Sequence[Sample]) -> list[Predicted]:
        found = []
        for sample, made in zip(samples, super().make(samples), strict=True):
            lost = [c for c in sample.classes if not (made.refined == c + 1).any()]
            taught = self.taught(sample)
            if lost and taught is not None:
                mask = stand_in(torch.from_numpy(made.refined), torch.from_numpy(taught), lost).numpy()
                made = replace(made, refined=mask, lost=lost)
            found.append(made)
        return found

    def remarks(self, results: Mapping[str, Mapping[str, Any]]) -> list[str]:
        return mask_remarks(self.context.config, self.name, results)


def _add(number: int) -> None:
    """The two stages of a round."""
    behind = masks_of_round(number - 1) if number > 1 else "vote_masks"
    network, masks = f"{ROUND}{number}", masks_of_round(number)
    register(type(f"Round{number}", (Round,), {"name": network, "after": behind, "round_number": number}))
    register(type(f"RoundMasks{number}", (RoundMasks,), {"name": masks, "after": network, "network": network}))


for _number in range(1, MAX_ROUNDS):
    _add(_number)
