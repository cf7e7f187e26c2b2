"""Stage shrink: offsets that keep the classification and lose area."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from esol.base.schema import key
from esol.config import Config, LabelConfig
from esol.data.samples import Batch
from esol.models.cam_net import CamNet
from esol.models.heads import Expansion, Heads, Shrinkage
from esol.pipeline.cam import CamStage
from esol.pipeline.registry import register
from esol.training.head import HeadTask
from esol.training.losses import AREA_TERMS, classification_and_area
from esol.training.task import ParameterGroup, Task


@dataclass(frozen=True)
class ShrinkConfig(LabelConfig):
    """The shrinkage sampler: offsets (and kernel) that keep the classification and lose area."""

    duration: str = key("2400 images")
    lr: float = key(0.005, low=0, high=100)
    area: float = key(1.0, low=0, high=1000)  # lambda, weight of the area loss
    clip: float = key(0.1, low=0, high=1)  # beta of feature clipping before shrinkage; 0 = off
    bound: float = key(1.0, low=0, high=64, unit="feature-grid pixels")  # of the offsets, as in expand
    kernel: Literal["identity", "copy", "box"] = key("box")  # where W2 starts
    learn_kernel: bool = key(True)  # whether W2 learns
    learn_classifier: bool = key(True)  # whether V learns
    area_term: str = key("mean")  # what counts as covered: mean, decide, max, or a plugin's (esol/training/losses.py)


class ShrinkTask(HeadTask):
    """L_cls + lambda * L_area on the second sampler; network and Expansion are frozen; hands over the Shrinkage."""

    handover: Shrinkage

    def __init__(self, net: CamNet, expansion: Expansion, config: ShrinkConfig, absence: Tensor | None = None) -> None:
        super().__init__(net, absence)
        self.expansion = expansion.requires_grad_(False)
        self.handover = shrinkage(expansion, config)
        self.config = config

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """losses: loss, classification, area; no report."""
        with torch.no_grad():
            features = self.expansion.features(self.features(batch))
        maps = self.handover.class_maps(features)
        config = self.config
        return classification_and_area(maps, batch["labels"], config.area, config.area_term, self.absence), {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The offset branch, and W2 and V where they learn."""
        shrinkage = self.handover
        head = [p for p in (shrinkage.kernel, shrinkage.classifier) if p.requires_grad]
        groups = [ParameterGroup("offset", list(shrinkage.offset.parameters()))]
        return [*groups, ParameterGroup("head", head)] if head else groups


@register
class Shrink(CamStage):
    """The shrinkage sampler on the expanded features."""

    name = "shrink"
    after = "expand"
    source = "shrink"
    section = ShrinkConfig
    version = 3
    needs = ("classify", "expand")
    config: ShrinkConfig

    def task(self) -> Task:
        heads = self.heads()
        return ShrinkTask(heads.net, cast(Expansion, heads["expand"]), self.config, self.absence())

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        AREA_TERMS.need(config.section(ShrinkConfig).area_term, "shrink.area_term")

    @classmethod
    def head(cls, config: Config, heads: Heads, num_classes: int) -> Shrinkage:
        return shrinkage(cast(Expansion, heads["expand"]), config.section(ShrinkConfig))


def shrinkage(expansion: Expansion, config: ShrinkConfig) -> Shrinkage:
    """A new Shrinkage behind an Expansion, as the section has it."""
    return Shrinkage(expansion, config.clip, config.bound, config.kernel, config.learn_kernel, config.learn_classifier)
