"""Stage expand: offsets that maximise the classification loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from esol.base.schema import key
from esol.config import Config, LabelConfig
from esol.data.samples import Batch
from esol.models.cam_net import CamNet, pool
from esol.models.heads import Decision, Expansion, Heads
from esol.pipeline.cam import CamStage
from esol.pipeline.registry import register
from esol.training.head import HeadTask
from esol.training.losses import classification_loss
from esol.training.task import ParameterGroup, Task


@dataclass(frozen=True)
class ExpandConfig(LabelConfig):
    """The expansion sampler: offsets that maximise the classification loss (paper, section Expansion)."""

    duration: str = key("1600 images")  # the loss has no upper bound: duration, lr and alpha are one budget
    lr: float = key(0.05, low=0, high=100)
    momentum: float = key(0.0, low=0, high=1)  # with it all offsets run one way and the maps shift
    poly_power: float = key(0.0, low=0, high=10)
    alpha: float = key(1.0, low=0, high=1000)  # weight of the inverse loss
    classes: Literal["all", "present"] = key("all")  # whose loss is maximised
    bound: float = key(1.0, low=0, high=64, unit="feature-grid pixels")  # r in r*tanh(o/r); 0 = free offsets
    clip: float = key(0.2, low=0, high=1)  # beta of feature clipping; 0 = off
    game: bool = key(False)  # W1 and V minimise while the offsets maximise


class ExpandTask(HeadTask):
    """-alpha * L_cls(GAP(V * clip(relu(dcn(X; W1, offset(X)))))); hands over the Expansion.

    The network is frozen and only the offset branch learns. As a min-max game W1 and V descend L_cls while the offsets
    climb alpha times it, in one backward pass.
    """

    handover: Expansion

    def __init__(
        self, net: CamNet, config: ExpandConfig, decision: Decision | None = None, absence: Tensor | None = None
    ) -> None:
        """decision: where Expansion starts from; None = from the network."""
        super().__init__(net, absence)
        self.handover = expansion(decision or net, config)
        self.config = config

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """losses: loss; report: classification, the loss to maximise, and offset, the mean size in grid pixels."""
        config, expansion = self.config, self.handover
        x = self.features(batch)
        offset = expansion.offset(x)
        driven = _Reverse.apply(offset, config.alpha) if config.game else offset
        logits = pool(expansion.class_maps(expansion.features(x, driven)))
        with torch.autocast(logits.device.type, enabled=False):
            each = classification_loss(logits, batch["labels"], config.classes, self.absence)
            classification = each.mean()
        loss = classification if config.game else -config.alpha * classification
        return {"loss": loss}, {"classification": classification.detach(), "mean_offset": offset.detach().abs().mean()}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The offset branch; in the game W1 and V as well."""
        expansion = self.handover
        groups = [ParameterGroup("offset", list(expansion.offset.parameters()))]
        if self.config.game:
            groups.append(ParameterGroup("head", [expansion.kernel, expansion.classifier]))
        return groups


class _Reverse(torch.autograd.Function):
    """Identity whose gradient is turned round and scaled: what lies before it climbs the loss."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return -ctx.alpha * gradient, None


@register
class Expand(CamStage):
    """The expansion sampler, on the head that decide has trained or, without it, on the network's."""

    name = "expand"
    after = "decide"
    source = "expand"
    section = ExpandConfig
    version = 3
    needs = ("classify",)
    uses = ("decide",)
    config: ExpandConfig

    def task(self) -> Task:
        heads = self.heads()
        decision = cast(Decision, heads["decide"]) if "decide" in heads else None
        return ExpandTask(heads.net, self.config, decision, self.absence())

    @classmethod
    def head(cls, config: Config, heads: Heads, num_classes: int) -> Expansion:
        return expansion(heads.net, config.section(ExpandConfig))


def expansion(head: CamNet | Decision, config: ExpandConfig) -> Expansion:
    """A new Expansion on a head, as the section has it."""
    return Expansion(head, config.clip, config.bound, config.game)
