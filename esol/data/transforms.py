"""From a photo's bytes to the pixels that a network sees."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from esol.base.errors import DataError
from esol.data.photos import check_png, jpeg_size, orientation, other_photo, photo_format, upright_rgb
from esol.data.tiff import check_size

warnings.filterwarnings("ignore", "The given buffer is not writable")  # the decoder only reads it
warnings.filterwarnings("ignore", "The image decoding and encoding capabilities")  # moved out after torchvision 0.30


def decode(data: bytes, name: str, most: int | None = None) -> Tensor:
    """A photo as uint8 (3, H, W) RGB, as esol.data.photos has it upright.

    DataError naming `name` where it is unreadable, or has more than `most` pixels, which are then not decoded.
    """
    if not data:
        raise DataError(f"{name}: the image is empty")
    from torchvision.io import ImageReadMode, decode_image  # and its networks, and torch's compiler with them: seconds

    try:
        if data.startswith(b"\xff\xd8"):
            check_size(jpeg_size(data), name, most)
            encoded = torch.frombuffer(data, dtype=torch.uint8)
            pixels = decode_image(encoded, mode=ImageReadMode.RGB)
            if b"Exif\0\0" not in data:  # most photos of a training set: a fifth of the time
                return pixels
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as header:
                return turned(pixels, orientation(header))
        if (other := other_photo(data, name, most)) is not None:
            return torch.from_numpy(np.array(upright_rgb(other))).permute(2, 0, 1).contiguous()
        check_png(data)
        with Image.open(io.BytesIO(data), formats=["PNG", "WEBP"]) as file:  # torchvision crashes on damaged PNG files
            check_size(file.size, name, most)
            return torch.from_numpy(np.array(upright_rgb(file))).permute(2, 0, 1).contiguous()
    except DataError:
        raise
    except UnidentifiedImageError as error:
        known = photo_format(data)
        what = f"{known} is not read, convert it to JPEG" if known else "it is neither JPEG, PNG nor WebP"
        raise DataError(f"{name}: the image cannot be decoded ({what})") from error
    except Exception as error:  # a damaged file leads the decoders to raise whatever they please
        what = (str(error) or type(error).__name__).splitlines()[0]
        what = re.sub(r"^.*\.cpp:\d+\W+", "", what)  # where in torchvision's sources
        raise DataError(f"{name}: the image cannot be decoded ({what})") from error


def turned(pixels: Tensor, orientation: int) -> Tensor:
    """(3, H, W) as stored -> upright, for an orientation of 1..8."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 2)
    axes = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation)
    return (pixels.flip(axes) if axes else pixels).contiguous()


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 (3, H, W) to (3, height, width), bilinear with antialiasing."""
    if image.shape[-2:] == (height, width):
        return image
    return interpolate(image[None], size=(height, width), mode="bilinear", antialias=True, align_corners=False)[0]


def within(image: Tensor, side: int) -> Tensor:
    """uint8 (3, H, W), made smaller where its long side exceeds `side` pixels."""
    longest = max(image.shape[1:])
    if longest <= side:
        return image
    height, width = (max(1, round(n * side / longest)) for n in image.shape[1:])
    return resize(image, height, width)


@dataclass(frozen=True)
class Crop:
    """Square training crops of `size` pixels; the photo is scaled to a long side or by a factor, drawn uniformly."""

    size: int
    long_side: tuple[int, int] | None = None  # pixels
    scale: tuple[float, float] = (1.0, 1.0)  # times the photo's own size, where long_side is None


def training_crop(
    image: Tensor, rng: np.random.Generator, crop: Crop, fill: Sequence[int], target: Tensor | None = None
) -> Tensor:
    """Random scale, flip and crop as in IRN: uint8 (3, H, W) -> (3, size, size).

    Where the scaled photo is smaller than the crop it lands at a random place on the fill colour (the network's mean,
    which normalisation turns into zeros). Only the part of the photo that the crop shows is resized. A target, uint8
    (H, W), goes the same way to its nearest pixel, void (255) around it, and is the fourth channel of the result.
    """
    height, width = image.shape[-2:]
    if crop.long_side is None:
        factor = rng.uniform(*crop.scale)
    else:
        factor = int(rng.integers(crop.long_side[0], crop.long_side[1] + 1)) / max(height, width)
    flip = rng.random() < 0.5
    source, target_place = [], []
    for size in (height, width):
        new = max(1, round(size * factor))
        shown = min(new, crop.size)
        place = int(rng.integers(0, crop.size - shown + 1))
        start = int(rng.integers(0, new - shown + 1))
        begin = min(round(start * size / new), size - 1)
        end = min(max(round((start + shown) * size / new), begin + 1), size)
        source.append(slice(begin, end))
        target_place.append(slice(place, place + shown))
    rows, columns = target_place
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    part = resize(image[:, source[0], source[1]], *shape)
    if target is not None:
        nearest = interpolate(target[None, None, source[0], source[1]], size=shape, mode="nearest-exact")[0]
        part, fill = torch.cat((part, nearest)), (*fill, 255)
    if shape != (crop.size, crop.size):
        canvas = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, crop.size, crop.size)
        canvas[:, rows, columns] = part
        part = canvas
    return part.flip(-1) if flip else part
