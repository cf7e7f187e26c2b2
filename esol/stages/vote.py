"""Stage vote_masks: every pixel gets the label that most of the run's mask stages gave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from esol.config import Config
from esol.data.samples import encode_mask
from esol.ops.metrics import score
from esol.pipeline import records
from esol.pipeline.inference import InferenceStage, Members, Sample, Tally
from esol.pipeline.made import StageShards
from esol.pipeline.masks import (
    MaskStage,
    against_truth,
    judge_counts,
    judged_masks,
    mask_remarks,
    mask_stages,
    scored,
    stand_in,
)
from esol.pipeline.registry import STAGES, register
from esol.pipeline.scores import Results, by_class
from esol.pipeline.weights import initial_weights
from esol.report.judge import Evidence, Label
from esol.report.pictures import Pixels, paint


def majority(masks: NDArray[np.uint8]) -> Label:
    """The label that most masks (K, H, W) give a pixel; of equally many, the one that the foremost mask gives."""
    votes = (masks[:, None] == masks[None]).sum(1)
    return np.take_along_axis(masks, votes.argmax(0)[None], 0)[0]


@dataclass(frozen=True)
class Vote:
    """Of one photo: the vote, what was voted, by stage, and the classes that the vote had lost."""

    mask: Label
    masks: dict[str, Label]
    lost: list[int]


@register
class VoteMasks(InferenceStage[Vote]):
    """The majority of the mask stages; where no two agree, the one that the judge ranks first decides."""

    name = "vote_masks"
    after = "irn_masks"
    makes = "masks"

    @classmethod
    def consumes(cls, config: Config) -> tuple[str, ...]:
        """Those of the voters that the run has, and the first of them at least."""
        return tuple(name for name in _voters() if name in config.stages) or ("seed_masks",)

    def open(self) -> None:
        config = self.context.config
        judged = judged_masks(config, records.results(self.context.run_dir))
        names = sorted(self.consumes(config), key=lambda name: -judged.get(name, 0))
        self.voters = {name: StageShards(self.context, name) for name in names}

    def make(self, samples: Sequence[Sample]) -> list[Vote]:
        return [self._vote(sample) for sample in samples]

    def _vote(self, sample: Sample) -> Vote:
        masks = self._masks(sample)
        vote = majority(np.stack(list(masks.values())))
        lost = [c for c in sample.classes if not (vote == c + 1).any()]
        first = torch.from_numpy(next(iter(masks.values())))  # its pixels stand in for what the vote has lost
        return Vote(stand_in(torch.from_numpy(vote), first, lost).numpy(), masks, lost)

    def members(self, sample: Sample, made: Vote) -> Members:
        return {"mask.png": encode_mask(made.mask)}

    def confidence(self, sample: Sample, mask: Label) -> NDArray[np.float32]:
        """The share of the stages that gave a pixel its label."""
        return np.mean([own == mask for own in self._masks(sample).values()], 0, dtype=np.float32)

    def _masks(self, sample: Sample) -> dict[str, Label]:
        return {name: shards.label_map(sample.ordinal, "mask.png") for name, shards in self.voters.items()}

    def count(self, sample: Sample, made: Vote) -> Tally:
        classes, seeds = len(self.context.index.classes), made.masks.get("seed_masks")
        found = judge_counts(sample, made.mask, sample.classes, classes, seeds, made.lost)
        if sample.truth is not None:
            found |= against_truth("crf", sample.truth, made.mask, classes)
        return found

    def tiles(self, sample: Sample, made: Vote) -> dict[str, Pixels]:
        masks = {**made.masks, "vote": made.mask}
        return {name: paint(sample.pixels, mask) for name, mask in masks.items()}

    def results(self, tally: Tally) -> Results:
        context, found = self.context, Results()
        if "crf" in tally and tally["crf"].any():
            split, classes = (
                context.config.data.score_split,
                by_class(score(tally["crf"]), context.index.classes, "iou"),
            )
            found = Results({"crf": replace(scored(tally, "crf", split), classes=classes)}, last="crf")
            found.others = {"split": split, "initial_weights": initial_weights(context.config.model)}
        found.others |= Evidence.of(tally).numbers(context.index.classes, self.name)
        return found

    def remarks(self, results: Mapping[str, Mapping[str, Any]]) -> list[str]:
        return mask_remarks(self.context.config, self.name, results)


def _voters() -> list[str]:
    return [name for name in mask_stages() if issubclass(stage := STAGES[name], MaskStage) and stage.votes]
