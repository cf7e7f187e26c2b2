"""The user's own photos as a source: images/, labels.csv, and where there are some masks/ and classes.txt."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from esol.data.photos import photo_format
from esol.errors import DataError
from shards.inputs import list_files, read_bytes, read_head, read_lines
from shards.labels import Row, read_rows
from shards.names import foreground, is_background, keys_of
from shards.samples import VOID, Source, check_labels, encode_mask, listing, pack

_PICTURES = frozenset(
    "jpg jpeg jpe jfif pjpeg pjp mpo png webp avif bmp gif heic heif jp2 jxl tif tiff dng nef cr2 arw".split()  # noqa: SIM905
)


def folder_source(root: str, long_side: int = 0) -> Source:
    """Reads ROOT/images, ROOT/labels.csv, ROOT/masks/<same name>.png and ROOT/classes.txt (a folder or URL).

    labels.csv has the header image,labels or image,labels,split; labels are separated by semicolons; split is train
    where none is given. Classes are the lines of classes.txt, else the labels of the csv, sorted. A photo is what its
    bytes say, whatever its suffix. Masks of 0 and 255 alone count as drawn objects where the photo's label, or the
    mask's folder, says of which class. DataError lists every row and file that does not fit.
    """
    root = root.rstrip("/")
    table = f"{root}/labels.csv"
    notes: list[str] = []
    classes: tuple[str, ...] = ()
    if "classes.txt" in list_files(root, below=False):
        classes, notes = foreground(read_lines(f"{root}/classes.txt"), f"{root}/classes.txt")
    rows, more = read_rows(table, classes)
    notes += more
    if not classes:
        labels = sorted({label for row in rows for label in row.labels})
        classes, _ = foreground([label for label in labels if not is_background(label)], table)
    there = list_files(f"{root}/images")
    photos = _Finder(there)
    problems: list[str] = []
    by_image: dict[str, Row] = {}
    for row in rows:
        where = f"{table}, line {row.line}"
        if not (image := photos.find(row.image)):
            problems.append(f"{where}: there is no image images/{row.image}")
            continue
        if image in by_image:
            problems.append(f"{where}: image {row.image} stands in line {by_image[image].line} as well")
            continue
        by_image[image] = row
        if none := [label for label in row.labels if is_background(label)]:
            problems.append(f"{where}: {none[0]!r} is no class, every mask's 0: leave photos without any object out")
        elif not row.labels:
            problems.append(f"{where}: image {row.image} has no label")
        else:
            try:
                check_labels(row.labels, classes, where)
            except DataError as error:
                problems.append(str(error))
    problems += [
        f"images/{name} has no row in {table}" for name in sorted(there - by_image.keys()) if _is_picture(root, name)
    ]
    masks, odd = _masks(list_files(f"{root}/masks"), by_image)
    problems += [f"masks/{name}{why} {table}" if why.endswith("of") else f"masks/{name}{why}" for name, why in odd]
    if problems:
        raise DataError(listing(f"{root}: {len(problems)} problems", problems))
    keys = keys_of(sorted(by_image))
    image_of = {key: image for image, key in keys.items()}
    binary = _binary(root, masks, by_image, classes)
    if binary:
        notes.append(f"{root}/masks: in {len(binary)} masks of 0 and 255 alone 255 is taken as the class of the photo")

    def read(key: str) -> dict[str, bytes]:
        image = image_of[key]
        mask_name = masks.get(image, "")
        mask = read_bytes(f"{root}/masks/{mask_name}") if mask_name else None
        if mask is not None and image in binary:
            levels = np.array(Image.open(io.BytesIO(mask)))
            mask = encode_mask(np.where(levels == VOID, np.uint8(binary[image]), levels))
        photo = read_bytes(f"{root}/images/{image}")
        labels = by_image[image].labels
        return pack(key, f"images/{image}", photo, labels, classes, mask, f"masks/{mask_name}", long_side=long_side)

    splits: dict[str, list[str]] = {}
    for image, row in by_image.items():
        splits.setdefault(row.split, []).append(keys[image])
    return Source(classes, splits, read, tuple(notes))


class _Finder:
    """The file that a row means: of that name, in whatever Unicode form, or of that name with a suffix."""

    def __init__(self, files: Iterable[str]) -> None:
        self._exact = set(files)
        self._composed = {unicodedata.normalize("NFC", name): name for name in sorted(self._exact, reverse=True)}
        self._stems: dict[str, list[str]] = {}
        for name in sorted(self._exact):
            stem = unicodedata.normalize("NFC", str(PurePosixPath(name).with_suffix("")))
            self._stems.setdefault(stem, []).append(name)

    def find(self, image: str) -> str:
        """Its path, or nothing."""
        if image in self._exact:
            return image
        stems = self._stems.get(image, [])
        return self._composed.get(image) or (stems[0] if len(stems) == 1 else "")


def _is_picture(root: str, name: str) -> bool:
    """Whether a file that no row names is a photo that somebody may miss, by its name or its first bytes."""
    if PurePosixPath(name).name.startswith(".") or PurePosixPath(name).suffix.lower().lstrip(".") in _PICTURES:
        return not PurePosixPath(name).name.startswith(".")
    return not PurePosixPath(name).suffix and bool(photo_format(read_head(f"{root}/images/{name}")))


def _masks(files: Iterable[str], rows: Mapping[str, Row]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Image -> its mask, and masks that cannot be used, with the reason."""
    images: dict[str, list[str]] = {}
    for image in rows:
        images.setdefault(_stem(image), []).append(image)
    found: dict[str, str] = {}
    odd = []
    for name in sorted(files):
        suffix = PurePosixPath(name).suffix.lower().lstrip(".")
        if PurePosixPath(name).name.startswith(".") or suffix not in _PICTURES:
            continue
        if suffix != "png":
            odd.append((name, f": {suffix.upper()} masks are not read; save class numbers as PNG"))
        elif _stem(name) not in images:
            odd.append((name, " belongs to no image of"))
        else:
            found |= dict.fromkeys(images[_stem(name)], name)
    return found, odd


