"""Stage decide: the network's head learns class maps that decide."""

from __future__ import annotations

from torch import Tensor

from esol.config import DecideConfig
from esol.models.cam_net import CamNet
from esol.models.expansion import Decision
from esol.training.head import HeadTask
from esol.training.losses import classification_and_area
from esol.training.task import Batch, ParameterGroup


class Decide(HeadTask):
    """L_cls + lambda * L_area, its term decide, on the clipped features of W1; hands over the Decision.

    The backbone is frozen, W1 and V learn. Not in the paper: Shrinkage's loss without its sampler (docs/design.md).
    """

    handover: Decision

    def __init__(self, net: CamNet, config: DecideConfig, absence: Tensor | None = None) -> None:
        super().__init__(net, absence)
        self.handover = Decision(net, config)
        self.config = config

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """losses: loss, classification, area; no report."""
        maps = self.handover.class_maps(self.features(batch))
        return classification_and_area(maps, batch["labels"], self.config.area, "decide", self.absence), {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """W1 and V."""
        return [ParameterGroup("head", [self.handover.kernel, self.handover.classifier])]
