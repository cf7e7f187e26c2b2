"""Class maps of one image or of a batch of one size: multi-scale, flipped, of all trained stages in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from esol.models.heads import Heads
from esol.models.regrid import grid_size
from esol.ops.tiles import on_grid


@dataclass(frozen=True)
class ClassMaps:
    """Maps of the n classes that an image's labels name, each divided by its maximum.

    classes: int64 (n,), class index without background; low: float32 (n, ceil(H/4), ceil(W/4)); full: (n, H, W).
    """

    classes: Tensor
    low: Tensor
    full: Tensor


@torch.no_grad()
def class_maps(
    image: Tensor,
    labels: Tensor,
    heads: Heads,
    *,
    scales: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    flip: bool = True,
    long_side: int = 0,
    tell: Callable[[str], None] | None = None,
) -> list[dict[str, ClassMaps]]:
    """Class maps of every head, {"cam": ..., "decide": ..., ...} for each image.

    image uint8 (B, 3, H, W); labels (B, C) multi-hot; long_side: of scale 1 in pixels, 0 = the image's own; tell: hears
    which window of a large image is next. relu, summed over scales and flip, absent classes dropped, divided by the
    maximum + 1e-5 (IRN). One backbone pass a scale.
    """
    height, width = image.shape[2:]
    stride = heads.net.backbone.stride
    sizes = {"low": (-(-height // 4), -(-width // 4)), "full": (height, width)}
    present = [row.nonzero()[:, 0] for row in labels]
    sums: list[dict[str, dict[str, Tensor]]] = [{} for _ in present]
    for scale in scales:
        factor = scale * (long_side / max(height, width) if long_side else 1)
        aligned = grid_size(image, factor, stride)
        for source, maps in on_grid(partial(_seen, heads, flip), image, factor, stride, tell).items():
            # Feature (i, j) looks at pixel (i, j) * stride where the network pads symmetrically; a patch stem does not.
            corners = ((maps.shape[2] - 1) * stride + 1, (maps.shape[3] - 1) * stride + 1) == aligned
            for own, chosen, one in zip(sums, present, maps, strict=True):
                total = own.setdefault(source, {})
                for name, size in sizes.items():
                    up = _enlarge(one[chosen], size, corners)
                    total[name] = total[name] + up if name in total else up
    return [
        {source: ClassMaps(chosen, **{k: _normalise(v) for k, v in total.items()}) for source, total in own.items()}
        for own, chosen in zip(sums, present, strict=True)
    ]


def _seen(heads: Heads, flip: bool, image: Tensor) -> dict[str, Tensor]:
    """relu'd maps of every head, float32 (B, C, h, w), summed over the image and its mirror image."""
    found = heads.class_maps(torch.cat((image, image.flip(3))) if flip else image)
    return {source: _unflip(F.relu(m.float())) if flip else F.relu(m.float()) for source, m in found.items()}


def _unflip(maps: Tensor) -> Tensor:
    straight, mirrored = maps.chunk(2)
    return straight + mirrored.flip(3)


def _enlarge(maps: Tensor, size: tuple[int, int], corners: bool) -> Tensor:
    if len(maps) == 0:  # an image without any class; interpolate refuses it
        return maps.new_zeros(0, *size)
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=corners)[0]


def _normalise(maps: Tensor) -> Tensor:
    return maps / (maps.amax((1, 2), keepdim=True) + 1e-5) if len(maps) else maps
