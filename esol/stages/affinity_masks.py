"""Stage affinity_masks: the class maps after a walk on what the backbone itself finds alike, without any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from esol.base.schema import key
from esol.config import BackboneConfig, Config, WalkConfig
from esol.models.attention import PatchAttention
from esol.models.timm_networks import TokenFeatures
from esol.ops.frozen_affinity import doubly_stochastic
from esol.ops.pseudo_labels import attended_scores, walked_scores
from esol.pipeline.cam import initial_backbone
from esol.pipeline.likeness import BETA, likeness
from esol.pipeline.masks import MaskStage
from esol.pipeline.registry import register


@dataclass(frozen=True)
class AffinityMasksConfig(WalkConfig):
    """Walk on the cosines of frozen features, or on a ViT's attention, for which radius and beta say nothing."""

    beta: float = key(BETA, low=0.01, high=1000)  # power of the cosines
    # of a ViT, whose attention is averaged
    blocks: int = key(8, low=1, high=1024, unit="last blocks")
    # what a class cannot leave: the box around what its map has above this; CLIP-ES: 0.4
    box: float = key(0.0, low=0, high=1, unit="of the map's highest value; 0 = no boxes")


@register
class AffinityMasks(MaskStage):
    """The class maps after a walk on the backbone's own affinities, as its initial weights have them."""

    name = "affinity_masks"
    after = "seed_masks"
    default = False
    section = AffinityMasksConfig
    needs = ("classify", "localize")
    shaped_by = (*MaskStage.shaped_by, "model")
    refines = True
    votes = False  # weaker than what PSA and IRN learn from the same maps: the vote is theirs
    config: AffinityMasksConfig

    def open(self) -> None:
        super().open()
        classes = len(self.context.index.classes)
        backbone = initial_backbone(self.context.config, classes, freeze="all")
        self.backbone = self.context.ready(backbone)
        plain = isinstance(backbone.body, TokenFeatures)
        self.attention = PatchAttention(self.backbone, self.config.blocks) if plain else None

    def scores_of(self, images: Sequence[Tensor], maps: Sequence[dict[str, NDArray[Any]]]) -> list[Tensor]:
        low = [torch.from_numpy(own["stride4"]).to(image.device) for own, image in zip(maps, images, strict=True)]
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        attention, config = self.attention, self.config
        if attention is None:
            return walked_scores(low, lambda i: self._cosines(images[i]), sizes, config, config.box)

        def transition(i: int) -> tuple[Tensor, int]:
            with self.context.engine.autocast():
                matrix, width = attention(images[i])
            return doubly_stochastic(matrix), width

        return attended_scores(low, transition, sizes, config, config.box)

    def _cosines(self, image: Tensor) -> Tensor:
        with self.context.engine.autocast():
            return likeness(self.backbone, image, self.config.radius)

    @classmethod
    def weights(cls, config: Config) -> tuple[str, BackboneConfig]:
        return "model", config.model
