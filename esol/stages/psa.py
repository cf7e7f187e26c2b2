"""Stages psa_labels, psa and psa_masks: AffinityNet, and a random walk of the class maps on its affinities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from esol.base.errors import StrideError
from esol.base.schema import key
from esol.config import Auto, BackboneConfig, Config, CrfConfig, PairConfig, WalkConfig
from esol.data.samples import Batch
from esol.models.affinity_net import STRIDE, AffinityNet
from esol.models.backbones import Backbone
from esol.models.regrid import squeeze_to_grid
from esol.ops.pairs import feature_affinity, pair_labels
from esol.ops.pseudo_labels import psa_labels, psa_scores
from esol.pipeline.cam import initial_backbone, new_backbone
from esol.pipeline.labels import LabelStage
from esol.pipeline.masks import MaskStage
from esol.pipeline.registry import register
from esol.pipeline.training import MaskTrainingStage, Target
from esol.pipeline.weights import restore
from esol.training.losses import affinity_losses
from esol.training.task import ParameterGroup, Task


@dataclass(frozen=True)
class PsaLabelsConfig:
    """PSA's label synthesis: the CRF on class maps with a low and a high background."""

    alpha_low: float | Auto = key("auto", low=0, high=1000)  # background (1 - best)^alpha; a class here is foreground
    alpha_high: float | Auto = key("auto", low=0, high=1000)  # and background here is background; the rest is void
    crf: CrfConfig = field(default_factory=lambda: CrfConfig(bilateral_sxy=80.0, bilateral_srgb=13.0))


@dataclass(frozen=True)
class PsaConfig(PairConfig):
    """AffinityNet. Momentum 5e-4 is what PSA really trains with: it passes the weight decay in that place."""

    duration: str = key("8 epochs, 2000 to 100000 images")
    # photos that one step learns from
    global_batch: int = key(8, low=1, high=65536, unit="images per optimizer step, over all ranks")
    # what lr is for
    lr_batch: int = key(8, low=1, high=65536, unit="images that lr is for; another global_batch scales it")
    momentum: float = key(5e-4, low=0, high=1)
    weight_decay: float = key(5e-4, low=0, high=1)  # pull of the weights towards zero
    # the rate of the new layers
    head_lr: float = key(10.0, low=0, high=1000, unit="times lr, for the new layers; biases twice that of their part")


@dataclass(frozen=True)
class PsaMasksConfig(WalkConfig):
    """Walk on AffinityNet's affinities; a score is a class over class + background."""

    beta: float = key(8.0, low=0.01, high=1000)  # power of the affinities


@register
class PsaLabels(LabelStage):
    """PSA: dense CRF on the class maps with a low and a high background."""

    name = "psa_labels"
    after = "seed_masks"
    section = PsaLabelsConfig
    version = 2
    config: PsaLabelsConfig

    def labels(self, images: Sequence[Tensor], maps: Sequence[Tensor], classes: Sequence[Tensor]) -> list[Tensor]:
        return psa_labels(images, maps, classes, self.config.crf, self.config.alpha_low, self.config.alpha_high)


class PsaTask(Task):
    """bg / 4 + fg / 4 + neg / 2: the affinity losses of the pairs nearer than the radius; hands over the network.

    Each is a mean over the image's own pairs, 0 where it has none, then over the images. PSA's public code has the mean
    over all pairs of the batch, which depends on how a batch is split over ranks.
    """

    handover: AffinityNet

    def __init__(self, net: AffinityNet, config: PsaConfig) -> None:
        super().__init__()
        self.handover = net
        self.config = config

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """losses: loss, background, foreground, negative; no report. The label of a feature is its pixel's."""
        features = self.handover(batch["image"])
        labels = batch["target"][:, ::STRIDE, ::STRIDE]
        with torch.autocast(features.device.type, enabled=False):
            affinity = feature_affinity(features, self.config.radius)
            each = affinity_losses(affinity, pair_labels(labels, self.config.radius))
            background, foreground, negative = (loss.mean() for loss in each)
            loss = background / 4 + foreground / 4 + negative / 2
        return {"loss": loss, "background": background, "foreground": foreground, "negative": negative}, {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The backbone's unfrozen weights at the base rate, its biases at twice that without decay; the head's own."""
        net = self.handover
        learning = [(name, p) for name, p in net.backbone.named_parameters() if p.requires_grad]
        weights = [p for name, p in learning if not name.endswith(".bias")]
        biases = [p for name, p in learning if name.endswith(".bias")]
        head = [*net.reduce.parameters(), *net.join.parameters()]
        groups = (
            ParameterGroup("backbone", weights),
            ParameterGroup("backbone_bias", biases, lr_multiplier=2, weight_decay=False),
            ParameterGroup("head", head, lr_multiplier=self.config.head_lr),
        )
        return [group for group in groups if group.parameters]


def _finest(build: Callable[..., Backbone]) -> Backbone:
    """The backbone at output stride 8, as PSA has it, or at the section's own where the network cannot be so fine."""
    try:
        return build(output_stride=STRIDE)
    except StrideError:
        return build()


@register
class Psa(MaskTrainingStage):
    """AffinityNet, at output stride 8 as PSA has it, on the labels of psa_labels."""

    name = "psa"
    after = "psa_labels"
    section = PsaConfig
    version = 3
    needs = ("classify", "psa_labels")
    shaped_by = ("data.mask_split", "data.damaged", "model")
    config: PsaConfig

    def task(self) -> Task:
        config, classes = self.context.config, len(self.context.index.classes)
        backbone = _finest(partial(initial_backbone, config, classes))
        return PsaTask(AffinityNet(backbone), self.config)

    def target(self) -> Target:
        return self.made_by("psa_labels", "label.png")

    @classmethod
    def weights(cls, config: Config) -> tuple[str, BackboneConfig]:
        return "model", config.model


@register
class PsaMasks(MaskStage):
    """The class maps after a walk on AffinityNet's affinities."""

    name = "psa_masks"
    after = "psa"
    section = PsaMasksConfig
    version = 7
    needs = ("localize", "psa")
    refines = True
    config: PsaMasksConfig

    def open(self) -> None:
        super().open()
        net = AffinityNet(_finest(partial(new_backbone, self.context.config)))
        self.net = self.context.ready(restore(net, self.context.config, "psa"))

    def scores_of(self, images: Sequence[Tensor], maps: Sequence[dict[str, NDArray[Any]]]) -> list[Tensor]:
        with self.context.engine.autocast():
            features = [self.net(squeeze_to_grid(image, STRIDE))[0].float() for image in images]
        low = [torch.from_numpy(own["stride4"]).to(image.device) for own, image in zip(maps, images, strict=True)]
        return psa_scores(low, features, [(image.shape[1], image.shape[2]) for image in images], self.config)
