"""From class maps to label maps: the labels that PSA and IRN learn from, and the walked scores of their networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from esol.config import IrnLabelsConfig, IrnMasksConfig, MaskConfig, PsaLabelsConfig, PsaMasksConfig
from esol.localize.dense_crf import mean_field, unary_from_labels, unary_from_probabilities
from esol.localize.pairs import boundary_affinity, feature_affinity
from esol.localize.random_walk import random_walk
from esol.metrics import VOID


def psa_labels(image: Tensor, maps: Tensor, classes: Tensor, config: PsaLabelsConfig) -> Tensor:
    """PSA's label synthesis: class where it wins over the low-alpha background, 0 where the high-alpha one wins.

    image uint8 (3, H, W); maps float (n, H, W) in 0..1 of the classes (n,), indices without background. Returns uint8
    (H, W): 0, class index + 1, 255 where neither is sure. Source: PSA, infer_cls.py and voc12/data.py.
    """
    best = maps.amax(0, keepdim=True) if len(maps) else maps.new_zeros(1, *maps.shape[1:])
    unaries = [
        unary_from_probabilities(torch.cat(((1 - best) ** alpha, maps)))
        for alpha in (config.alpha_low, config.alpha_high)
    ]
    low, high = (q.argmax(0) for q in mean_field(image, unaries, config.crf))
    return _merge(low, high, classes)


def irn_labels(image: Tensor, maps: Tensor, classes: Tensor, config: IrnLabelsConfig) -> Tensor:
    """IRN's label synthesis: class where the foreground threshold's seeds have one, 0 where neither threshold's do.

    Shapes as psa_labels. Source: IRN, step/cam_to_ir_label.py.
    """
    unaries = [
        unary_from_labels(_winner(maps, threshold), len(maps) + 1, config.certainty)
        for threshold in (config.foreground, config.background)
    ]
    low, high = (q.argmax(0) for q in mean_field(image, unaries, config.crf))
    return _merge(low, high, classes)


def pseudo_mask(
    image: Tensor,
    scores: Tensor,
    classes: Tensor,
    config: MaskConfig,
    labels: Tensor | None = None,
    channels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Label maps of scores (n, H, W) in 0..1, without and with the CRF: uint8 (H, W) twice.

    Background where no score is above the threshold. labels int64 (H, W), 0..n or 255, stand in for that decision where
    another cue, such as saliency, has made it; its void stays void. channels (1 + n, H, W), background first, are what
    that cue decided by: with unary = soft they stand in for the threshold and the scores.
    """
    plain = _winner(scores, config.threshold) if labels is None else labels
    if config.unary == "hard":
        unary = unary_from_labels(plain, len(scores) + 1, config.certainty)
    else:
        if channels is None:
            channels = torch.cat((scores.new_full((1, *scores.shape[1:]), config.threshold), scores))
        unary = unary_from_probabilities(channels / channels.sum(0, keepdim=True).clamp_min(1e-5))
    refined = mean_field(image, [unary], config.crf)[0].argmax(0) if config.crf.iterations else plain
    return _to_classes(plain, classes), _to_classes(torch.where(plain == VOID, plain, refined), classes)


def psa_scores(maps: Tensor, features: Tensor, size: tuple[int, int], config: PsaMasksConfig) -> Tensor:
    """Class maps and their background walked on AffinityNet's affinities: class / (best + background), (n, H, W).

    maps (n, h', w') in 0..1, any grid over the whole image; features (C, h, w), stride 8. Source: PSA, infer_aff.py.
    """
    if not len(maps):
        return maps.new_zeros(0, *size)
    maps = _enlarge(maps.float(), (features.shape[1], features.shape[2]))
    background = (1 - maps.amax(0, keepdim=True)).clamp_min(0) ** config.alpha
    affinity = feature_affinity(features[None], config.radius)
    walked = random_walk(torch.cat((background, maps))[None], affinity, config.radius, config.beta, config.steps)[0]
    walked = _enlarge(walked, size)
    return walked[1:] / (walked[1:].amax(0) + walked[0]).clamp_min(1e-5)


def irn_scores(maps: Tensor, edge: Tensor, size: tuple[int, int], config: IrnMasksConfig) -> Tensor:
    """Class maps walked between boundaries: scores (n, H, W), divided by the image's maximum.

    maps (n, h, w) in 0..1; edge (h, w) in 0..1, both of stride 4. Source: IRN, step/make_sem_seg_labels.py.
    """
    if not len(maps):
        return maps.new_zeros(0, *size)
    affinity = boundary_affinity(edge[None], config.radius)
    walked = random_walk((maps.float() * (1 - edge))[None], affinity, config.radius, config.beta, config.steps)[0]
    walked = _enlarge(walked, size)
    return walked / walked.amax().clamp_min(1e-5)


def _winner(scores: Tensor, threshold: float) -> Tensor:
    """int64 (H, W): 1 + the strongest row where it is above the threshold, else 0."""
    if not len(scores):
        return torch.zeros(scores.shape[1:], dtype=torch.int64, device=scores.device)
    best, row = scores.max(0)
    return torch.where(best > threshold, row + 1, 0)


def _merge(foreground: Tensor, background: Tensor, classes: Tensor) -> Tensor:
    sure = torch.where((foreground == 0) & (background != 0), VOID, foreground)
    return _to_classes(sure, classes)


def _to_classes(rows: Tensor, classes: Tensor) -> Tensor:
    """0..n, or 255, of an image's own classes -> numbers of the data's classes, uint8."""
    table = torch.full((256,), VOID, dtype=torch.uint8, device=rows.device)
    table[0] = 0
    table[1 : len(classes) + 1] = (classes + 1).to(torch.uint8)
    return table[rows]


def _enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """To another grid whose corners are the same pixels."""
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=True)[0]
