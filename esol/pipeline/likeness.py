"""What a network finds alike in a photo without having learned to, on the grid where masks are walked and judged."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from esol.base.errors import ConfigError
from esol.models.backbones import Backbone
from esol.models.regrid import regrid, squeeze_to_grid
from esol.ops.frozen_affinity import cosine_affinity, normalised_cut

STRIDE = 8  # of the grid
RADIUS, BETA = 5, 5.0  # how far two places may be apart, and the power of their cosine
FINEST, COARSEST = 4, 16  # strides of the levels that say what is alike


def likeness(backbone: Backbone, image: Tensor, radius: int = RADIUS) -> Tensor:
    """Cosines between a photo's features at near places: pairs (K, ceil(H/8), ceil(W/8)) in 0..1.

    image uint8 (3, H, W), on the backbone's device; a network without levels is asked for its last features.
    """
    size = (-(-image.shape[1] // STRIDE), -(-image.shape[2] // STRIDE))
    try:
        strides = [stride for _, stride in backbone.levels]
        levels = backbone.pyramid(squeeze_to_grid(image, max(strides)))
    except ConfigError:
        strides = [backbone.stride]
        levels = [backbone(squeeze_to_grid(image, backbone.stride))]
    alike = [regrid(levels[i].float(), strides[i], STRIDE, size)[0] for i in telling(strides)]
    return cosine_affinity(alike, radius)


def parted(cosines: Tensor, mask: Tensor) -> float:
    """The normalised cut, 0..1, of a photo's label map (H, W) by what `likeness` says of the photo."""
    small = F.interpolate(mask[None, None].float(), cosines.shape[1:], mode="nearest-exact")[0, 0]
    return normalised_cut(cosines**BETA, small, RADIUS)


def telling(strides: Sequence[int]) -> list[int]:
    """The levels whose features say what is alike: strides 4 to 16, but for the last, which is of whole objects."""
    found = [i for i, stride in enumerate(strides[:-1]) if FINEST <= stride <= COARSEST]
    return found or [len(strides) - 1]
