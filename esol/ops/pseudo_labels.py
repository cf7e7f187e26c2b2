"""From class maps to label maps: the labels that PSA and IRN learn from, and the walked scores of their networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from esol.base.palette import VOID
from esol.config import Auto, CrfConfig, MaskConfig, WalkConfig
from esol.ops.dense_crf import mean_field, unary_from_labels, unary_from_probabilities
from esol.ops.pairs import boundary_affinity, feature_affinity
from esol.ops.random_walk import random_walk
from esol.ops.thresholds import auto_threshold, background_power, power_threshold

PSA_PIXELS, IRN_PIXELS = 32, 48  # of the grid for each step: at VOC's photos about 100 for PSA, 256 for IRN


def psa_labels(
    image: Tensor,
    maps: Tensor,
    classes: Tensor,
    crf: CrfConfig,
    alpha_low: float | Auto = "auto",
    alpha_high: float | Auto = "auto",
) -> Tensor:
    """PSA's label synthesis: class where it wins over the low-alpha background, 0 where the high-alpha one wins.

    auto: the low background meets the best map at the photo's own threshold, the high alpha is 8 times the low, as in
    PSA.

    image uint8 (3, H, W); maps float (n, H, W) in 0..1 of the classes (n,), indices without background. Returns uint8
    (H, W): 0, class index + 1, 255 where neither is sure. Source: PSA, infer_cls.py and voc12/data.py.
    """
    best = _best(maps)
    alpha = background_power(auto_threshold(best))
    alphas = (alpha * times if given == "auto" else given for times, given in ((1, alpha_low), (8, alpha_high)))
    unaries = [unary_from_probabilities(torch.cat(((1 - best)[None] ** a, maps))) for a in alphas]
    low, high = (q.argmax(0) for q in mean_field(image, unaries, crf))
    return _merge(low, high, classes)


def irn_labels(
    image: Tensor,
    maps: Tensor,
    classes: Tensor,
    crf: CrfConfig,
    foreground: float | Auto = "auto",
    background: float | Auto = "auto",
    certainty: float = 0.7,
) -> Tensor:
    """IRN's label synthesis: class where the foreground threshold's seeds have one, 0 where neither threshold's do.

    auto: where backgrounds of .6 and 5 times the alpha of the photo's own threshold meet the best map, which for a CAM
    makes about IRN's .30 and .05.

    Shapes as psa_labels. Source: IRN, step/cam_to_ir_label.py.
    """
    alpha = background_power(auto_threshold(_best(maps)))
    thresholds = (
        power_threshold(times * alpha) if given == "auto" else given
        for times, given in ((0.6, foreground), (5, background))
    )
    unaries = [unary_from_labels(_winner(maps, t), len(maps) + 1, certainty) for t in thresholds]
    low, high = (q.argmax(0) for q in mean_field(image, unaries, crf))
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
    threshold = mask_threshold(config, scores)
    plain = _winner(scores, threshold) if labels is None else labels
    if config.unary == "hard":
        unary = unary_from_labels(plain, len(scores) + 1, config.certainty)
    else:
        if channels is None:
            channels = torch.cat((scores.new_full((1, *scores.shape[1:]), threshold), scores))
        unary = unary_from_probabilities(channels / channels.sum(0, keepdim=True).clamp_min(1e-5))
    refined = mean_field(image, [unary], config.crf)[0].argmax(0) if config.crf.iterations else plain
    return _to_classes(plain, classes), _to_classes(torch.where(plain == VOID, plain, refined), classes)


def mask_threshold(config: MaskConfig, scores: Tensor) -> float:
    """The threshold of one photo's scores (n, H, W).

    auto: .5 where a background has walked along, which the strongest class has to beat, else what the scores name.
    """
    if config.threshold != "auto":
        return config.threshold
    return 0.5 if isinstance(config, WalkConfig) and config.alpha else auto_threshold(_best(scores))


def psa_scores(maps: Tensor, features: Tensor, size: tuple[int, int], config: WalkConfig) -> Tensor:
    """Class maps and their background walked on AffinityNet's affinities: class / (best + background), (n, H, W).

    maps (n, h', w') in 0..1, any grid over the whole image; features (C, h, w), stride 8. Source: PSA, infer_aff.py.
    """
    if not len(maps):
        return maps.new_zeros(0, *size)
    maps = _enlarge(maps.float(), (features.shape[1], features.shape[2]))
    rivals = torch.cat((_background(maps, config.alpha), maps))
    steps = walk_steps(config.steps, features.shape[1] * features.shape[2], PSA_PIXELS)
    walked = random_walk(
        rivals[None], feature_affinity(features[None], config.radius), config.radius, config.beta, steps
    )
    return _over_background(_enlarge(walked[0], size))


def irn_scores(maps: Tensor, edge: Tensor, size: tuple[int, int], config: WalkConfig) -> Tensor:
    """Class maps and their background walked between boundaries: class / (best + background), (n, H, W).

    maps (n, h, w) in 0..1; edge (h, w) in 0..1, both of stride 4. alpha 0: no background walks, and scores are divided
    by the image's maximum. Source: IRN, step/make_sem_seg_labels.py; the background that walks along is PSA's.
    """
    if not len(maps):
        return maps.new_zeros(0, *size)
    maps = maps.float()
    rivals = torch.cat((_background(maps, config.alpha), maps)) if config.alpha else maps
    steps = walk_steps(config.steps, edge.numel(), IRN_PIXELS)
    affinity = boundary_affinity(edge[None], config.radius)
    walked = random_walk((rivals * (1 - edge))[None], affinity, config.radius, config.beta, steps)[0]
    walked = _enlarge(walked, size)
    return _over_background(walked) if config.alpha else walked / walked.amax().clamp_min(1e-5)


def walk_steps(steps: int | Auto, pixels: int, pixels_a_step: int) -> int:
    """The steps of a walk on a grid of so many pixels.

    auto: in proportion to the grid. s steps reach about sqrt(s) pixels far, so that the walk reaches the same share of
    a small photo and of a large one, where a fixed number carries a small photo's object off into its background.
    """
    return max(1, round(pixels / pixels_a_step)) if steps == "auto" else steps


def _background(maps: Tensor, alpha: float | Auto) -> Tensor:
    """(1 - best)^alpha of maps (n, h, w), (1, h, w); auto: it meets the best map at the photo's own threshold."""
    best = maps.amax(0, keepdim=True)
    return (1 - best).clamp_min(0) ** (background_power(auto_threshold(best)) if alpha == "auto" else alpha)


def _over_background(walked: Tensor) -> Tensor:
    """Background and classes (1 + n, H, W) -> class / (best + background), above .5 where a class is the strongest."""
    return walked[1:] / (walked[1:].amax(0) + walked[0]).clamp_min(1e-5)


def _best(maps: Tensor) -> Tensor:
    """(n, H, W) -> (H, W), 0 where n is 0."""
    return maps.amax(0) if len(maps) else maps.new_zeros(maps.shape[1:])


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
