"""DeepLab at test time: several scales and the mirror image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from esol.config import PredictionConfig
from esol.models.deeplab import DeepLab
from esol.ops.dense_crf import refined
from esol.ops.tiles import Part, Tile, on_grids, portions, tiles

STRIP = 4_000_000  # floats that enlarged_labels holds at once


@torch.no_grad()
def logits_by_scale(
    images: Sequence[Tensor],
    net: DeepLab,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = True,
    combine: Literal["mean", "max"] = "mean",
    tell: Callable[[str], None] | None = None,
) -> list[list[Tensor]]:
    """What `blended` needs of every image uint8 (3, H, W): logits (L, h, w), on the grids of the scales.

    max: the mean over the flip within each scale, as DeepLab's public code has it. tell: hears which window of a large
    image is next.
    """

    def seen(inputs: Tensor) -> dict[str, Tensor]:
        logits = net(torch.cat((inputs, inputs.flip(3))) if flip else inputs).float()
        passes = [logits] if not flip else [logits[: len(inputs)], logits[len(inputs) :].flip(3)]
        return {str(i): one for i, one in enumerate([sum(passes) / len(passes)] if combine == "max" else passes)}

    stride = net.backbone.stride
    by_scale = [on_grids(seen, images, [scale] * len(images), stride, tell) for scale in scales]
    return [[one for found in own for one in found.values()] for own in zip(*by_scale, strict=True)]


@torch.no_grad()
def blended(
    logits: Sequence[Tensor], size: tuple[int, int], combine: Literal["mean", "max"] = "mean", part: Part | None = None
) -> Tensor:
    """Probabilities of every label, float32 (L, H, W), or of the rows and columns of a part of the image.

    mean: of the probabilities over all logits; max: the softmax of the highest logits.
    """
    total: Tensor | None = None
    for one in logits:
        enlarged = _enlarged(one[None], size, part)[0]
        if combine == "max":
            total = enlarged if total is None else torch.maximum(total, enlarged)
        else:
            total = enlarged.softmax(0) if total is None else total.add_(enlarged.softmax(0))
    assert total is not None
    return total.softmax(0) if combine == "max" else total.div_(len(logits))


@torch.no_grad()
def by_parts(
    images: Sequence[Tensor],
    logits: Sequence[Sequence[Tensor]],
    config: PredictionConfig,
    tell: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, Tile, Tensor, Tensor]]:
    """Of every part of photos uint8 (3, H, W) the probabilities (L, h, w) that are kept, before and after the CRF.

    Yields the photo's number, the part, and those two. logits: of each photo, by logits_by_scale. Small photos go
    through the CRF beside each other; tell: hears which part of a large one is next.
    """
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    parts = [(i, part) for i, size in enumerate(sizes) for part in tiles(*size)]
    for some in portions([(r.stop - r.start, c.stop - c.start) for r, c in (part.window for _, part in parts)]):
        seen, before = [], []
        for number, (i, part) in enumerate(parts[some], some.start):
            of = [k for k, (photo, _) in enumerate(parts) if photo == i]
            if tell and len(of) > 1:
                tell(f"mask, window {of.index(number) + 1} of {len(of)}")
            rows, columns = part.window
            seen.append(images[i][:, rows, columns])
            before.append(blended(logits[i], sizes[i], config.combine, part.window))
        for (i, part), was, after in zip(parts[some], before, refined(seen, before, config.crf), strict=True):
            r, c = part.inner
            yield i, part, was[:, r, c], after[:, r, c]


def _enlarged(logits: Tensor, size: tuple[int, int], part: Part | None) -> Tensor:
    """A part of logits (B, L, h, w) that are enlarged to the image's size; corners are corners."""
    if part is None or part == (slice(0, size[0]), slice(0, size[1])):
        return F.interpolate(logits, size, mode="bilinear", align_corners=True)
    for axis, (shown, length) in enumerate(zip(part, size, strict=True), 2):
        cells = logits.shape[axis]
        place = torch.arange(shown.start, shown.stop, device=logits.device) * ((cells - 1) / max(length - 1, 1))
        first = place.long().clamp_max(cells - 1)
        weight = (place - first).float().view(-1, *[1] * (3 - axis))
        after = (first + 1).clamp_max(cells - 1)
        logits = torch.lerp(logits.index_select(axis, first), logits.index_select(axis, after), weight)
    return logits


def enlarged_labels(
    predicted: Tensor, before: Tensor, size: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Probabilities (L, h, w), enlarged bilinearly to (H, W): as `strongest` has them.

    Pixel centres correspond (align_corners=False). By bands of rows: holds twice STRIP floats at most instead of
    L x H x W.
    """
    (height, width), rows = size, max(1, STRIP // (len(predicted) * size[1]))
    if (height, width) == tuple(predicted.shape[1:]):
        return strongest(predicted, before)
    labels, sure = np.empty(size, np.uint8), np.empty(size, np.uint16)
    for top in range(0, height, rows):
        place = torch.arange(top, min(top + rows, height), device=predicted.device, dtype=torch.float32)
        place = ((place + 0.5) * (predicted.shape[1] / height) - 0.5).clamp(0, predicted.shape[1] - 1)
        wide = _band(predicted, place, width)
        own = wide if before is predicted else _band(before, place, width)
        labels[top : top + rows], sure[top : top + rows] = strongest(wide, own)
    return labels, sure


def _band(values: Tensor, place: Tensor, width: int) -> Tensor:
    """Rows at fractional places of values (L, h, w), in that width."""
    above = place.long()
    band = torch.lerp(values[:, above], values[:, (above + 1).clamp_max(values.shape[1] - 1)], (place - above)[:, None])
    return F.interpolate(band[None], (len(place), width), mode="bilinear", align_corners=False)[0]


def strongest(predicted: Tensor, before: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """The label of the highest probability (L, H, W) at each pixel, and how sure the network was of it, in 1/65535.

    before: probabilities before the CRF, whose own are all but all 0 or 1; predicted itself where there is none.
    """
    label = predicted.argmax(0)
    sure = (before.gather(0, label[None])[0] * 65535).round().to(torch.int32).cpu().numpy().astype(np.uint16)
    return label.to(torch.uint8).cpu().numpy(), sure
