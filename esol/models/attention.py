"""What the patches of a plain ViT attend to."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from esol.base.errors import ConfigError
from esol.models.backbones import Backbone
from esol.models.regrid import grid_size, scale_to_grid
from esol.models.timm_networks import TokenFeatures

MOST = 2304  # patches: their attention is a matrix for each head, and a larger photo is made smaller for it


class PatchAttention:
    """The attention of the last blocks of a plain ViT, the mean over these blocks and their heads.

    Several threads may ask at a time, each of a photo. ConfigError for a network without such attention. blocks: how
    many, all where there are fewer. The backbone is for this alone from then on: it no longer fuses its attention.
    """

    def __init__(self, backbone: Backbone, blocks: int) -> None:
        self.backbone = backbone
        self._seen = threading.local()
        net: Any = backbone.body.net
        for block in list(net.blocks)[-blocks:]:
            if not hasattr(block.attn, "attn_drop"):
                raise ConfigError(
                    f"model.backbone: the attention of timm's {type(net).__name__} cannot be read: choose another "
                    "network, or leave affinity_masks out of stages"
                )
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, attention: Tensor) -> None:
        """Of what is made within __call__, in this thread: (1, heads, tokens, tokens)."""
        found: list[Tensor] = self._seen.found
        found.append(attention[0].float().mean(0))

    @torch.no_grad()
    def __call__(self, image: Tensor) -> tuple[Tensor, int]:
        """uint8 (3, H, W) -> attention between patches (h * w, h * w), float32, and w: of grid_size at the stride."""
        stride, body = self.backbone.stride, self.backbone.body
        assert isinstance(body, TokenFeatures)
        factor = min(1.0, (MOST * stride**2 / (image.shape[1] * image.shape[2])) ** 0.5)
        self._seen.found = []
        self.backbone(scale_to_grid(image[None], factor, stride))
        mean = torch.stack(self._seen.found).mean(0)[body.prefix :, body.prefix :]
        return mean, grid_size(image, factor, stride)[1] // stride + 1
