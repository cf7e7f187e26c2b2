"""Stage classify: the CAM network on image-level labels."""

from __future__ import annotations

import torch
from torch import Tensor

from esol.config import ClassifyConfig
from esol.models.cam_net import CamNet
from esol.training.losses import classification_loss
from esol.training.task import Batch, ParameterGroup, Task


class Classify(Task):
    """Classification loss of GAP(V * relu(W1 * X)); hands over the whole network."""

    handover: CamNet
    absence: Tensor | None

    def __init__(self, net: CamNet, config: ClassifyConfig, absence: Tensor | None = None) -> None:
        """absence: the weights of absent classes in the classification loss."""
        super().__init__()
        self.register_buffer("absence", absence, persistent=False)
        self.handover = net
        self.head_lr = config.head_lr

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """losses: loss; report: exact, the share of images whose labels are all right at probability .5."""
        logits = self.handover(batch["image"])
        with torch.autocast(logits.device.type, enabled=False):
            loss = classification_loss(logits, batch["labels"], absence=self.absence).mean()
        exact = ((logits.detach() > 0) == (batch["labels"] > 0.5)).all(1).float().mean()
        return {"loss": loss}, {"exact": exact}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The backbone's unfrozen part at the base rate; W1 and V at head_lr times it."""
        net = self.handover
        body = [p for p in net.backbone.parameters() if p.requires_grad]
        head = [net.classifier] if net.kernel is None else [net.kernel, net.classifier]
        groups = [ParameterGroup("head", head, lr_multiplier=self.head_lr)]
        return [ParameterGroup("backbone", body), *groups] if body else groups
