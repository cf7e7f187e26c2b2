"""Masks that are wrong in places: which of their pixels a network that learns from them does not believe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from esol.base.palette import VOID


def without_highest_losses(logits: Tensor, labels: Tensor, share: Tensor) -> Tensor:
    """The labels without the pixels that the network finds least likely: those of the highest cross entropy are 255.

    logits (B, L, h, w), labels uint8 (B, h, w) 0..L-1 or 255; share (): of every image's background, and of what is
    not background, rounded down, 0..1. Networks learn what is common before what is odd, so that early on a high loss
    points at a wrong label. Source: small-loss selection (Co-teaching, Han et al., NeurIPS 2018), a photo at a time.
    """
    each = F.cross_entropy(logits.detach(), labels.long(), ignore_index=VOID, reduction="none").flatten(1)
    flat = labels.flatten(1)
    dropped = torch.zeros_like(flat, dtype=torch.bool)
    for part in (flat == 0, (flat != 0) & (flat != VOID)):
        place = each.masked_fill(~part, -1.0).argsort(dim=1, descending=True, stable=True).argsort(1)
        dropped |= part & (place < (share * part.sum(1, keepdim=True)).floor())
    return torch.where(dropped, torch.full_like(flat, VOID), flat).view_as(labels)


def without_the_doubted(logits: Tensor, labels: Tensor, shown: Tensor, sure: Tensor, correct: bool) -> Tensor:
    """The labels, changed where the network is sure of another one: 255, or with `correct` that label.

    logits (B, L, h, w), labels uint8 (B, h, w); shown (B, L - 1): the image's own classes, of which alone a label may
    be, besides background; sure (): the probability among these from which it counts. Void stays void.
    """
    allowed = F.pad(shown > 0, (1, 0), value=True)[:, :, None, None]
    probability, found = logits.detach().float().masked_fill(~allowed, -torch.inf).softmax(1).max(1)
    found = found.to(labels.dtype)
    changed = (probability > sure) & (found != labels) & (labels != VOID)
    return torch.where(changed, found if correct else torch.full_like(found, VOID), labels)


def unbalanced(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, L, h, w) of a network whose loss weighs an image's background and its objects alike, as plain ones.

    Such a network answers as if half of each image were background: the odds are set right by the shares of both among
    the labels (B, h, w), void left out, none below a thousandth.
    """
    known = (labels != VOID).sum((1, 2)).clamp_min(1)
    background = ((labels == 0).sum((1, 2)) / known).clamp(1e-3, 1 - 1e-3)
    shift = torch.stack([background, *[1 - background] * (logits.shape[1] - 1)], 1).log()
    return logits + shift[:, :, None, None]
