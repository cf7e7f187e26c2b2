"""From class maps to label maps: the labels that PSA and IRN learn from, and the walked scores of their networks.

Everything takes several photos, of any sizes, whose CRF and walk are computed side by side; on a CPU what comes of a
photo is the same to the bit with and without others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from esol.base.palette import VOID
from esol.config import Auto, CrfConfig, MaskConfig, WalkConfig
from esol.ops.dense_crf import mean_field, refined, unary_from_labels, unary_from_probabilities
from esol.ops.pairs import boundary_affinity, feature_affinity
from esol.ops.random_walk import random_walk
from esol.ops.thresholds import auto_threshold, background_power, power_threshold

PSA_PIXELS, IRN_PIXELS = 32, 48  # of the grid for each step: at VOC's photos about 100 for PSA, 256 for IRN


class Cue(NamedTuple):
    """What another cue, such as saliency, says of a photo: labels int64 (H, W), 0..n or 255, that it has decided on,
    and what it decided by, channels (1 + n, H, W), background first, which a soft unary starts from."""

    labels: Tensor
    channels: Tensor


def psa_labels(
    images: Sequence[Tensor],
    maps: Sequence[Tensor],
    classes: Sequence[Tensor],
    crf: CrfConfig,
    alpha_low: float | Auto = "auto",
    alpha_high: float | Auto = "auto",
) -> list[Tensor]:
    """PSA's label synthesis: class where it wins over the low-alpha background, 0 where the high-alpha one wins.

    auto: the low background meets the best map at the photo's own threshold, the high alpha is 8 times the low, as in
    PSA.

    Of each photo: image uint8 (3, H, W); maps float (n, H, W) in 0..1 of the classes (n,), indices without background.
    Returns uint8 (H, W) of each: 0, class index + 1, 255 where neither is sure. Source: PSA, infer_cls.py and
    voc12/data.py.
    """
    unaries = []
    for own in maps:
        best = _best(own)
        alpha = background_power(auto_threshold(best))
        alphas = (alpha * times if given == "auto" else given for times, given in ((1, alpha_low), (8, alpha_high)))
        unaries.append([unary_from_probabilities(torch.cat(((1 - best)[None] ** a, own))) for a in alphas])
    return _merged(images, unaries, classes, crf)


def irn_labels(
    images: Sequence[Tensor],
    maps: Sequence[Tensor],
    classes: Sequence[Tensor],
    crf: CrfConfig,
    foreground: float | Auto = "auto",
    background: float | Auto = "auto",
    certainty: float = 0.7,
) -> list[Tensor]:
    """IRN's label synthesis: class where the foreground threshold's seeds have one, 0 where neither threshold's do.

    auto: where backgrounds of .6 and 5 times the alpha of the photo's own threshold meet the best map, which for a CAM
    makes about IRN's .30 and .05.

    Shapes as psa_labels. Source: IRN, step/cam_to_ir_label.py.
    """
    unaries = []
    for own in maps:
        alpha = background_power(auto_threshold(_best(own)))
        thresholds = (
            power_threshold(times * alpha) if given == "auto" else given
            for times, given in ((0.6, foreground), (5, background))
        )
        unaries.append([unary_from_labels(_winner(own, t), len(own) + 1, certainty) for t in thresholds])
    return _merged(images, unaries, classes, crf)


def pseudo_masks(
    images: Sequence[Tensor],
    scores: Sequence[Tensor],
    classes: Sequence[Tensor],
    config: MaskConfig,
    cues: Sequence[Cue | None] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Label maps of scores (n, H, W) in 0..1, without and with the CRF: uint8 (H, W) twice for each photo.

    Background where no score is above the threshold. cues: of photos where something else has made that decision; its
    void stays void.
    """
    plain, start = [], []  # where the CRF starts from: energies, or probabilities
    for own, cue in zip(scores, cues or [None] * len(scores), strict=True):
        threshold = mask_threshold(config, own)
        plain.append(_winner(own, threshold) if cue is None else cue.labels)
        if config.unary == "hard":
            start.append(unary_from_labels(plain[-1], len(own) + 1, config.certainty))
        else:
            channels = torch.cat((own.new_full((1, *own.shape[1:]), threshold), own)) if cue is None else cue.channels
            start.append(channels / channels.sum(0, keepdim=True).clamp_min(1e-5))
    after = plain
    if config.crf.iterations and config.unary == "hard":
        after = [q.argmax(0) for (q,) in mean_field(images, [[one] for one in start], config.crf)]
    elif config.crf.iterations:
        after = [q.argmax(0) for q in refined(images, start, config.crf)]
    return [
        (_to_classes(was, own), _to_classes(torch.where(was == VOID, was, now), own))
        for was, now, own in zip(plain, after, classes, strict=True)
    ]


def mask_threshold(config: MaskConfig, scores: Tensor) -> float:
    """The threshold of one photo's scores (n, H, W).

    auto: .5 where a background has walked along, which the strongest class has to beat, else what the scores name.
    """
    if config.threshold != "auto":
        return config.threshold
    return 0.5 if isinstance(config, WalkConfig) and config.alpha else auto_threshold(_best(scores))


def psa_scores(
    maps: Sequence[Tensor], features: Sequence[Tensor], sizes: Sequence[tuple[int, int]], config: WalkConfig
) -> list[Tensor]:
    """Class maps and their background walked on AffinityNet's affinities: class / (best + background), (n, H, W).

    Of each photo: maps (n, h', w') in 0..1, any grid over the whole image; features (C, h, w), stride 8; its size.
    Source: PSA, infer_aff.py.
    """
    return walked_scores(maps, lambda i: feature_affinity(features[i][None], config.radius)[0], sizes, config)


