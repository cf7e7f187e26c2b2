"""The classification network whose class maps start everything."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esol.models.backbones import Backbone


class CamNet(nn.Module):
    """Backbone features X, the kernel W1, the classifier V: class maps V * relu(W1 * X).

    num_classes C without background; kernel_channels: of W1's output; 0 = the plain CAM network, V straight on X.
    W1 is the expansion sampler's kernel run with zero offsets, an ordinary 3x3 convolution; neither has a bias.
    """

    def __init__(self, backbone: Backbone, num_classes: int, kernel_channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.kernel: nn.Parameter | None = None
        if kernel_channels:
            self.kernel = nn.Parameter(torch.empty(kernel_channels, backbone.channels, 3, 3))
            nn.init.kaiming_normal_(self.kernel, nonlinearity="relu")
        self.classifier = nn.Parameter(torch.empty(num_classes, kernel_channels or backbone.channels))
        nn.init.normal_(self.classifier, std=0.01)

    def features(self, image: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> X (B, Cf, h, w), h = ceil(H / stride)."""
        return self.backbone(image)

    def class_maps(self, features: Tensor) -> Tensor:
        """X (B, Cf, h, w) -> class maps (B, C, h, w), with their sign."""
        hidden = features if self.kernel is None else F.relu(F.conv2d(features, self.kernel, padding=1))
        return classify(hidden, self.classifier)

    def head_maps(self, x: Tensor, made: dict[str, Tensor]) -> Tensor:
        """As esol.models.heads.Head has it."""
        return self.class_maps(x)

    def forward(self, image: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> logits (B, C), float32."""
        return pool(self.class_maps(self.features(image)))


def classify(features: Tensor, classifier: Tensor) -> Tensor:
    """The 1x1 convolution V: features (B, K, h, w), classifier (C, K) -> class maps (B, C, h, w)."""
    return F.conv2d(features, classifier[:, :, None, None])


def pool(maps: Tensor) -> Tensor:
    """Global average pooling of class maps (B, C, h, w) -> logits (B, C), float32 or wider."""
    return (maps if maps.dtype == torch.float64 else maps.float()).mean((2, 3))
