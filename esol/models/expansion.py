"""What the stages after classify put behind the backbone, and the class maps of each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esol.base.errors import ConfigError
from esol.config import DecideConfig, ExpandConfig, ShrinkConfig
from esol.models.cam_net import CamNet, classify
from esol.models.sampler import OffsetBranch, deform_conv


def clip_features(features: Tensor, beta: float) -> Tensor:
    """Feature clipping: min(F, beta * max F) per image and channel of (B, K, h, w); beta 0 leaves F as it is."""
    return torch.minimum(features, beta * features.amax((2, 3), keepdim=True)) if beta else features


class Decision(nn.Module):
    """W1 and V of the network, copied to be trained on, with clipping between them."""

    def __init__(self, net: CamNet, config: DecideConfig) -> None:
        super().__init__()
        self.clip = config.clip
        self.kernel = nn.Parameter(_kernel(net).detach().clone())
        self.classifier = nn.Parameter(net.classifier.detach().clone())

    def class_maps(self, x: Tensor) -> Tensor:
        """X (B, Cf, h, w) -> class maps (B, C, h, w) of the clipped features, with their sign."""
        features = F.relu(F.conv2d(x, self.kernel, padding=1))
        return classify(clip_features(features, self.clip), self.classifier)


class Expansion(nn.Module):
    """The expansion sampler on backbone features X, with its own copies of W1 and V: the network's or the Decision's.

    Only the offsets learn; in the min-max game W1 and V do as well. Source: paper, section Expansion.
    """

    def __init__(self, head: CamNet | Decision, config: ExpandConfig) -> None:
        super().__init__()
        kernel = _kernel(head)
        self.clip = config.clip
        self.offset = OffsetBranch(kernel.shape[1], config.bound)
        self.kernel = nn.Parameter(kernel.detach().clone(), requires_grad=config.game)
        self.classifier = nn.Parameter(head.classifier.detach().clone(), requires_grad=config.game)

    def features(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        """X (B, Cf, h, w) -> F (B, K, h, w), not clipped; offset (B, 18, h, w) stands in for the branch's."""
        return F.relu(deform_conv(x, self.kernel, self.offset(x) if offset is None else offset))

    def class_maps(self, features: Tensor) -> Tensor:
        """F (B, K, h, w) -> class maps (B, C, h, w) of the clipped features, with their sign."""
        return classify(clip_features(features, self.clip), self.classifier)


class Shrinkage(nn.Module):
    """The shrinkage sampler on expanded features F: clip, sample with W2 (K -> K), classify with V.

    W2 starts as identity (centre tap), copy (of W1, where K equals the backbone's channels) or box (1/9 each tap).
    Source: paper, section Shrinkage; W2 and the learning V are open there.
    """

    def __init__(self, expansion: Expansion, config: ShrinkConfig) -> None:
        super().__init__()
        channels, before = expansion.kernel.shape[:2]
        kernel = torch.zeros(channels, channels, 3, 3)
        if config.kernel == "copy":
            if channels != before:
                raise ConfigError(
                    f"shrink.kernel = copy: W1 goes from {before} to {channels} channels and cannot run on its own "
                    f"output; set model.kernel_channels={before} or shrink.kernel=box"
                )
            kernel.copy_(expansion.kernel.detach())
        elif config.kernel == "identity":
            kernel[:, :, 1, 1] = torch.eye(channels)
        else:
            kernel += torch.eye(channels)[:, :, None, None] / 9
        self.clip = config.clip
        self.offset = OffsetBranch(channels, config.bound)
        self.kernel = nn.Parameter(kernel, requires_grad=config.learn_kernel)
        self.classifier = nn.Parameter(expansion.classifier.detach().clone(), requires_grad=config.learn_classifier)

    def class_maps(self, features: Tensor) -> Tensor:
        """F (B, K, h, w) of the Expansion, not clipped -> class maps (B, C, h, w), with their sign."""
        clipped = clip_features(features, self.clip)
        return classify(F.relu(deform_conv(clipped, self.kernel, self.offset(clipped))), self.classifier)


def _kernel(head: CamNet | Decision) -> nn.Parameter:
    if head.kernel is None:
        raise ConfigError("model.kernel_channels = 0 is the plain CAM network, which has no W1: set it above 0")
    return head.kernel
