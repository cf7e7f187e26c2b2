"""One sample on its way into a shard: photo, labels and mask are checked against each other and packed."""

from __future__ import annotations

import difflib
import io
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from esol.base.errors import DataError
from esol.data.photos import OTHERS, check_png, other_photo, photo_format, upright_rgb, upright_size
from esol.data.samples import decode_mask, encode_jpeg, encode_mask

PHOTO_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with more behind it

Item = TypeVar("Item")


@dataclass(frozen=True)
class Reads(Generic[Item]):
    """A source's `read` for several processes: what is to be known of each sample goes to the one that makes its shard.

    work: a module's function, or functools.partial of one with what all samples share; called with a key and its item.
    """

    work: Callable[[str, Item], dict[str, bytes]]
    items: Mapping[str, Item]

    def __call__(self, key: str) -> dict[str, bytes]:
        return self.work(key, self.items[key])

    def part(self, keys: Sequence[str]) -> Reads[Item]:
        """The same for some keys alone, to be pickled."""
        return Reads(self.work, {key: self.items[key] for key in keys})


@dataclass(frozen=True)
class Source:
    """What `create` turns into shards.

    classes: names without background; splits: name -> keys; read: key -> sample as pack returns it, called in any order
    and from several threads, DataError where the sample cannot be used; several processes read what is a Reads. notes:
    lines on what was merged or left out.
    """

    classes: tuple[str, ...]
    splits: dict[str, list[str]]
    read: Callable[[str], dict[str, bytes]]
    notes: Sequence[str] = ()


def pack(
    key: str,
    name: str,
    photo: bytes,
    labels: Iterable[str],
    classes: Sequence[str],
    mask: bytes | None = None,
    mask_name: str = "",
    long_side: int = 0,
) -> dict[str, bytes]:
    """Checks a sample and returns it as webdataset writes it: {"__key__", "jpg" (or png, webp), "json", "mask.png"}.

    The photo's bytes stay as they are, unless its long side exceeds long_side > 0: then photo (Lanczos, JPEG quality
    95) and mask (nearest) are made smaller. TIFF, BMP, GIF, AVIF and HEIC become JPEG, quality 95. DataError names
    photo (name) or mask (mask_name): unreadable, not of one size, unknown value, unknown label.
    """
    image = open_image(photo, name)
    ext = PHOTO_FORMATS.get(image.format or "")
    if image.format in OTHERS.values():
        ext, photo = "jpg", encode_jpeg(upright_rgb(image))
    if ext is None:
        raise DataError(f"{name}: {image.format} is not supported; convert it to JPEG, PNG or WebP")
    width, height = upright_size(image)
    labels = check_labels(labels, classes, name)
    levels = None if mask is None else decode_mask(mask, mask_name, len(classes))
    if levels is not None and levels.shape != (height, width):
        size = _text((levels.shape[1], levels.shape[0]))
        raise DataError(f"{mask_name} is {size} pixels, but its photo {name} is {_text((width, height))}")
    if 0 < long_side < max(width, height):
        scale = long_side / max(width, height)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        photo, ext = _smaller(image, (width, height)), "jpg"
        if levels is not None:
            small = Image.fromarray(levels).resize((width, height), Image.Resampling.NEAREST)
            mask = encode_mask(np.asarray(small))
    about = json.dumps({"labels": labels, "height": height, "width": width}, ensure_ascii=False)
    sample = {"__key__": key, ext: photo, "json": about.encode()}
    if mask is not None:
        sample["mask.png"] = mask
    return sample  # type: ignore[return-value]  # webdataset's own __key__ is text


def listing(headline: str, problems: Sequence[str]) -> str:
    """A message with the first 20 problems, a line each."""
    more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
    return "\n  ".join([headline, *problems[:20], *more])


def negatives(root: str, unlabelled: Sequence[str], dropped: bool) -> list[str]:
    """A note on the images without a label: taken as photos without any object of the classes, or dropped."""
    if not unlabelled:
        return []
    some = f"{', '.join(unlabelled[:3])}{', ...' if len(unlabelled) > 3 else ''}"
    what = "are left out" if dropped else "count as photos without any object; --drop-unlabelled leaves them out"
    return [f"{root}: {len(unlabelled)} images have no label ({some}): they {what}"]


def check_labels(labels: Iterable[str], classes: Sequence[str], name: str) -> list[str]:
    """The labels in class order; DataError names one that is not a class, and the nearest that is."""
    labels = set(labels)
    for label in sorted(labels - set(classes)):
        close = difflib.get_close_matches(label, classes, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the classes are: {', '.join(classes)}"
        raise DataError(f"{name}: label {label!r} is not in the class list; {hint}")
    return [c for c in classes if c in labels]


def open_image(data: bytes, name: str) -> Image.Image:
    """Decodes all of an image; DataError names it where that fails."""
    if (other := other_photo(data, name)) is not None:
        return other
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF blocks, big images: neither is damage
            image = Image.open(io.BytesIO(data))
            image.load()
            check_png(data)
    except UnidentifiedImageError as error:
        known = photo_format(data)
        what = f"{known}: convert it to JPEG, PNG or WebP" if known else "of no known format"
        raise DataError(f"{name}: unreadable image ({what}); {len(data)} bytes") from error
    except Exception as error:  # PIL raises whatever a damaged file leads its parsers to
        raise DataError(f"{name}: unreadable image ({error}); {len(data)} bytes") from error
    return image


def _smaller(image: Image.Image, size: tuple[int, int]) -> bytes:
    return encode_jpeg(upright_rgb(image).resize(size, Image.Resampling.LANCZOS))


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
