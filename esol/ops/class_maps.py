"""Class maps of images of any sizes: multi-scale, flipped, of all trained stages in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from esol.models.heads import Heads
from esol.models.regrid import grid_size
from esol.ops.tiles import on_grids


@dataclass(frozen=True, eq=False)
class ClassMaps:
    """Maps of the n classes that an image's labels name: relu, summed over scales and flip, divided by the maximum.

    classes: int64 (n,), class index without background; size: height H and width W of the image; grids: of every scale
    the maps (n, h, w) as the network made them, and whether their outermost points sit on the image's outermost pixels.
    """

    classes: Tensor
    size: tuple[int, int]
    grids: tuple[tuple[Tensor, bool], ...]

    @cached_property
    def low(self) -> Tensor:
        """float32 (n, ceil(H/4), ceil(W/4)), made when it is first asked for."""
        return self._enlarged((-(-self.size[0] // 4), -(-self.size[1] // 4)))

    @cached_property
    def full(self) -> Tensor:
        """float32 (n, H, W), made when it is first asked for."""
        return self._enlarged(self.size)

    def _enlarged(self, size: tuple[int, int]) -> Tensor:
        if not len(self.classes):  # an image without any class; interpolate refuses it
            return self.grids[0][0].new_zeros(0, *size)
        total: Tensor | None = None
        for maps, corners in self.grids:
            one = F.interpolate(maps[None], size, mode="bilinear", align_corners=corners)[0]
            total = one if total is None else total.add_(one)
        assert total is not None
        return total / (total.amax((1, 2), keepdim=True) + 1e-5)


@torch.no_grad()
def class_maps(
    images: Sequence[Tensor],
    labels: Sequence[Tensor],
    heads: Heads,
    *,
    scales: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    flip: bool = True,
    long_side: int = 0,
    tell: Callable[[str], None] | None = None,
) -> list[dict[str, ClassMaps]]:
    """Class maps of every head, {"cam": ..., "decide": ..., ...} for each image.

    images: each uint8 (3, H, W), of any sizes; labels: each (C,), multi-hot; long_side: of scale 1 in pixels, 0 = the
    image's own; tell: hears which window of a large image is next. One backbone pass a scale for images of one grid.
    """
    stride = heads.net.backbone.stride
    present = [row.nonzero()[:, 0] for row in labels]
    grids: list[dict[str, list[tuple[Tensor, bool]]]] = [{source: [] for source in heads} for _ in images]
    for scale in scales:
        factors = [scale * (long_side / max(image.shape[1:]) if long_side else 1) for image in images]
        seen = on_grids(partial(_seen, heads, flip), images, factors, stride, tell)
        for image, factor, chosen, found, own in zip(images, factors, present, seen, grids, strict=True):
            aligned = grid_size(image, factor, stride)
            for source, maps in found.items():
                # feature (i, j) looks at pixel (i, j) * stride, unless the network has a patch stem
                corners = ((maps.shape[1] - 1) * stride + 1, (maps.shape[2] - 1) * stride + 1) == aligned
                own[source].append((maps[chosen], corners))
    return [
        {source: ClassMaps(chosen, (image.shape[1], image.shape[2]), tuple(of)) for source, of in own.items()}
        for image, chosen, own in zip(images, present, grids, strict=True)
    ]


def _seen(heads: Heads, flip: bool, image: Tensor) -> dict[str, Tensor]:
    """relu'd maps of every head, float32 (B, C, h, w), summed over the image and its mirror image."""
    found = heads.class_maps(torch.cat((image, image.flip(3))) if flip else image)
    return {source: _unflip(F.relu(m.float())) if flip else F.relu(m.float()) for source, m in found.items()}


def _unflip(maps: Tensor) -> Tensor:
    straight, mirrored = maps.chunk(2)
    return straight + mirrored.flip(3)
