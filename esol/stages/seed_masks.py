"""Stage seed_masks: the class maps themselves as pseudo masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from esol.config import MaskConfig
from esol.pipeline.masks import MaskStage
from esol.pipeline.registry import register


@dataclass(frozen=True)
class SeedMasksConfig(MaskConfig):
    """Seeds as pseudo masks, without any affinity; a score is the class map."""


@register
class SeedMasks(MaskStage):
    """The class maps themselves."""

    name = "seed_masks"
    after = "localize"
    section = SeedMasksConfig
    version = 4
    config: SeedMasksConfig

    def scores(self, image: Tensor, maps: dict[str, NDArray[Any]]) -> Tensor:
        return torch.from_numpy(maps["full"]).to(image.device).float() / 255
