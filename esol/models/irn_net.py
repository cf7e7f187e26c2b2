"""IRNet: class boundaries, and displacements towards the centroid of the instance, on a frozen backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esol.models.backbones import Backbone
from esol.models.regrid import fuse, pad_to_grid, regrid

STRIDE = 4


class IrnNet(nn.Module):
    """A boundary branch and a displacement branch on all levels of a frozen backbone, at stride 4.

    displacement_mean (2,): of the displacements over the training images, set after training, subtracted in eval mode.
    ValueError for a backbone that learns. Source: IRN's public code, net/resnet50_irn.py, generalised to other levels;
    there ReLU comes after enlarging, here before, so that a level is projected at its own size.
    """

    displacement_mean: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        if not backbone.frozen:
            raise ValueError("IrnNet stands on a frozen backbone: build it with freeze = all")
        self.backbone = backbone
        channels, self.strides = zip(*backbone.levels, strict=True)
        self.edge = EdgeBranch(channels)
        self.displacement = DisplacementBranch(channels, max(1, sum(stride <= STRIDE for stride in self.strides)))
        self.register_buffer("displacement_mean", torch.zeros(2))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 or float (B, 3, H, W), RGB 0..255 -> edge logits (B, 1, h, w), displacements (B, 2, h, w).

        h = ceil(H / 4); displacements (dy, dx) in grid pixels.
        """
        size = (-(-image.shape[2] // STRIDE), -(-image.shape[3] // STRIDE))
        levels = self.backbone.pyramid(pad_to_grid(image, max(self.strides)))
        strides = [max(stride, STRIDE) for stride in self.strides]
        # Subsampled, not pooled: the mean of two by two pixels is half a pixel beside the grid.
        levels = [regrid(x, stride, max(stride, STRIDE)) for x, stride in zip(levels, self.strides, strict=True)]
        edge = self.edge(levels, strides, size)
        displacement = self.displacement(levels, strides, size)
        if not self.training:
            displacement = displacement - self.displacement_mean.view(2, 1, 1)
        return edge, displacement


class EdgeBranch(nn.Module):
    """32 channels of each level -> one logit."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(_reduce(c, 32, 4) for c in channels)
        self.out = nn.Conv2d(32 * len(channels), 1, 1)

    def forward(self, levels: Sequence[Tensor], strides: Sequence[int], size: tuple[int, int]) -> Tensor:
        """Levels (B, C_l, h_l, w_l), strides in rising order from 4 -> logits (B, 1, *size)."""
        reduced = [layer(x) for layer, x in zip(self.reduce, levels, strict=True)]
        return fuse(self.out, reduced, strides, STRIDE, size)


class DisplacementBranch(nn.Module):
    """64, 128 and from then on 256 channels of each level; the coarse levels are joined first, then all.

    fine: how many levels are not coarse, those of stride 4 and below.
    """

    def __init__(self, channels: Sequence[int], fine: int) -> None:
        super().__init__()
        self.fine = fine
        widths = [min(64 << i, 256) for i in range(len(channels))]
        self.reduce = nn.ModuleList(_reduce(c, w, min(w // 8, 16)) for c, w in zip(channels, widths, strict=True))
        self.join_coarse = nn.Conv2d(sum(widths[fine:]), 256, 1, bias=False)
        self.norm_coarse = nn.GroupNorm(16, 256)
        self.join = nn.Conv2d(sum(widths[:fine]) + 256, 256, 1, bias=False)
        self.norm = nn.GroupNorm(16, 256)
        self.out = nn.Conv2d(256, 2, 1, bias=False)

    def forward(self, levels: Sequence[Tensor], strides: Sequence[int], size: tuple[int, int]) -> Tensor:
        """Levels (B, C_l, h_l, w_l), strides in rising order from 4 -> displacements (B, 2, *size)."""
        n, reduced = self.fine, [layer(x) for layer, x in zip(self.reduce, levels, strict=True)]
        height, width = reduced[n].shape[2:]
        coarse = fuse(self.join_coarse, reduced[n:], strides[n:], strides[n], (height, width))
        coarse = F.relu(self.norm_coarse(coarse), inplace=True)
        joined = fuse(self.join, [*reduced[:n], coarse], strides[: n + 1], STRIDE, size)
        return self.out(F.relu(self.norm(joined), inplace=True))


def _reduce(channels: int, width: int, groups: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.GroupNorm(groups, width), nn.ReLU(inplace=True))
