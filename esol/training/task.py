"""What a training stage is made of: a model and its loss in one module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NotRequired, TypedDict

from torch import Tensor, nn


class Batch(TypedDict):
    """One micro-batch as the data stream yields it.

    image: uint8 (B, 3, H, W), RGB 0..255, not normalised (the network knows its own mean and deviation);
    labels: float32 (B, C) multi-hot, C classes without background; key: B sample keys; skipped: what was wrong with the
    damaged samples for which others stand in (data.damaged = skip); target: uint8 (B, H, W), the label map,
    0 background, 1..C classes, 255 ignored, in the stages that learn from one.
    """

    image: Tensor
    labels: Tensor
    key: list[str]
    skipped: NotRequired[list[str]]
    target: NotRequired[Tensor]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn together: learning rate multiplier, and whether weight decay applies."""

    name: str
    parameters: list[nn.Parameter]
    lr_multiplier: float = 1.0
    weight_decay: bool = True


class Task(nn.Module):
    """Model and loss of one training stage; engines wrap the whole of it, so that no DDP or ZeRO hook is bypassed.

    Parameters that do not learn have requires_grad False. Every loss is a mean over the images of the batch of a
    value that depends on one image only, so that any split of a global batch over ranks gives the same gradient.
    """

    handover: nn.Module
    """The submodule whose state_dict the stage hands to the later stages."""

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns (losses, report): scalars; losses["loss"] is back-propagated, report is only logged (detached)."""
        raise NotImplementedError

    def parameter_groups(self) -> list[ParameterGroup]:
        """All parameters that learn, each in exactly one group."""
        raise NotImplementedError
