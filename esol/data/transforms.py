"""From a photo's bytes to the pixels that a network sees."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_image

from esol.errors import DataError

warnings.filterwarnings("ignore", "The given buffer is not writable")  # the decoder only reads it
warnings.filterwarnings("ignore", "The image decoding and encoding capabilities")  # moved out after torchvision 0.30


def decode(data: bytes, name: str) -> Tensor:
    """A photo as uint8 (3, H, W) RGB, turned upright by its EXIF tag; DataError naming `name` where unreadable."""
    if not data:
        raise DataError(f"{name}: the image is empty")
    try:
        encoded = torch.frombuffer(data, dtype=torch.uint8)
        return decode_image(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError as error:
        raise DataError(f"{name}: the image cannot be decoded ({str(error).splitlines()[0]})") from error


def decode_mask(data: bytes, name: str) -> NDArray[np.uint8]:
    """A mask's class numbers (H, W), 0 background and 255 void; DataError naming `name` where it cannot be read."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as png:
            return np.array(png, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name}: the mask cannot be decoded ({error})") from error


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 (3, H, W) to (3, height, width), bilinear with antialiasing."""
    if image.shape[-2:] == (height, width):
        return image
    return interpolate(image[None], size=(height, width), mode="bilinear", antialias=True, align_corners=False)[0]


def scaled_size(height: int, width: int, long_side: float) -> tuple[int, int]:
    """The size at which the longer side is `long_side` pixels and the shape is kept."""
    scale = long_side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def training_crop(
    image: Tensor, rng: np.random.Generator, long_side: tuple[int, int], crop: int, fill: Sequence[int]
) -> Tensor:
    """Random scale, flip and crop as in IRN (RECIPES.md): uint8 (3, H, W) -> (3, crop, crop).

    The long side is drawn uniformly from long_side; where the scaled photo is smaller than the crop it lands at a
    random place on the fill colour (the network's mean, which normalisation turns into zeros). Only the part of the
    photo that the crop shows is resized.
    """
    height, width = image.shape[-2:]
    scaled = scaled_size(height, width, int(rng.integers(long_side[0], long_side[1] + 1)))
    flip = rng.random() < 0.5
    source, target = [], []
    for size, new in zip((height, width), scaled, strict=True):
        shown = min(new, crop)
        place = int(rng.integers(0, crop - shown + 1))
        start = int(rng.integers(0, new - shown + 1))
        begin = min(round(start * size / new), size - 1)
        end = min(max(round((start + shown) * size / new), begin + 1), size)
        source.append(slice(begin, end))
        target.append(slice(place, place + shown))
    part = resize(image[:, source[0], source[1]], target[0].stop - target[0].start, target[1].stop - target[1].start)
    if part.shape[-2:] != (crop, crop):
        canvas = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, crop, crop)
        canvas[:, target[0], target[1]] = part
        part = canvas
    return part.flip(-1) if flip else part
