"""Photos too large for a network at once: windows that overlap, and what of each window's answer is kept.

And photos small enough to stand beside each other: how many at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor

from esol.models.regrid import grid_size, scale_to_grid

SIDE = 2048  # pixels: what is not larger is never cut
MARGIN = 256  # pixels of a window that only lend context to the rest, about as far as DeepLab's features look
STEP = 32  # pixels: windows begin on every network's grid
ROOM = 2**20  # pixels of photos that stand beside each other

Part = tuple[slice, slice]


@dataclass(frozen=True)
class Tile:
    """window: rows and columns of a photo that are worked on together; kept: those that the answer is kept of."""

    window: Part
    kept: Part

    @property
    def inner(self) -> Part:
        """What is kept, in the window's own rows and columns."""
        rows, columns = (
            slice(k.start - w.start, k.stop - w.start) for w, k in zip(self.window, self.kept, strict=True)
        )
        return rows, columns


def tiles(height: int, width: int) -> list[Tile]:
    """The windows of a photo, row by row; one, the photo itself, where it is not large.

    Kept parts cover the photo without overlap and lie MARGIN inside their window, but at the photo's own edges.
    """
    rows, columns = spans(height), spans(width)
    return [Tile((r[0], c[0]), (r[1], c[1])) for r, c in product(rows, columns)]


def spans(length: int) -> list[tuple[slice, slice]]:
    """Windows of one axis and what is kept of each, in pixels; all begin at multiples of STEP."""
    if length < SIDE + STEP:
        return [(slice(0, length), slice(0, length))]
    last = (length - SIDE) // STEP * STEP  # its window is up to a step longer
    starts = [*range(0, last, SIDE - 2 * MARGIN), last]
    edges = [0, *((before + SIDE + after) // (2 * STEP) * STEP for before, after in pairwise(starts)), length]
    ends = [*(start + SIDE for start in starts[:-1]), length]
    return [(slice(s, e), slice(*k)) for s, e, k in zip(starts, ends, pairwise(edges), strict=True)]


def portions(sizes: Sequence[tuple[int, int]]) -> list[slice]:
    """Photos of these heights and widths that follow each other, as many at a time as have ROOM; a larger one alone."""
    found: list[slice] = []
    taken = ROOM
    for i, (height, width) in enumerate(sizes):
        if taken + height * width > ROOM:
            found.append(slice(i, i))
            taken = 0
        found[-1] = slice(found[-1].start, i + 1)
        taken += height * width
    return found


def on_grids(
    network: Callable[[Tensor], dict[str, Tensor]],
    images: Sequence[Tensor],
    factors: Sequence[float],
    stride: int,
    tell: Callable[[str], None] | None = None,
) -> list[dict[str, Tensor]]:
    """What a network says, on its grid of that stride, of every image uint8 (3, H, W), scaled by a factor of its own.

    network: float (B, 3, h, w) -> named answers (B, ...). Images whose scaled sizes are the same go through it
    together. Where that size is large it sees windows, cut on the grid, so that what it says far from their edges is
    what it says of the whole. tell: hears which window is next.
    """
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (image, factor) in enumerate(zip(images, factors, strict=True)):
        alike[grid_size(image, factor, stride)].append(i)
    answers: dict[int, dict[str, Tensor]] = {}
    for size, places in alike.items():
        if max(size) < SIDE + STEP:
            answer = network(torch.cat([scale_to_grid(images[i][None], factors[i], stride) for i in places]))
            answers |= {place: {name: one[k] for name, one in answer.items()} for k, place in enumerate(places)}
        else:
            answers |= {i: _by_windows(network, images[i], factors[i], stride, tell) for i in places}
    return [answers[i] for i in range(len(images))]


def _by_windows(
    network: Callable[[Tensor], dict[str, Tensor]],
    image: Tensor,
    factor: float,
    stride: int,
    tell: Callable[[str], None] | None,
) -> dict[str, Tensor]:
    size = grid_size(image, factor, stride)
    source = image[None].cpu()  # a band of it is scaled at a time: the whole in floats is many times the photo
    strips: list[dict[str, Tensor]] = []
    rows, columns = spans(size[0] - 1), spans(size[1] - 1)
    for r, kept_rows in rows:
        pieces: list[dict[str, Tensor]] = []
        band = _band(source, size, r.start, r.stop + 1)
        for c, kept_columns in columns:
            if tell:
                number = len(strips) * len(columns) + len(pieces) + 1
                tell(f"scale {factor:.3g}, window {number} of {len(rows) * len(columns)}")
            window = band[:, :, :, c.start : c.stop + 1].to(image.device)
            i, j = _cells(r, kept_rows, size[0] - 1, stride), _cells(c, kept_columns, size[1] - 1, stride)
            pieces.append({name: found[0, :, i, j] for name, found in network(window).items()})
        strips.append({name: torch.cat([piece[name] for piece in pieces], 2) for name in pieces[0]})
    return {name: torch.cat([strip[name] for strip in strips], 1) for name in strips[0]}


def _cells(window: slice, kept: slice, length: int, stride: int) -> slice:
    """What is kept of a window, in its cells; to the last cell, if there is one, at the image's own edge."""
    end = None if kept.stop == length else (kept.stop - window.start) // stride
    return slice((kept.start - window.start) // stride, end)


def _band(image: Tensor, size: tuple[int, int], start: int, stop: int) -> Tensor:
    """Rows start to stop of uint8 images (B, 3, H, W) scaled to `size`, as scale_to_grid scales them whole.

    A row is a mean of rows of the image, weighted by a triangle as wide as a row of the smaller of the two.
    """
    ratio = image.shape[2] / size[0]
    reach = max(ratio, 1.0)
    middle = (torch.arange(start, stop, dtype=torch.float64) + 0.5) * ratio - 0.5
    first = (middle - reach).ceil().long()
    rows = torch.zeros(*image.shape[:2], stop - start, image.shape[3])
    total = torch.zeros(stop - start, 1)
    for tap in range(int(2 * reach) + 1):
        weight = (1 - (first + tap - middle).abs() / reach).clamp_min(0)
        weight[(first + tap < 0) | (first + tap >= image.shape[2])] = 0
        weight = weight.float()[:, None]
        rows += weight * image[:, :, (first + tap).clamp(0, image.shape[2] - 1)]
        total += weight
    return F.interpolate(rows / total, (stop - start, size[1]), mode="bilinear", align_corners=False, antialias=True)
