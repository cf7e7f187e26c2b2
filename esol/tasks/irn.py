"""Stage irn: class boundaries and displacements from pairs of pixels of IRN's labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esol.config import IrnConfig
from esol.models.irn_net import STRIDE, IrnNet
from esol.ops.pairs import boundary_affinity, pair_labels, pair_offsets, pair_windows
from esol.tasks.affinity import affinity_losses
from esol.training.task import Batch, ParameterGroup, Task


class Irn(Task):
    """(positive + negative) / 2 + (displacement of foreground + of background pairs) / 2; hands over the network.

    Each is a mean over the image's own pairs, 0 where it has none, then over the images. IRN's public code has the mean
    over all pairs of the batch, and leaves out pairs that start at the border, less than the radius from it.
    """

    handover: IrnNet

    def __init__(self, net: IrnNet, config: IrnConfig) -> None:
        super().__init__()
        self.handover = net
        self.config = config

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """losses: loss, positive, negative, displacement_fg, displacement_bg; no report."""
        radius = self.config.radius
        edge, displacement = self.handover(batch["image"])
        pairs = pair_labels(batch["target"][:, ::STRIDE, ::STRIDE], radius)
        with torch.autocast(edge.device.type, enabled=False):
            affinity = boundary_affinity(edge[:, 0].float().sigmoid(), radius)
            background, foreground, negative = (loss.mean() for loss in affinity_losses(affinity, pairs))
            positive = (background + foreground) / 2
            of_background = displacement_loss(displacement, pairs[0], radius, apart=False).mean()
            of_foreground = displacement_loss(displacement, pairs[1], radius, apart=True).mean()
            loss = (positive + negative) / 2 + (of_foreground + of_background) / 2
        return {
            "loss": loss,
            "positive": positive,
            "negative": negative,
            "displacement_fg": of_foreground,
            "displacement_bg": of_background,
        }, {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The boundary branch at the base rate, the displacement branch at displacement_lr times it."""
        net = self.handover
        return [
            ParameterGroup("edge", list(net.edge.parameters())),
            ParameterGroup(
                "displacement", list(net.displacement.parameters()), lr_multiplier=self.config.displacement_lr
            ),
        ]


def displacement_loss(displacement: Tensor, pairs: Tensor, radius: int, apart: bool) -> Tensor:
    """Mean of |D_i - D_j - (j - i)|, or of |D_i - D_j|, over an image's pairs and both axes -> (B,); 0 without pairs.

    displacement (B, 2, h, w), (dy, dx) in grid pixels, computed in float32 or wider; pairs bool (B, K, h, w). apart:
    both pixels point at one place, as in one instance; else both are displaced alike, as in the background.
    """
    wide = displacement if displacement.dtype == torch.float64 else displacement.float()
    total: Tensor = _PairDisplacement.apply(wide, pairs, radius, apart)
    return total / (2 * pairs.sum((1, 2, 3))).clamp_min(1)


class _PairDisplacement(torch.autograd.Function):
    """Sums over the pairs of an image. The gradient is a sum of signs: it is made on the way, and no pair is kept."""

    @staticmethod
    def forward(ctx: Any, displacement: Tensor, pairs: Tensor, radius: int, apart: bool) -> Tensor:
        total = displacement.new_zeros(len(displacement))
        signs = torch.zeros_like(displacement)
        for k, offset in enumerate(pair_offsets(radius)):
            first, second = pair_windows(offset, *displacement.shape[2:])
            error = displacement[first] - displacement[second]
            if apart:
                for axis in (0, 1):
                    error[:, axis] -= offset[axis]
            error *= pairs[:, k : k + 1][first]
            total += error.abs().sum((1, 2, 3))
            error.sign_()
            signs[first] += error
            signs[second] -= error
        ctx.save_for_backward(signs)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (signs,) = ctx.saved_tensors
        return signs * upstream[:, None, None, None], None, None, None
