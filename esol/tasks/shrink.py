"""Stage shrink: offsets that keep the classification and lose area."""

from __future__ import annotations

import torch
from torch import Tensor

from esol.config import ShrinkConfig
from esol.models.cam_net import CamNet
from esol.models.expansion import Expansion, Shrinkage
from esol.training.head import HeadTask
from esol.training.losses import classification_and_area
from esol.training.task import Batch, ParameterGroup


class Shrink(HeadTask):
    """L_cls + lambda * L_area on the second sampler; network and Expansion are frozen; hands over the Shrinkage."""

    handover: Shrinkage

    def __init__(self, net: CamNet, expansion: Expansion, config: ShrinkConfig, absence: Tensor | None = None) -> None:
        super().__init__(net, absence)
        self.expansion = expansion.requires_grad_(False)
        self.handover = Shrinkage(expansion, config)
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
