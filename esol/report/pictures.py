"""Pictures: class maps and masks over their photos, and sheets of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from esol.base.palette import voc_palette

TILE = 200  # pixels, long side of a picture's tile
_HEAT = np.array([[12, 7, 60], [86, 15, 109], [187, 55, 84], [249, 142, 8], [252, 255, 164]], np.float32)

Pixels = NDArray[np.uint8]


def heat(image: Pixels, values: NDArray[np.floating]) -> Pixels:
    """A class map (H, W) in 0..1 over its photo (H, W, 3)."""
    place = np.clip(np.nan_to_num(values), 0, 1).astype(np.float32) * (len(_HEAT) - 1)
    low = np.minimum(place.astype(int), len(_HEAT) - 2)
    colours = _HEAT[low] + (_HEAT[low + 1] - _HEAT[low]) * (place - low)[..., None]
    return (0.35 * image + 0.65 * colours).astype(np.uint8)


def paint(image: Pixels, mask: NDArray[np.integer]) -> Pixels:
    """A label map (H, W), 0 background and 255 void, over its photo (H, W, 3)."""
    colours = voc_palette()[mask]
    blend = (0.4 * image + 0.6 * colours).astype(np.uint8)
    return np.where((mask == 0)[..., None], (0.75 * image).astype(np.uint8), blend)


def sheet(rows: Sequence[tuple[str, Sequence[Pixels]]], headings: Sequence[str]) -> Image.Image:
    """Rows of equally many pictures, each row with a caption, under column headings."""
    if not rows:
        raise ValueError("a sheet needs at least one row")
    columns, margin, line = len(headings), 6, 16
    tiles = [[_tile(picture) for picture in pictures] for _, pictures in rows]
    heights = [max(tile.height for tile in row) for row in tiles]
    size = (columns * (TILE + margin) + margin, line + sum(h + line + margin for h in heights) + margin)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, heading in enumerate(headings):
        draw.text((margin + column * (TILE + margin), 3), heading, fill="black")
    top = line
    for (caption, _), row, height in zip(rows, tiles, heights, strict=True):
        for column, tile in enumerate(row):
            canvas.paste(tile, (margin + column * (TILE + margin), top + margin))
        draw.text((margin, top + margin + height + 2), caption, fill="gray")
        top += height + line + margin
    return canvas


def _tile(pixels: Pixels) -> Image.Image:
    image = Image.fromarray(pixels)
    scale = TILE / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
