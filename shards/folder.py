"""The user's own photos as a source: images/, labels.csv, and where there are some masks/ and classes.txt."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Mapping
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from esol.base.errors import DataError
from esol.base.palette import VOID
from esol.data.photos import photo_format
from esol.data.samples import encode_mask
from shards.inputs import list_files, read_bytes, read_head, read_lines
from shards.labels import Row, name_labels, read_rows
from shards.names import FileNames, is_background, safe_key
from shards.samples import Source, check_labels, listing, negatives, pack

_SPLITS = ("train", "val", "test")  # names of splits, whatever the classes are called
_PICTURES = frozenset(
    "jpg jpeg jpe jfif pjpeg pjp mpo png webp avif bmp gif heic heif jp2 jxl tif tiff dng nef cr2 arw".split()  # noqa: SIM905
)


def folder_source(root: str, long_side: int = 0, drop_unlabelled: bool = False) -> Source:
    """Reads ROOT/images, ROOT/labels.csv, ROOT/masks/<same name>.png and ROOT/classes.txt (a folder or URL).

    labels.csv as shards.labels reads it; split is train where none is given. A row without a label is a photo without
    any object, unless drop_unlabelled leaves it out. Classes are the lines of classes.txt, else
    the labels of the csv, sorted. A photo is what its bytes say, whatever its suffix. Masks of 0 and 255 alone count as
    drawn objects where the photo's label, or the mask's folder, says of which class. DataError lists every row and file
    that does not fit.
    """
    root = root.rstrip("/")
    table = f"{root}/labels.csv"
    rows = read_rows(table)
    listed = read_lines(f"{root}/classes.txt") if "classes.txt" in list_files(root, below=False) else None
    classes, notes = name_labels(rows, table, listed)
    if not classes:
        raise DataError(f"{table} names no class: no row has a label, so that there is nothing to learn")
    photos = FileNames(list_files(f"{root}/images"))
    problems: list[str] = []
    by_photo: dict[str, Row] = {}
    keys: dict[str, str] = {}
    renamed: list[str] = []
    for row in rows:
        where = f"{table}, line {row.line}"
        photo = photos.find(row.image) or photos.find_stem(row.image)
        if photo is None:
            problems.append(f"{where}: there is no image images/{row.image}")
            continue
        if photo != photos.same(row.image):
            renamed.append(f"{row.image!r} is {photo!r}")
        key = safe_key(_stem(photo if photo == row.image else unicodedata.normalize("NFC", photo)))
        if photo in by_photo:
            line = by_photo[photo].line
            problems.append(
                f"{where}: image {row.image} stands in line {line} too; one row an image, labels joined by ;"
            )
            continue
        if key in keys:
            line = by_photo[keys[key]].line
            problems.append(f"{where}: image {row.image} has the same key {key} as line {line}")
            continue
        by_photo[photo], keys[key] = row, photo
        if none := [label for label in row.labels if is_background(label)]:
            problems.append(
                f"{where}: {none[0]!r} is no class, every mask's 0: leave the cell of a photo without any object empty"
            )
        else:
            try:
                check_labels(row.labels, classes, where)
            except DataError as error:
                problems.append(str(error))
        if row.split in classes and row.split not in _SPLITS:
            problems.append(f"{where}: split {row.split!r} is the name of a class; labels are joined by ; in one cell")
    unlisted = sorted(photos.names - by_photo.keys())
    problems += [f"images/{name} has no row in {table}" for name in unlisted if _is_picture(root, name)]
    masks, odd = _masks(root, by_photo, table)
    problems += odd
    if problems:
        raise DataError(listing(f"{root}: {len(problems)} problems", problems))
    binary = _binary(root, masks, by_photo, classes)
    if binary:
        notes.append(f"{root}/masks: in {len(binary)} masks of 0 and 255 alone 255 is taken as the class of the photo")

    unlabelled = [photo for photo, row in by_photo.items() if not row.labels]
    notes += negatives(table, unlabelled, drop_unlabelled)
    if renamed:
        notes.append(f"{table}: {len(renamed)} photos were found under another name: {', '.join(renamed[:2])}")

    def read(key: str) -> dict[str, bytes]:
        photo = keys[key]
        mask_name = masks.get(photo, "")
        mask = read_bytes(f"{root}/masks/{mask_name}") if mask_name else None
        if mask is not None and photo in binary:
            levels = np.array(Image.open(io.BytesIO(mask)))
            mask = encode_mask(np.where(levels == VOID, np.uint8(binary[photo]), levels))
        data, labels = read_bytes(f"{root}/images/{photo}"), by_photo[photo].labels
        return pack(key, f"images/{photo}", data, labels, classes, mask, f"masks/{mask_name}", long_side=long_side)

    splits: dict[str, list[str]] = {}
    for key, photo in keys.items():
        if drop_unlabelled and not by_photo[photo].labels:
            continue
        splits.setdefault(by_photo[photo].split, []).append(key)
    return Source(classes, splits, read, tuple(notes))


def _is_picture(root: str, name: str) -> bool:
    """Whether a file that no row names is a photo that somebody may miss, by its name or its first bytes."""
    base = PurePosixPath(name)
    if base.name.startswith("."):
        return False
    suffix = base.suffix.lower().lstrip(".")
    return suffix in _PICTURES or (not suffix and bool(photo_format(read_head(f"{root}/images/{name}"))))


def _masks(root: str, photos: Mapping[str, Row], table: str) -> tuple[dict[str, str], list[str]]:
    """Photo -> its mask, and a line for each file of masks/ that cannot be used."""
    there = FileNames(list_files(f"{root}/masks"))
    found = {photo: mask for photo in photos if (mask := there.same(f"{_stem(photo)}.png"))}
    odd = []
    for name in sorted(there.names - set(found.values())):
        suffix = PurePosixPath(name).suffix.lower().lstrip(".")
        if PurePosixPath(name).name.startswith(".") or suffix not in _PICTURES:
            continue
        if suffix == "png":
            odd.append(f"masks/{name} belongs to no image of {table}")
        else:
            odd.append(f"masks/{name}: {suffix.upper()} masks are not read; save class numbers as PNG")
    return found, odd


def _stem(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.name else name


def _binary(root: str, masks: Mapping[str, str], rows: Mapping[str, Row], classes: tuple[str, ...]) -> dict[str, int]:
    """Photo -> what 255 in its mask stands for, where no mask of the set holds a class number; empty elsewhere.

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
