"""What the tasks behind a trained CAM network share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from esol.data.samples import Batch
from esol.models.cam_net import CamNet
from esol.training.task import Task


class CamTask(Task):
    """A task on what the CAM network's backbone makes of an image. A batch has images or, ready, their features.

    keep: told the features of every batch of images, where the backbone is frozen and a stage keeps them.
    """

    net: CamNet
    keep: Callable[[Batch, Tensor], None] | None = None

    def features(self, batch: Batch) -> Tensor:
        """X (B, Cf, h, w) of the batch's images."""
        if "features" in batch:
            return batch["features"]
        x = self.net.features(batch["image"])
        if self.keep is not None:
            self.keep(batch, x)
        return x


class HeadTask(CamTask):
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
        return super().features(batch)
