"""COCO's polygons and run lengths to pixels; numbers are checked before pycocotools, which trusts them, sees them."""

from __future__ import annotations

from typing import Any

import numpy as np

from esol.base.errors import DataError

_LONGEST = 4_000_000  # pixels of a polygon's outline: pycocotools takes 80 bytes for each


def has_shape(annotation: dict[str, Any]) -> bool:
    """False for a bounding box alone: no segmentation, null, [], [[]], {}."""
    shape = annotation.get("segmentation")
    return any(part not in (None, [], {}) for part in shape) if isinstance(shape, list) else shape not in (None, {}, "")


def within_one(annotation: dict[str, Any]) -> bool | None:
    """Whether all its polygons lie within 0..1, as fractions of the photo's sides do; None where it has no polygon."""
    shape = annotation.get("segmentation")
    found = False
    for polygon in shape if isinstance(shape, list) else ():
        for value in polygon if isinstance(polygon, list) else ():
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                return False
            found = True
    return found or None


def inside(annotation: dict[str, Any], height: int, width: int, normalised: bool, where: str) -> np.ndarray:
    """bool (height, width), as COCO.annToMask gives it; DataError (with where) for what is no shape of such a photo."""
    shape = annotation.get("segmentation")
    name = f"{where}: annotation {annotation.get('id')}: bad segmentation"
    if isinstance(shape, dict):
        return _from_runs(shape, height, width, name)
    if not isinstance(shape, list):
        raise DataError(f"{name}: neither polygons nor run lengths")
    from pycocotools import mask as rle

    scale = np.array([width, height] if normalised else [1, 1], dtype=np.float64)
    polygons = [_polygon(part, height, width, scale, name) for part in shape if part not in (None, [])]
    return np.asarray(rle.decode(rle.merge(rle.frPyObjects(polygons, height, width)))) > 0


def _polygon(part: Any, height: int, width: int, scale: np.ndarray, name: str) -> list[float]:
    if not isinstance(part, list):
        raise DataError(f"{name}: polygons must be lists of x, y, x, y, ... in a list")
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in part):
        raise DataError(f"{name}: a polygon holds something that is no number")
    if len(part) % 2 or len(part) < 6:
        raise DataError(f"{name}: a polygon of {len(part)} numbers; x, y of at least three points are expected")
    # pycocotools cuts at the photo's edges, but first walks along the outline
    low, high = -max(height, width, 100), 2 * max(height, width, 100)
    far = [value for value in part if not low <= value <= high]  # NaN is one of them
    if far:
        raise DataError(f"{name}: coordinate {str(far[0])[:20]} lies far outside the photo of {width}x{height}")
    points = np.array(part, dtype=np.float64).reshape(-1, 2) * scale
    length = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()
    if length > _LONGEST:
        raise DataError(f"{name}: a polygon's outline of {length:.0f} pixels")
    return [float(value) for value in points.ravel()]


def _from_runs(shape: dict[str, Any], height: int, width: int, name: str) -> np.ndarray:
    counts = shape.get("counts")
    size = shape.get("size", [height, width])
    if size != [height, width]:
        raise DataError(f"{name}: run lengths of size {size!r:.60} for a photo of height {height} and width {width}")
    if isinstance(counts, str):
        counts = _uncompressed(counts, name)
    if not isinstance(counts, list) or not all(
        isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= height * width for count in counts
    ):
        raise DataError(f"{name}: counts must be run lengths, whole numbers up to the photo's pixels")
    if sum(counts) != height * width:
        raise DataError(f"{name}: counts cover {sum(counts)} pixels of {height * width}")
    runs = np.arange(len(counts)) % 2 == 1
    return np.repeat(runs, counts).reshape(width, height).T


def _uncompressed(text: str, name: str) -> list[int]:
    """Run lengths from pycocotools' text: five bits a letter from 48, the sixth for more to come, differences."""
    counts: list[int] = []
    value = bits = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or bits > 30:
            raise DataError(f"{name}: counts are no compressed run lengths")
        value |= (code & 31) << bits
        bits += 5
        if not code & 32:
            value -= (code & 16) << (bits - 4)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = bits = 0
    return counts
