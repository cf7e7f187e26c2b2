"""Stage expand: offsets that maximise the classification loss."""

from __future__ import annotations

import torch
from torch import Tensor

from esol.config import ExpandConfig
from esol.models.cam_net import CamNet, pool
from esol.models.expansion import Decision, Expansion
from esol.training.head import HeadTask
from esol.training.losses import classification_loss
from esol.training.task import Batch, ParameterGroup


class Expand(HeadTask):
    """-alpha * L_cls(GAP(V * clip(relu(dcn(X; W1, offset(X)))))); hands over the Expansion.

    The network is frozen and only the offset branch learns. As a min-max game W1 and V descend L_cls while the offsets
    climb alpha times it, in one backward pass.
    """

    handover: Expansion

    def __init__(
        self,
        net: CamNet,
        config: ExpandConfig,
        decision: Decision | None = None,
        absence: Tensor | None = None,
    ) -> None:
        """decision: where Expansion starts from; None = from the network."""
        super().__init__(net, absence)
        self.handover = Expansion(decision or net, config)
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
        return {"loss": loss}, {"classification": classification.detach(), "offset": offset.detach().abs().mean()}

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