def walked_scores(
    maps: Sequence[Tensor],
    affinity: Callable[[int], Tensor],
    sizes: Sequence[tuple[int, int]],
    config: WalkConfig,
    box: float = 0.0,
) -> list[Tensor]:
    """What psa_scores does, with any affinities of stride 8 and within boxes, as `boxed` has them.

    affinity: photo -> its pairs (K, h, w) in 0..1; asked of the photos that show something.
    """
    some = [i for i, own in enumerate(maps) if len(own)]
    affinities = [affinity(i) for i in some]
    low = [_enlarge(maps[i].float(), (a.shape[1], a.shape[2])) for i, a in zip(some, affinities, strict=True)]
    rivals = [torch.cat((_background(own, config.alpha), own)) for own in low]
    steps = [walk_steps(config.steps, own[0].numel(), PSA_PIXELS) for own in low]
    found = [own.new_zeros(0, *size, dtype=torch.float32) for own, size in zip(maps, sizes, strict=True)]
    walks = random_walk(rivals, affinities, config.radius, config.beta, steps)
    for i, own, walked in zip(some, low, walks, strict=True):
        found[i] = _over_background(_enlarge(boxed(walked, own, box), sizes[i]))
    return found


def attended_scores(
    maps: Sequence[Tensor],
    transition: Callable[[int], tuple[Tensor, int]],
    sizes: Sequence[tuple[int, int]],
    config: WalkConfig,
    box: float = 0.0,
) -> list[Tensor]:
    """What walked_scores does, where every cell reaches every other: transition (h * w, h * w) and width w of a photo.

    steps auto: 2. Source: CLIP-ES (Lin et al., arXiv 2212.09506), whose background does not walk along.
    """
    found = []
    for i, (own, size) in enumerate(zip(maps, sizes, strict=True)):
        if not len(own):
            found.append(own.new_zeros(0, *size, dtype=torch.float32))
            continue
        matrix, width = transition(i)
        low = _enlarge(own.float(), (len(matrix) // width, width))
        walked = torch.cat((_background(low, config.alpha), low)).flatten(1)
        for _ in range(2 if config.steps == "auto" else config.steps):
            walked = walked @ matrix
        found.append(_over_background(_enlarge(boxed(walked.unflatten(1, low.shape[1:]), low, box), size)))
    return found


def boxed(walked: Tensor, maps: Tensor, threshold: float) -> Tensor:
    """Background and classes (1 + n, h, w), each class 0 outside of the box around what its map (n, h, w) has above
    the threshold; 0 for no boxes. CLIP-ES has a box for each connected part.
    """
    if not threshold:
        return walked
    above = maps >= torch.minimum(maps.amax((1, 2), keepdim=True), maps.new_tensor(threshold))
    rows, columns = (_between(above.any(axis)) for axis in (2, 1))
    return torch.cat((walked[:1], walked[1:] * (rows[:, :, None] & columns[:, None])))


def _between(marks: Tensor) -> Tensor:
    """bool (n, L): from the first to the last mark of each row."""
    return (marks.cumsum(1) > 0) & (marks.flip(1).cumsum(1).flip(1) > 0)


def irn_scores(
    maps: Sequence[Tensor], edges: Sequence[Tensor], sizes: Sequence[tuple[int, int]], config: WalkConfig
) -> list[Tensor]:
    """Class maps and their background walked between boundaries: class / (best + background), (n, H, W).

    Of each photo: maps (n, h, w) in 0..1 and edge (h, w) in 0..1, both of stride 4; its size. alpha 0: no background
    walks, and scores are divided by the image's maximum. Source: IRN, step/make_sem_seg_labels.py; the background that
    walks along is PSA's.
    """
    some = [i for i, own in enumerate(maps) if len(own)]
    low = [maps[i].float() for i in some]
    rivals = [torch.cat((_background(own, config.alpha), own)) for own in low] if config.alpha else low
    inside = [own * (1 - edges[i]) for i, own in zip(some, rivals, strict=True)]
    affinities = [boundary_affinity(edges[i][None], config.radius)[0] for i in some]
    steps = [walk_steps(config.steps, edges[i].numel(), IRN_PIXELS) for i in some]
    found = [own.new_zeros(0, *size, dtype=torch.float32) for own, size in zip(maps, sizes, strict=True)]
    for i, walked in zip(some, random_walk(inside, affinities, config.radius, config.beta, steps), strict=True):
        wide = _enlarge(walked, sizes[i])
        found[i] = _over_background(wide) if config.alpha else wide / wide.amax().clamp_min(1e-5)
    return found


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


def _merged(
    images: Sequence[Tensor], unaries: Sequence[Sequence[Tensor]], classes: Sequence[Tensor], crf: CrfConfig
) -> list[Tensor]:
    """The label maps of two label sets of each photo: void where the first has background and the second a class."""
    found = []
    for both, own in zip(mean_field(images, unaries, crf), classes, strict=True):
        low, high = (q.argmax(0) for q in both)
        found.append(_to_classes(torch.where((low == 0) & (high != 0), VOID, low), own))
    return found


def _to_classes(rows: Tensor, classes: Tensor) -> Tensor:
    """0..n, or 255, of an image's own classes -> numbers of the data's classes, uint8."""
    table = torch.full((256,), VOID, dtype=torch.uint8, device=rows.device)
    table[0] = 0
    table[1 : len(classes) + 1] = (classes + 1).to(torch.uint8)
    return table[rows]


def _enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """To another grid whose corners are the same pixels."""
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=True)[0]
