"""MS COCO as a source: photos, and labels and masks from instances json files of COCO and of annotation tools."""

from __future__ import annotations

import hashlib
import io
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from esol.base.errors import DataError
from esol.data.samples import encode_mask
from shards.coco_file import CocoFile, CocoImage, classes_of, read_coco
from shards.coco_shapes import has_shape, inside, within_one
from shards.inputs import list_files, read_bytes
from shards.names import FileNames, check_count, safe_key
from shards.samples import Reads, Source, listing, open_image, pack, upright_size


@dataclass(frozen=True)
class _Entry:
    """One sample: its image, the photo that it names, and how its file means the annotations."""

    place: str
    split: str
    image: CocoImage
    folder: str
    photo: str  # relative to folder
    masked: bool
    normalised: bool

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.photo}"


def coco_source(
    images: Sequence[str], annotations: Sequence[str], splits: Sequence[str], keep_unannotated: bool = False
) -> Source:
    """One split per instances file; images: a folder for each, or one for all.

    Classes are the categories by ascending id, numbered 1..C. Masks leave crowd regions out, and later annotations
    overwrite earlier ones; labels are the categories of the annotations that are no crowd. A photo has a mask if all
    its annotations have a shape. Images without any annotation are left out (82,081 and 40,137 of 2014's 82,783 and
    40,504 stay) unless keep_unannotated. Keys are the names of the photos, with their folders where names meet.
    """
    if len(annotations) != len(splits):
        raise DataError(f"{len(annotations)} --annotations need as many --split names, got {len(splits)}")
    if len(images) not in (1, len(annotations)):
        raise DataError(f"{len(annotations)} --annotations need one --images each, or one for all, got {len(images)}")
    if len(set(splits)) != len(splits):
        raise DataError(f"--split names must differ: {', '.join(splits)}")
    folders = [folder.rstrip("/") for folder in images] * (len(annotations) if len(images) == 1 else 1)
    photos = {folder: _photos(folder) for folder in dict.fromkeys(folders)}
    files = [read_coco(file) for file in annotations]
    classes, number, notes = classes_of(files)
    check_count(classes, annotations[0])
    entries: list[_Entry] = []
    for folder, file, split in zip(folders, files, splits, strict=True):
        found, said = _entries(file, split, folder, photos[folder], keep_unannotated)
        entries += found
        notes += said
    if not entries:
        raise DataError(
            f"{', '.join(annotations)}: no image has an annotation; --keep-unannotated takes them as they are"
        )
    by_path: dict[str, _Entry] = {}
    for entry in entries:
        other = by_path.setdefault(entry.path, entry)
        if other is not entry:
            raise DataError(
                f"photo {entry.path} is image {other.image.id} of {other.place}"
                f" and image {entry.image.id} of {entry.place}"
            )
    by_key = dict(zip(_keys(entries), entries, strict=True))
    lists: dict[str, list[str]] = {split: [] for split in splits}
    for key, entry in by_key.items():
        lists[entry.split].append(key)
    return Source(classes, lists, Reads(partial(_read, classes, number), by_key), notes)


def _read(classes: tuple[str, ...], number: dict[int | str, int], key: str, entry: _Entry) -> dict[str, bytes]:
    photo = read_bytes(entry.path)
    mask = encode_mask(_paint(entry, photo, number)) if entry.masked else None
    labels = {classes[number[a["category_id"]] - 1] for a in entry.image.annotations}
    return pack(key, entry.path, photo, labels, classes, mask, f"{entry.place}: image {entry.image.id}")


def _photos(folder: str) -> FileNames | None:
    """None where a folder cannot be listed: then names are taken as they are."""
    return None if folder.startswith(("http://", "https://")) else FileNames(list_files(folder))


