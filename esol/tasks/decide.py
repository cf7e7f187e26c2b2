"""Stage decide: the network's head learns class maps that decide."""

from __future__ import annotations

import torch
from torch import Tensor

from esol.config import DecideConfig
from esol.models.cam_net import CamNet, pool
from esol.models.expansion import Decision
from esol.tasks.base import Batch, ParameterGroup, Task
from esol.tasks.losses import area_loss, classification_loss


class Decide(Task):
    """L_cls + lambda * L_area, its term decide, on the clipped features of W1; hands over the Decision.

    The backbone is frozen, W1 and V learn. Not in the paper: Shrinkage's loss without its sampler (docs/design.md).
    """

    handover: Decision

    def __init__(self, net: CamNet, config: DecideConfig) -> None:
        super().__init__()
        self.net = net.requires_grad_(False)
        self.handover = Decision(net, config)
        self.config = config

    def train(self, mode: bool = True) -> Decide:
        """The network stays in eval: its features are constants here."""
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """losses: loss, classification, area; no report."""
        with torch.no_grad():
            x = self.net.features(batch["image"])
        maps = self.handover.class_maps(x)
        logits = pool(maps)
        with torch.autocast(maps.device.type, enabled=False):
            classification = classification_loss(logits, batch["labels"]).mean()
            area = area_loss(maps, batch["labels"], "decide").mean()
            loss = classification + self.config.area * area
        return {"loss": loss, "classification": classification, "area": area}, {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """W1 and V."""
        return [ParameterGroup("head", [self.handover.kernel, self.handover.classifier])]
