"""Losses in float32, one value per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from esol.base.named import Named
from esol.models.cam_net import pool

ABSENT = 5.0  # how much more than its presence a class's absence may weigh over a set; about its weight in voc-animals


def absence_weights(occurrence: Tensor, photos: int) -> Tensor:
    """What a class weighs where it is absent, against 1 where it is present: float32 (C,) in 0..1.

    occurrence (C,): how many of the photos show each class. 1, unless the photos without the class outnumber those with
    it by more than ABSENT: then so much less that they weigh ABSENT times as much together. 0 for a class that occurs
    nowhere.
    """
    shown = occurrence.float()
    return (ABSENT * shown / (photos - shown).clamp_min(1)).clamp_max(1)


def classification_loss(
    logits: Tensor, labels: Tensor, classes: Literal["all", "present"] = "all", absence: Tensor | None = None
) -> Tensor:
    """Binary cross entropy per image of pooled class maps: logits, labels (B, C) -> (B,).

    absence (C,), of absence_weights: the sum over the classes, those that the image lacks weighted by it, over 1 +
    ABSENT. So a class that is present weighs the same among 2 classes and among 80, and one that occurs nowhere weighs
    nothing. Without it: the mean over all classes, the multi-label soft margin loss of IRN's CAM. present: the mean
    over the classes that the image shows, alone.
    """
    each = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    if classes == "present":
        return _present_mean(each, labels)
    if absence is None:
        return each.mean(1)
    return (each * torch.where(labels > 0, 1, absence.to(each.dtype))).sum(1) / (1 + ABSENT)


AREA_TERMS: Named[Callable[[Tensor], Tensor]] = Named("area term")
"""Class maps A (B, C, h, w), float32 or wider -> how much of the map each position is, in 0..1, of the same shape."""


@AREA_TERMS.add("mean")
def normalised(maps: Tensor) -> Tensor:
    """N = (A - min) / (max - min), all of it with gradient."""
    high, low = maps.amax((2, 3), keepdim=True), maps.amin((2, 3), keepdim=True)
    return (maps - low) / (high - low + 1e-5)


@AREA_TERMS.add("decide")
def undecided(maps: Tensor) -> Tensor:
    """4 N (1 - N), 0 where N is 0 or 1, so that it does not darken what is bright."""
    each = normalised(maps)
    return 4 * each * (1 - each)


@AREA_TERMS.add("max")
def over_maximum(maps: Tensor) -> Tensor:
    """relu(A) over its detached maximum, which switching every map off minimises: it was seen to collapse."""
    return F.relu(maps) / (maps.amax((2, 3), keepdim=True).detach().clamp_min(0) + 1e-5)


def area_loss(maps: Tensor, labels: Tensor, term: str = "mean") -> Tensor:
    """What the present classes' maps A cover, per image: maps (B, C, h, w), labels (B, C) -> (B,), in 0..1.

    term: of AREA_TERMS. The paper has the area, not how A is normalised; decide is ours.
    """
    maps = maps if maps.dtype == torch.float64 else maps.float()
    return _present_mean(AREA_TERMS[term](maps).mean((2, 3)), labels)


def classification_and_area(
    maps: Tensor, labels: Tensor, weight: float, term: str, absence: Tensor | None = None
) -> dict[str, Tensor]:
    """L_cls + weight * L_area of class maps (B, C, h, w): scalars loss, classification, area, means over the images."""
    logits = pool(maps)
    with torch.autocast(maps.device.type, enabled=False):
        classification = classification_loss(logits, labels, absence=absence).mean()
        area = area_loss(maps, labels, term).mean()
        loss = classification + weight * area
    return {"loss": loss, "classification": classification, "area": area}


def segmentation_loss(logits: Tensor, labels: Tensor, balance: bool) -> Tensor:
    """Cross entropy per image: logits (B, L, h, w), labels int (B, h, w) 0..L-1 or 255, which is ignored -> (B,).

    The mean over the labelled pixels, 0 without any. balance: half the mean over the background's pixels plus half that
    over the foreground's, each 0 without any, so that neither drowns the other. Source: DSRG (CVPR 2018), seeding loss.
    """
    each = F.cross_entropy(logits, labels.long(), ignore_index=255, reduction="none")
    known = (labels != 255, labels == 0, (labels != 255) & (labels != 0))
    everywhere, background, foreground = ((each * mask).sum((1, 2)) / mask.sum((1, 2)).clamp_min(1) for mask in known)
    return (background + foreground) / 2 if balance else everywhere


def affinity_losses(affinity: Tensor, pairs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy per image of its background, foreground and different pairs: three (B,).

    affinity a (B, K, h, w) in 0..1; pairs: the three masks of `pair_labels`. The mean over the pairs of a kind of
    -log(a + 1e-5), for different ones of -log(1 - a + 1e-5); 0 where there are none. Source: PSA, IRN.
    """
    background, foreground, different = _PairCrossEntropy.apply(affinity, *pairs).unbind(1)
    return background, foreground, different


class _PairCrossEntropy(torch.autograd.Function):
    """The three means of affinity_losses, (B, 3).

    A batch's pairs are far larger than a processor's cache and every operator would go through all of them, so that a
    CPU takes image by image; the gradient computes the logarithm's argument again.
    """

    @staticmethod
    def forward(ctx: Any, affinity: Tensor, *kinds: Tensor) -> Tensor:
        count, total = affinity.new_empty(len(affinity), 3), affinity.new_empty(len(affinity), 3)
        for part in _at_a_time(affinity):
            masks, argument = _masks_and_argument(affinity, kinds, part)
            count[part] = masks.sum(2).clamp_min(1)
            total[part] = -torch.matmul(masks, argument.log_()[:, :, None])[:, :, 0]
        ctx.save_for_backward(affinity, count, *kinds)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        affinity, count, *kinds = ctx.saved_tensors
        weight = upstream / count
        weight[:, :2].neg_()  # numbers of the host would have to be waited for
        gradient = torch.empty_like(affinity)
        for part in _at_a_time(affinity):
            masks, argument = _masks_and_argument(affinity, kinds, part)
            pull = torch.matmul(weight[part, None], masks)[:, 0].mul_(argument.reciprocal_())
            gradient[part] = pull.view(gradient[part].shape)
        return gradient, None, None, None


def _masks_and_argument(affinity: Tensor, kinds: Sequence[Tensor], part: slice) -> tuple[Tensor, Tensor]:
    """Of some images: which pairs are of each kind, (b, 3, N), and what the logarithm is taken of, (b, N)."""
    masks = torch.stack([kind[part].flatten(1) for kind in kinds], 1).to(affinity.dtype)
    return masks, (masks[:, 2] - affinity[part].flatten(1)).abs_().add_(1e-5)  # of different ones 1 - a, else a


def _at_a_time(values: Tensor) -> list[slice]:
    """Which images are computed together."""
    step = 1 if values.device.type == "cpu" else max(1, len(values))
    return [slice(start, start + step) for start in range(0, len(values), step)]


def _present_mean(values: Tensor, labels: Tensor) -> Tensor:
    present = labels.to(values.dtype)
    return (values * present).sum(1) / present.sum(1).clamp_min(1)
