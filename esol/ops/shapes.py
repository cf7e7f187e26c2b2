"""Outlines of masks as polygons: exact along the pixels' edges, holes and all, and simpler ones that are nearly so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Mask = NDArray[np.bool_]
EXACT_ENOUGH = 0.99  # IoU that a simpler outline has to keep


@dataclass(frozen=True)
class Shape:
    """A connected part of a mask: corners (N, 2), x and y in pixels from the upper left corner, and its holes."""

    outer: Points
    holes: tuple[Points, ...]

    @property
    def area(self) -> float:
        """In pixels."""
        return abs(signed_area(self.outer)) - sum(abs(signed_area(hole)) for hole in self.holes)

    def one_ring(self) -> Points:
        """The outline as one polygon: a hole is reached by a cut of no width, for formats that know no holes."""
        ring = self.outer
        for hole in self.holes:
            gaps = ((ring[:, None] - hole[None]) ** 2).sum(2)
            i, j = np.unravel_index(int(gaps.argmin()), gaps.shape)
            ring = np.concatenate([ring[: i + 1], np.roll(hole, -j, 0), hole[j : j + 1], ring[i:]])
        return ring


def shapes(mask: Mask) -> list[Shape]:
    """The parts of a mask (H, W) that hang together by their pixels' sides, each with its holes, exact."""
    loops = _loops(mask)
    outers = [loop for loop in loops if signed_area(loop) > 0]
    holes: list[list[Points]] = [[] for _ in outers]
    for hole in (loop for loop in loops if signed_area(loop) < 0):
        # the outlines of the parts do not cross: the smallest that holds a pixel at the hole's rim is the hole's own
        x, y = _beside(hole)
        around = [i for i, outer in enumerate(outers) if _holds(outer, x, y)]
        holes[min(around, key=lambda i: signed_area(outers[i]))].append(hole)
    return [Shape(outer, tuple(own)) for outer, own in zip(outers, holes, strict=True)]


def simpler(shape: Shape, size: tuple[int, int]) -> Shape:
    """With as few corners as keep EXACT_ENOUGH of it; size: the photo's height and width."""
    exact = raster([shape], size)
    for tolerance in (2.0, 1.4, 1.0, 0.7, 0.5):
        outer = _simplified(shape.outer, tolerance)
        holes = tuple(hole for one in shape.holes if len(hole := _simplified(one, tolerance)) > 2)
        if len(outer) > 2:
            found = Shape(outer, holes)
            drawn = raster([found], size)
            if (exact & drawn).sum() >= EXACT_ENOUGH * (exact | drawn).sum():
                return found
    return shape


def raster(parts: Sequence[Shape], size: tuple[int, int]) -> Mask:
    """The mask (H, W) of the pixels whose centre lies inside, by the even-odd rule."""
    height, width = size
    flips = np.zeros((height, width + 1), np.int64)
    for part in parts:
        for ring in (part.outer, *part.holes):
            first, second = ring, np.roll(ring, -1, 0)
            for (x0, y0), (x1, y1) in zip(first.tolist(), second.tolist(), strict=True):
                if y0 == y1:
                    continue
                low, high = sorted((y0, y1))
                rows = np.arange(max(0, int(np.ceil(low - 0.5))), min(height, int(np.ceil(high - 0.5))))
                across = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
                columns = np.clip(np.ceil(across - 0.5), 0, width).astype(int)
                np.add.at(flips, (rows, columns), 1)
    return (np.cumsum(flips, 1)[:, :width] % 2).astype(bool)


def signed_area(ring: Points) -> float:
    """Positive where the inside lies to the right of the way round, as seen with y downwards."""
    x, y = ring.T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def _loops(mask: Mask) -> list[Points]:
    """Closed ways along the pixels' edges with the mask to the right; only corners are kept."""
    inside = np.pad(mask.astype(bool), 1)
    ways: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (dy, dx), (start, end) in {
        (-1, 0): ((0, 0), (1, 0)),
        (0, 1): ((1, 0), (1, 1)),
        (1, 0): ((1, 1), (0, 1)),
        (0, -1): ((0, 1), (0, 0)),
    }.items():
        edge = inside & ~np.roll(inside, (-dy, -dx), (0, 1))
        for y, x in np.argwhere(edge).tolist():
            ways.setdefault((x - 1 + start[0], y - 1 + start[1]), []).append((x - 1 + end[0], y - 1 + end[1]))
    loops = []
    while ways:
        begin = min(ways)
        at, before, loop = begin, None, []
        while True:
            ends = ways[at]
            if len(ends) > 1 and before is not None:  # two pixels meet by a corner: turn right, and stay with one's own
                way = (at[0] - before[0], at[1] - before[1])
                ends.sort(key=lambda end: (end[0] - at[0], end[1] - at[1]) != (-way[1], way[0]))
            following = ends.pop(0)
            if not ends:
                del ways[at]
            if before is None or (following[0] - at[0], following[1] - at[1]) != (at[0] - before[0], at[1] - before[1]):
                loop.append(at)
            before, at = at, following
            if at == begin:
                break
        if (loop[0][0] - before[0], loop[0][1] - before[1]) == (loop[1][0] - loop[0][0], loop[1][1] - loop[0][1]):
            loop.pop(0)
        loops.append(np.array(loop, np.float64))
    return loops


def _beside(hole: Points) -> tuple[float, float]:
    """The centre of a pixel of the mask beside a hole's first edge, which lies to its right."""
    (x0, y0), (x1, y1) = hole[0], hole[1]
    length = abs(x1 - x0) + abs(y1 - y0)
    along = ((x1 - x0) / length, (y1 - y0) / length)
    return float(x0 + along[0] / 2 - along[1] / 2), float(y0 + along[1] / 2 + along[0] / 2)


def _holds(ring: Points, x: float, y: float) -> bool:
    first, second = ring, np.roll(ring, -1, 0)
    crosses = (first[:, 1] > y) != (second[:, 1] > y)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = first[:, 0] + (y - first[:, 1]) * (second[:, 0] - first[:, 0]) / (second[:, 1] - first[:, 1])
    return bool((crosses & (at > x)).sum() % 2)


def _simplified(ring: Points, tolerance: float) -> Points:
    """Douglas and Peucker's rule on a closed ring: corners nearer than tolerance to a straight line go."""
    far = int(((ring - ring[0]) ** 2).sum(1).argmax())
    keep = np.zeros(len(ring), bool)
    keep[[0, far]] = True
    waiting = [(0, far), (far, len(ring))]
    while waiting:
        start, end = waiting.pop()
        if end - start < 2:
            continue
        a, b = ring[start], ring[end % len(ring)]
        points, way = ring[start + 1 : end], b - a
        length = float(np.hypot(*way))
        if length:
            gaps = np.abs(way[0] * (points[:, 1] - a[1]) - way[1] * (points[:, 0] - a[0])) / length
        else:
            gaps = np.hypot(*(points - a).T)
        worst = int(gaps.argmax())
        if gaps[worst] > tolerance:
            middle = start + 1 + worst
            keep[middle] = True
            waiting += [(start, middle), (middle, end)]
    return ring[keep]
