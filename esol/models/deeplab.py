"""DeepLab-v2: a backbone of stride 8 and atrous spatial pyramid pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from esol.models.backbones import Backbone
from esol.models.shifted import ShiftedConv2d


class DeepLab(nn.Module):
    """Logits of num_labels labels, background first: the sum of 3x3 convolutions at several dilations.

    Batch norm is frozen, its scale and shift too. ValueError unless the backbone has output stride 8. Source:
    DeepLab-v2 (Chen et al., arXiv 1606.00915) in its large field of view form, without hidden layers.
    """

    def __init__(self, backbone: Backbone, num_labels: int, rates: Sequence[int] = (6, 12, 18, 24)) -> None:
        super().__init__()
        if backbone.stride != 8:
            raise ValueError(f"DeepLab-v2 stands on features of stride 8, not {backbone.stride}")
        self.backbone = backbone
        self.num_labels = num_labels
        self.aspp = nn.ModuleList(ShiftedConv2d(backbone.channels, num_labels, 3, rate) for rate in rates)
        for layer in self.aspp:
            nn.init.normal_(layer.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        for module in backbone.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        """uint8 or float (B, 3, H, W), RGB 0..255, both sides 8k + 1 -> logits (B, num_labels, (H-1)/8 + 1, ...).

        At such sizes the corners of the logits are those of the image (regrid.scale_to_grid makes them).
        """
        features = self.backbone(image)
        total = self.aspp[0](features)
        for layer in self.aspp[1:]:
            total = total + layer(features)
        return total
