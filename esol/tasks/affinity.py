"""Stage psa: AffinityNet on pairs of pixels of the affinity labels."""

from __future__ import annotations

import torch
from torch import Tensor

from esol.config import PsaConfig
from esol.models.affinity_net import STRIDE, AffinityNet
from esol.ops.pairs import feature_affinity, pair_labels
from esol.training.task import Batch, ParameterGroup, Task


class Affinity(Task):
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


def affinity_losses(affinity: Tensor, pairs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy per image of its background, foreground and different pairs: three (B,).

    affinity a (B, K, h, w) in 0..1; pairs: the three masks of `pair_labels`. The mean over the pairs of a kind of
    -log(a + 1e-5), for different ones of -log(1 - a + 1e-5); 0 where there are none. Source: PSA, IRN.
    """
    background, foreground, different = pairs
    each = -torch.log(torch.where(different, 1 - affinity, affinity) + 1e-5)
    return _pair_mean(each, background), _pair_mean(each, foreground), _pair_mean(each, different)


def _pair_mean(values: Tensor, pairs: Tensor) -> Tensor:
    return (values * pairs).sum((1, 2, 3)) / pairs.sum((1, 2, 3)).clamp_min(1)
