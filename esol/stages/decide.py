"""Stage decide: the network's head learns class maps that decide."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from esol.base.schema import key
from esol.config import Config, LabelConfig
from esol.data.samples import Batch
from esol.models.cam_net import CamNet
from esol.models.heads import Decision, Heads
from esol.pipeline.cam import CamStage
from esol.pipeline.registry import register
from esol.training.head import HeadTask
from esol.training.losses import classification_and_area
from esol.training.task import ParameterGroup, Task


@dataclass(frozen=True)
class DecideConfig(LabelConfig):
    """W1 and V trained on with an area term that makes each position of a class map all or nothing; ours."""

    duration: str = key("6240 images")
    lr: float = key(0.02, low=0, high=100)
    area: float = key(1.0, low=0, high=1000)  # lambda, weight of the area loss
    clip: float = key(0.3, low=0, high=1)  # beta of feature clipping, in the loss and in the maps; 0 = off


class DecideTask(HeadTask):
    """L_cls + lambda * L_area, its term decide, on the clipped features of W1; hands over the Decision.

    The backbone is frozen, W1 and V learn. Not in the paper: Shrinkage's loss without its sampler (docs/design.md).
    """

    handover: Decision

    def __init__(self, net: CamNet, config: DecideConfig, absence: Tensor | None = None) -> None:
        super().__init__(net, absence)
        self.handover = Decision(net, config.clip)
        self.config = config

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """losses: loss, classification, area; no report."""
        maps = self.handover.class_maps(self.features(batch))
        return classification_and_area(maps, batch["labels"], self.config.area, "decide", self.absence), {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """W1 and V."""
        return [ParameterGroup("head", [self.handover.kernel, self.handover.classifier])]


@register
class Decide(CamStage):
    """The trained network's head, until its class maps decide."""

    name = "decide"
    after = "classify"
    source = "decide"
    section = DecideConfig
    version = 3
    needs = ("classify",)
    config: DecideConfig

    def task(self) -> Task:
        return DecideTask(self.heads().net, self.config, self.absence())

    @classmethod
    def head(cls, config: Config, heads: Heads, num_classes: int) -> Decision:
        return Decision(heads.net, config.section(DecideConfig).clip)
