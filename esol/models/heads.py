"""The heads behind the CAM network's backbone: what the stages after classify train, and the class maps of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esol.base.errors import ConfigError
from esol.models.cam_net import CamNet, classify
from esol.models.sampler import OffsetBranch, Taps, deform_conv


class Head(Protocol):
    """What makes class maps of the backbone's features."""

    def head_maps(self, x: Tensor, made: dict[str, Tensor]) -> Tensor:
        """X (B, Cf, h, w) -> class maps (B, C, h, w), with their sign.

        made: features that heads have left for those behind them, by a name of their own.
        """


class Heads(nn.Module):
    """The CAM network, which has the backbone, and the heads behind it: source -> head, in the order of the stages."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict()

    def add(self, source: str, head: nn.Module) -> None:
        """A head behind those that are there; the first is a CamNet."""
        self.heads[source] = head

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[str]:
        return iter(self.heads)

    def __contains__(self, source: str) -> bool:
        return source in self.heads

    def __getitem__(self, source: str) -> nn.Module:
        return self.heads[source]

    @property
    def net(self) -> CamNet:
        """The network whose backbone all share."""
        return cast(CamNet, next(iter(self.heads.values())))

    def class_maps(self, image: Tensor) -> dict[str, Tensor]:
        """uint8 or float (B, 3, H, W) -> class maps (B, C, h, w) of every head, with their sign; one backbone pass."""
        x, made = self.net.features(image), dict[str, Tensor]()
        return {source: cast(Head, head).head_maps(x, made) for source, head in self.heads.items()}


def clip_features(features: Tensor, beta: float) -> Tensor:
    """Feature clipping: min(F, beta * max F) per image and channel of (B, K, h, w); beta 0 leaves F as it is."""
    return torch.minimum(features, beta * features.amax((2, 3), keepdim=True)) if beta else features


class Decision(nn.Module):
    """W1 and V of the network, copied to be trained on, with clipping between them. clip: beta, 0 = off."""

    def __init__(self, net: CamNet, clip: float) -> None:
        super().__init__()
        self.clip = clip
        self.kernel = nn.Parameter(_kernel(net).detach().clone())
        self.classifier = nn.Parameter(net.classifier.detach().clone())

    def class_maps(self, x: Tensor) -> Tensor:
        """X (B, Cf, h, w) -> class maps (B, C, h, w) of the clipped features, with their sign."""
        features = F.relu(F.conv2d(x, self.kernel, padding=1))
        return classify(clip_features(features, self.clip), self.classifier)

    def head_maps(self, x: Tensor, made: dict[str, Tensor]) -> Tensor:
        """As Head has it."""
        return self.class_maps(x)


class Expansion(nn.Module):
    """The expansion sampler on backbone features X, with its own copies of W1 and V: the network's or the Decision's.

    clip: beta of feature clipping, 0 = off; bound: of the offsets in grid pixels, 0 = free; game: W1 and V learn as
    well as the offsets. Source: paper, section Expansion.
    """

    def __init__(self, head: CamNet | Decision, clip: float, bound: float, game: bool = False) -> None:
        super().__init__()
        kernel = _kernel(head)
        self.clip = clip
        self.offset, self._taps = OffsetBranch(kernel.shape[1], bound), Taps()
        self.kernel = nn.Parameter(kernel.detach().clone(), requires_grad=game)
        self.classifier = nn.Parameter(head.classifier.detach().clone(), requires_grad=game)

    def features(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        """X (B, Cf, h, w) -> F (B, K, h, w), not clipped; offset (B, 18, h, w) stands in for the branch's."""
        return F.relu(deform_conv(x, self.kernel, self.offset(x) if offset is None else offset, self._taps))

    def class_maps(self, features: Tensor) -> Tensor:
        """F (B, K, h, w) -> class maps (B, C, h, w) of the clipped features, with their sign."""
        return classify(clip_features(features, self.clip), self.classifier)

    def head_maps(self, x: Tensor, made: dict[str, Tensor]) -> Tensor:
        """As Head has it; leaves F under "expanded"."""
        made["expanded"] = self.features(x)
        return self.class_maps(made["expanded"])


class Shrinkage(nn.Module):
    """The shrinkage sampler on expanded features F: clip, sample with W2 (K -> K), classify with V.

    clip, bound: as Expansion's; start: what W2 starts as, the identity (centre tap), a copy (of W1, where K equals the
    backbone's channels) or a box (1/9 each tap); learn_kernel, learn_classifier: whether W2 and V learn.
    Source: paper, section Shrinkage; W2 and the learning V are open there.
    """

    def __init__(
        self,
        expansion: Expansion,
        clip: float,
        bound: float,
        start: Literal["identity", "copy", "box"] = "box",
        learn_kernel: bool = True,
        learn_classifier: bool = True,
    ) -> None:
        super().__init__()
        channels, before = expansion.kernel.shape[:2]
        kernel = torch.zeros(channels, channels, 3, 3)
        if start == "copy":
            if channels != before:
                raise ConfigError(
                    f"shrink.kernel = copy: W1 goes from {before} to {channels} channels and cannot run on its own "
                    f"output; set model.kernel_channels={before} or shrink.kernel=box"
                )
            kernel.copy_(expansion.kernel.detach())
        elif start == "identity":
            kernel[:, :, 1, 1] = torch.eye(channels)
        else:
            kernel += torch.eye(channels)[:, :, None, None] / 9
        self.clip = clip
        self.offset, self._taps = OffsetBranch(channels, bound), Taps()
        self.kernel = nn.Parameter(kernel, requires_grad=learn_kernel)
        self.classifier = nn.Parameter(expansion.classifier.detach().clone(), requires_grad=learn_classifier)

    def class_maps(self, features: Tensor) -> Tensor:
        """F (B, K, h, w) of the Expansion, not clipped -> class maps (B, C, h, w), with their sign."""
        clipped = clip_features(features, self.clip)
        sampled = deform_conv(clipped, self.kernel, self.offset(clipped), self._taps)
        return classify(F.relu(sampled), self.classifier)

    def head_maps(self, x: Tensor, made: dict[str, Tensor]) -> Tensor:
        """As Head has it; takes the F that the Expansion before it has left."""
        return self.class_maps(made["expanded"])


def _kernel(head: CamNet | Decision) -> nn.Parameter:
    if head.kernel is None:
        raise ConfigError("model.kernel_channels = 0 is the plain CAM network, which has no W1: set it above 0")
    return head.kernel
