"""Somebody's own photos as a source: folders by class, or images/ and a table; masks/ where there are some."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from esol.base.errors import DataError
from esol.base.palette import VOID
from esol.data.samples import encode_mask
from shards.inputs import list_files, read_bytes
from shards.labels import Row
from shards.layout import PICTURES, Layout, is_picture, lay_out
from shards.names import FileNames, safe_key
from shards.samples import Reads, Source, check_labels, listing, negatives, pack

_SPLITS = ("train", "val", "test")  # names of splits, whatever the classes are called


@dataclass(frozen=True)
class _Photo:
    """Files of one sample, the mask's "" where there is none; white: what 255 in that stands for, 0 for void."""

    name: str
    labels: list[str]
    mask: str
    white: int


def folder_source(
    root: str, long_side: int = 0, drop_unlabelled: bool = False, table: str = "", negative: Sequence[str] = ()
) -> Source:
    """Somebody's own photos in a folder or URL: images/ beside a table of labels, or a folder for each class.

    table: of labels, in any dialect that shards.labels reads; "" takes ROOT/labels.csv, else the only table in ROOT.
    Without a table ROOT/CLASS/... or ROOT/images/CLASS/... name the classes, with folders train, val or test above them
    where there are some. negative: more labels or folders whose photos show no object, beside those of is_negative,
    unless classes.txt names them. masks/<same name>.png is a photo's mask. Split is train where none is given. A photo
    without a label shows no object, unless drop_unlabelled leaves it out. Classes are the lines of classes.txt, else
    the labels, sorted. A photo is what its bytes say, whatever its suffix. Masks of 0 and 255 alone count as drawn
    objects where the photo's label, or the mask's folder, says of which class. DataError lists every row and file that
    does not fit.
    """
    root = root.rstrip("/")
    laid = lay_out(root, table, negative)
    if not laid.classes:
        raise DataError(f"{laid.table or root} names no class: no photo has a label, so that there is nothing to learn")
    table, base, classes, notes = laid.table, laid.base, laid.classes, list(laid.notes)
    by_photo, keys, renamed, problems = _matched(root, laid)
    masks, odd = _masks(root, by_photo, table or f"{root}/{base}")
    problems += odd
    if problems:
        raise DataError(listing(f"{root}: {len(problems)} problems", problems))
    binary = _binary(root, masks, by_photo, classes)
    if binary:
        notes.append(f"{root}/masks: in {len(binary)} masks of 0 and 255 alone 255 is taken as the class of the photo")

    unlabelled = [photo for photo, row in by_photo.items() if not row.labels]
    notes += negatives(table or root, unlabelled, drop_unlabelled)
    if renamed:
        notes.append(f"{table}: {len(renamed)} photos were found under another name: {', '.join(renamed[:2])}")

    splits: dict[str, list[str]] = {}
    for key, photo in keys.items():
        if drop_unlabelled and not by_photo[photo].labels:
            continue
        splits.setdefault(by_photo[photo].split, []).append(key)
    photos = {
        key: _Photo(f"{base}{name}", by_photo[name].labels, masks.get(name, ""), binary.get(name, 0))
        for key, name in keys.items()
    }
    return Source(classes, splits, Reads(partial(_read, root, classes, long_side), photos), tuple(notes))


def _read(root: str, classes: tuple[str, ...], long_side: int, key: str, photo: _Photo) -> dict[str, bytes]:
    mask = read_bytes(f"{root}/masks/{photo.mask}") if photo.mask else None
    if mask is not None and photo.white:
        levels = np.array(Image.open(io.BytesIO(mask)))
        mask = encode_mask(np.where(levels == VOID, np.uint8(photo.white), levels))
    data = read_bytes(f"{root}/{photo.name}")
    return pack(key, photo.name, data, photo.labels, classes, mask, f"masks/{photo.mask}", long_side=long_side)


def _matched(root: str, laid: Layout) -> tuple[dict[str, Row], dict[str, str], list[str], list[str]]:
    """Photo -> its row, key -> photo, rows whose photo has another name, and a line for whatever does not fit."""
    table, base, photos = laid.table, laid.base, laid.photos
    by_photo: dict[str, Row] = {}
    keys: dict[str, str] = {}
    renamed: list[str] = []
    problems: list[str] = []
    for row in laid.rows:
        where = f"{table}, line {row.line}" if row.line else f"{root}/{base}{row.image}"
        photo = photos.find(row.image) or photos.find_stem(row.image)
        if photo is None:
            problems.append(f"{where}: there is no image {base}{row.image}")
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
        try:
            check_labels(row.labels, laid.classes, where)
        except DataError as error:
            problems.append(str(error))
        if row.split in laid.classes and row.split not in _SPLITS:
            problems.append(f"{where}: split {row.split!r} is the name of a class; labels are joined by ; in one cell")
    unlisted = sorted(photos.names - by_photo.keys())
    problems += [
        f"{base}{name} has no row in {table}" for name in unlisted if table and is_picture(f"{root}/{base}{name}")
    ]
    return by_photo, keys, renamed, problems


def _masks(root: str, photos: Mapping[str, Row], table: str) -> tuple[dict[str, str], list[str]]:
    """Photo -> its mask, and a line for each file of masks/ that cannot be used."""
    there = FileNames(list_files(f"{root}/masks"))
    found = {photo: mask for photo in photos if (mask := there.same(f"{_stem(photo)}.png"))}
    odd = []
    for name in sorted(there.names - set(found.values())):
        suffix = PurePosixPath(name).suffix.lower().lstrip(".")
        if PurePosixPath(name).name.startswith(".") or suffix not in PICTURES:
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
