"""AffinityNet (PSA): features whose differences say whether two near pixels are of one class."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from esol.models.backbones import Backbone
from esol.models.regrid import fuse, pad_to_grid, regrid

STRIDE = 8
WIDTHS = (64, 128, 256)


class AffinityNet(nn.Module):
    """The backbone's last three levels, reduced to 64 + 128 + 256 channels, and a 1x1 convolution over them.

    The backbone has output stride 8, so that all three are on one grid; coarser levels are enlarged. No layer has a
    bias. Source: PSA's public code, network/resnet38_aff.py, which has one backbone.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        channels, self.strides = zip(*backbone.levels[-3:], strict=True)
        self.reduce = nn.ModuleList(nn.Conv2d(c, w, 1, bias=False) for c, w in zip(channels, WIDTHS, strict=True))
        self.join = nn.Conv2d(sum(WIDTHS), sum(WIDTHS), 1, bias=False)
        for layer in self.reduce:
            nn.init.kaiming_normal_(layer.weight)  # type: ignore[arg-type]
        nn.init.xavier_uniform_(self.join.weight, gain=4)

    def forward(self, image: Tensor) -> Tensor:
        """uint8 or float (B, 3, H, W), RGB 0..255 -> features (B, 448, ceil(H / 8), ceil(W / 8))."""
        size = (-(-image.shape[2] // STRIDE), -(-image.shape[3] // STRIDE))
        levels = self.backbone.pyramid(pad_to_grid(image, max(self.strides)))[-3:]
        strides = [max(stride, STRIDE) for stride in self.strides]
        levels = [regrid(x, stride, max(stride, STRIDE)) for x, stride in zip(levels, self.strides, strict=True)]
        reduced = [F.elu(layer(x)) for layer, x in zip(self.reduce, levels, strict=True)]
        return F.elu(fuse(self.join, reduced, strides, STRIDE, size))
