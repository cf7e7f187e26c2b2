"""What the tasks behind a trained CAM network share."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from esol.data.samples import Batch
from esol.models.cam_net import CamNet
from esol.training.task import Task


class HeadTask(Task):
    """A task behind the CAM network, which is frozen: its features are constants."""

    absence: Tensor | None

    def __init__(self, net: CamNet, absence: Tensor | None = None) -> None:
        """absence: the weights of absent classes in the classification loss."""
        super().__init__()
        self.register_buffer("absence", absence, persistent=False)
        self.net = net.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """The network stays in eval."""
        super().train(mode)
        self.net.eval()
        return self

    @torch.no_grad()
    def features(self, batch: Batch) -> Tensor:
        """X (B, Cf, h, w) of the batch's images."""
        return self.net.features(batch["image"])