def _entries(
    file: CocoFile, split: str, folder: str, photos: FileNames | None, keep_unannotated: bool
) -> tuple[list[_Entry], list[str]]:
    everything = [annotation for image in file.images for annotation in image.annotations]
    shapes = not everything or any(map(has_shape, everything))  # boxes alone say nothing of unannotated photos' pixels
    fractions = Counter(map(within_one, everything))
    normalised = fractions[True] > 0 and not fractions[False]
    kept = [image for image in file.images if image.annotations or keep_unannotated]
    entries, missing, renamed = [], [], []
    for image in kept:
        photo = _plain(image.file_name) if photos is None else photos.find(image.file_name)
        if photo is None:
            missing.append(f"{folder}/{image.file_name} is missing")
            continue
        if photos is not None and photo != photos.same(image.file_name):
            renamed.append(f"{image.file_name!r} is {photo!r}")
        masked = shapes and all(map(has_shape, image.annotations))
        entries.append(_Entry(file.place, split, image, folder, photo, masked, normalised))
    if missing:
        lost = f"{file.place}: {len(missing)} photos are not there; --images is the folder that file names start from"
        raise DataError(listing(lost, missing))
    unmasked = sum(not entry.masked for entry in entries)
    counts = [
        (len(file.images) - len(kept), "images without annotation are left out (--keep-unannotated takes them)"),
        (file.strays, "annotations belong to no image of the file and are left out"),
        (file.crowds, "crowd regions are left out"),
        (unmasked, "photos have no mask, since not all of their annotations have a shape"),
        (len(renamed), f"photos were found under another name: {', '.join(renamed[:2])}"),
        (
            fractions[True] if normalised else 0,
            "polygons, all of them, lie within 0..1: fractions of the photos' sides",
        ),
        (
            0 if normalised else fractions[True],
            "annotations lie within one pixel; are they fractions of a photo's sides?",
        ),
    ]
    return entries, [f"{file.place}: {count} {what}" for count, what in counts if count]


def _plain(name: str) -> str | None:
    parts = name.replace("\\", "/").split("/")
    return None if ".." in parts or not parts[0] or "://" in name else "/".join(parts)


def _keys(entries: Sequence[_Entry]) -> list[str]:
    """The photo's name without folders; where several share it the path, then split and path, then a hash of these."""
    paths = [
        str(PurePosixPath(e.photo if e.photo == e.image.file_name else unicodedata.normalize("NFC", e.photo)))
        for e in entries
    ]
    stems = [str(PurePosixPath(path).with_suffix("")) for path in paths]
    full = [f"{entry.split}/{stem}" for entry, stem in zip(entries, stems, strict=True)]
    hashed = [
        f"{name}_{hashlib.sha256(f'{e.split}/{e.photo}'.encode()).hexdigest()[:12]}"
        for e, name in zip(entries, full, strict=True)
    ]
    keys = [safe_key(PurePosixPath(path).stem) for path in paths]
    for names in (stems, full, hashed):
        times = Counter(keys)
        keys = [key if times[key] == 1 else safe_key(name) for key, name in zip(keys, names, strict=True)]
    return keys


def _paint(entry: _Entry, photo: bytes, number: dict[int | str, int]) -> np.ndarray:
    """uint8 (H, W) mask of the photo's size; DataError where the file says another."""
    width, height = _photo_size(photo, entry.path)
    where = f"{entry.place}: image {entry.image.id}"
    if entry.image.size not in (None, (height, width)):
        told = "x".join(str(side)[:12] for side in reversed(entry.image.size or ()))
        raise DataError(f"{where} is {told} pixels, but its photo {entry.path} is {width}x{height}")
    levels = np.zeros((height, width), dtype=np.uint8)
    for annotation in entry.image.annotations:
        levels[inside(annotation, height, width, entry.normalised, entry.place)] = number[annotation["category_id"]]
    return levels


def _photo_size(photo: bytes, name: str) -> tuple[int, int]:
    try:
        return upright_size(Image.open(io.BytesIO(photo)))  # reads the header alone
    except Exception:
        return upright_size(open_image(photo, name))  # says what is wrong with it
