"""Stage shrink: offsets that keep the classification and lose area."""

from __future__ import annotations

import torch
from torch import Tensor

from esol.config import ShrinkConfig
from esol.models.cam_net import CamNet, pool
from esol.models.expansion import Expansion, Shrinkage
from esol.tasks.base import Batch, ParameterGroup, Task
from esol.tasks.losses import area_loss, classification_loss


class Shrink(Task):
    """L_cls + lambda * L_area on the second sampler; network and Expansion are frozen; hands over the Shrinkage."""

    handover: Shrinkage

    def __init__(self, net: CamNet, expansion: Expansion, config: ShrinkConfig) -> None:
        super().__init__()
        self.net = net.requires_grad_(False)
        self.expansion = expansion.requires_grad_(False)
        self.handover = Shrinkage(expansion, config)
        self.config = config

    def train(self, mode: bool = True) -> Shrink:
        """The network stays in eval: its features are constants here."""
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """losses: loss, classification, area; no report."""
        with torch.no_grad():
            features = self.expansion.features(self.net.features(batch["image"]))
        maps = self.handover.class_maps(features)
        logits = pool(maps)
        with torch.autocast(maps.device.type, enabled=False):
            classification = classification_loss(logits, batch["labels"]).mean()
            area = area_loss(maps, batch["labels"], self.config.area_term).mean()
            loss = classification + self.config.area * area
        return {"loss": loss, "classification": classification, "area": area}, {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The offset branch, and W2 and V where they learn."""
        shrinkage = self.handover
        head = [p for p in (shrinkage.kernel, shrinkage.classifier) if p.requires_grad]
        groups = [ParameterGroup("offset", list(shrinkage.offset.parameters()))]
        return [*groups, ParameterGroup("head", head)] if head else groups