def _stem(path: str) -> str:
    return unicodedata.normalize("NFC", str(PurePosixPath(path).with_suffix("")))


def _binary(root: str, masks: Mapping[str, str], rows: Mapping[str, Row], classes: tuple[str, ...]) -> dict[str, int]:
    """Image -> what 255 in its mask stands for, where no mask of the set holds a class number; empty elsewhere.

    One class, one label of the photo, or a part of the mask's path that is the name of one: else DataError.
    """
    white = []
    for image, name in masks.items():
        try:
            levels = np.array(Image.open(io.BytesIO(read_bytes(f"{root}/masks/{name}"))))
        except Exception:  # reading says what is wrong with it
            return {}
        if levels.dtype != np.uint8 or levels.ndim != 2 or (levels % VOID).any():
            return {}
        if (levels == VOID).any():
            white.append(image)
    meant: dict[str, int] = {}
    for image in white:
        labels = rows[image].labels
        parts = {part.casefold() for part in PurePosixPath(masks[image]).parts[:-1]}
        named = [name for name in classes if name.casefold() in parts]
        if len(classes) == 1 or len(labels) == 1 or len(named) == 1:
            name = classes[0] if len(classes) == 1 else labels[0] if len(labels) == 1 else named[0]
            meant[image] = classes.index(name) + 1
        else:
            numbers = ", ".join(f"{n} = {name}" for n, name in enumerate(classes[:4], 1))
            raise DataError(
                f"{root}/masks/{masks[image]} holds 0 and 255 alone, and its photo is labelled {', '.join(labels)}: "
                f"number the objects in it by their class, {numbers}, ..."
            )
    return meant
