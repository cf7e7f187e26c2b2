"""What a training stage is made of: a model and its loss in one module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from esol.data.samples import Batch


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
