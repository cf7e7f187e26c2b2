"""PASCAL VOC 2012 as a source: JPEGImages, ImageSets, and labels from Annotations or from IRN's cls_labels.npy."""

from __future__ import annotations

import io
import pickle
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from esol.base.errors import DataError
from esol.base.palette import VOID
from esol.data.index import PHOTO_EXTENSIONS
from esol.data.samples import decode_mask, encode_mask
from shards.inputs import list_files, read_bytes, read_lines
from shards.names import FileNames, safe_key
from shards.samples import Reads, Source, check_labels, negatives, pack
from shards.voc_xml import CLASSES, labels_of

SPLITS = ("train", "train_aug", "val")


@dataclass(frozen=True)
class _Photo:
    """Files of one sample below the root, the mask's "" where there is none."""

    name: str
    labels: list[str]
    mask: str


def voc_source(
    root: str,
    splits: Sequence[str] = (),
    classes: Sequence[str] = CLASSES,
    labels: str = "",
    masks: str = "SegmentationClass",
    ids_dir: str = "",
    long_side: int = 0,
    drop_unlabelled: bool = False,
    no_labels: Sequence[str] = (),
) -> Source:
    """Reads a VOC 2012 tree (folder or URL) with the given splits: names of lists in ids_dir, or NAME=FILE.

    Labels are all objects of Annotations, difficult ones too, as in IRN's label script. With a subset of classes other
    labels are dropped and other classes' pixels become background. An image that keeps no label is a photo without any
    object, unless drop_unlabelled leaves it out. no_labels: splits whose images have no Annotations (VOC's test), to
    predict only.
    """
    classes = tuple(classes)
    if len(check_labels(classes, CLASSES, "--classes")) != len(classes) or not classes:
        raise DataError(f"--classes: name every class once, got {', '.join(classes) or 'none'}")
    root = root.rstrip("/")
    photos = _by_stem(list_files(f"{root}/JPEGImages"))
    stems = FileNames(photos)
    mask_names = FileNames(list_files(f"{root}/{masks}") if masks else ())
    lists = {name: _read_list(file, stems) for name, file in _lists(root, splits, ids_dir).items()}
    if unknown := sorted(set(no_labels) - set(lists)):
        raise DataError(f"--no-labels {unknown[0]}: the splits are {', '.join(lists)}")
    labelled = {id for name, ids in lists.items() if name not in no_labels for id in ids}
    vectors = read_cls_labels(labels) if labels else None
    annotations = FileNames(list_files(f"{root}/Annotations") if vectors is None else ())
    known: dict[str, list[str]] = {}
    unlabelled = []
    for id in dict.fromkeys(i for ids in lists.values() for i in ids):
        if id not in photos:
            raise DataError(
                f"{root}/JPEGImages/{id}.jpg is missing, a split lists it; lists may be given: --split NAME=FILE"
            )
        if id not in labelled:
            known[id] = []
            continue
        if vectors is None:
            found = labels_of(f"{root}/Annotations/{annotations.same(f'{id}.xml') or f'{id}.xml'}")
        else:
            found = _labels_in(vectors, id, labels)
        known[id] = [c for c in classes if c in found]
        if not known[id]:
            unlabelled.append(id)
    if drop_unlabelled:
        lists = {name: [i for i in ids if known[i] or i not in labelled] for name, ids in lists.items()}
    notes = negatives(root, unlabelled, drop_unlabelled)
    id_of: dict[str, str] = {}
    for id in known:
        if id_of.setdefault(safe_key(id), id) != id:
            raise DataError(
                f"{root}: images {id_of[safe_key(id)]} and {id} have the same key {safe_key(id)}; rename one"
            )
    items = {}
    for key, id in id_of.items():
        mask = mask_names.same(f"{id}.png")
        items[key] = _Photo(f"JPEGImages/{photos[id]}", known[id], f"{masks}/{mask}" if mask is not None else "")
    read = Reads(partial(_read, root, classes, long_side), items)
    return Source(classes, {name: [safe_key(id) for id in ids] for name, ids in lists.items()}, read, notes)


def _read(root: str, classes: tuple[str, ...], long_side: int, key: str, photo: _Photo) -> dict[str, bytes]:
    data, mask = read_bytes(f"{root}/{photo.name}"), None
    if photo.mask:
        mask = read_bytes(f"{root}/{photo.mask}")
        if classes != CLASSES:
            mask = _renumber(mask, photo.mask, classes)
    return pack(key, photo.name, data, photo.labels, classes, mask, photo.mask, long_side)


def _by_stem(files: set[str]) -> dict[str, str]:
    """Photos by their name without extension; of two a .jpg."""
    found: dict[str, str] = {}
    for name in sorted(files, key=lambda name: (not name.endswith(".jpg"), name)):
        stem, _, extension = name.rpartition(".")
        if extension.lower() in PHOTO_EXTENSIONS:
            found.setdefault(stem, name)
    return found


def _lists(root: str, splits: Sequence[str], ids_dir: str) -> dict[str, str]:
    """Split -> path of its list; without a wish, those of SPLITS that exist."""
    home = (ids_dir or f"{root}/ImageSets/Segmentation").rstrip("/")
    if not splits:
        there = list_files(home)
        found = {name: f"{home}/{name}.txt" for name in SPLITS if f"{name}.txt" in there}
        if not found:
            raise DataError(
                f"{home} holds none of train.txt, train_aug.txt, val.txt; give lists with --split NAME=FILE"
            )
        return found
    return {name: file or f"{home}/{name}.txt" for name, _, file in (split.partition("=") for split in splits)}


def _read_list(file: str, photos: FileNames) -> list[str]:
    """Ids of a list; its lines are ids, ids with a flag (1, 0, -1), or, as in some train_aug.txt, photo and mask."""
    ids = [_id(line, photos) for line in read_lines(file)]
    if not ids:
        raise DataError(f"{file} lists no image")
    for id, times in Counter(ids).items():
        if times > 1:
            raise DataError(f"{file} lists {id} {times} times")
    return ids


def _id(line: str, photos: FileNames) -> str:
    two = re.match(rf"(.+?\.({'|'.join(PHOTO_EXTENSIONS)}))\s+\S", line, re.IGNORECASE)
    readings = [two[1]] if two else [line, re.sub(r"\s+(-1|0|1)$", "", line), line.split()[0]]
    for reading in readings:
        plain = re.sub(rf"\.({'|'.join(PHOTO_EXTENSIONS)})$", "", reading, flags=re.IGNORECASE)
        for name in (reading, plain, plain.replace("\\", "/").rpartition("/")[2]):
            if (found := photos.same(name)) is not None:
                return found
    return Path(line.split()[0]).stem


def _labels_in(vectors: dict[Any, np.ndarray], key: str, file: str) -> set[str]:
    number = key.replace("_", "")
    vector = vectors.get(key, vectors.get(int(number)) if number.isdecimal() else None)  # IRN's keys are 2007000032
    if vector is None:
        raise DataError(f"{file} has no labels for {key}")
    if vector.shape != (len(CLASSES),):
        raise DataError(f"{file}: labels of {key} have shape {vector.shape}, expected ({len(CLASSES)},)")
    return {name for name, value in zip(CLASSES, vector, strict=True) if value > 0}


def _renumber(mask: bytes, name: str, classes: tuple[str, ...]) -> bytes:
    table = np.zeros(256, dtype=np.uint8)
    table[VOID] = VOID
    for number, own in enumerate(classes, start=1):
        table[CLASSES.index(own) + 1] = number
    return encode_mask(table[decode_mask(mask, name, len(CLASSES))])


# What a pickled dict of numpy arrays needs, by numpy 1 and 2 and pickle protocols 2 to 5; none of these runs anything.
_ADMITTED = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which label vectors do not need")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_cls_labels(path: str) -> dict[Any, np.ndarray]:
    """IRN's cls_labels.npy: image id (int, or text as in PSA) -> float (20,); no code that a pickle holds is run."""
    file = io.BytesIO(read_bytes(path))
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        if shape != () or dtype.kind != "O":
            raise ValueError(f"an array of {dtype} {shape} instead of a dict")
        held = _ArraysOnly(file, encoding="latin1").load()
        found = held.item() if isinstance(held, np.ndarray) else None
        if not isinstance(found, dict) or not all(isinstance(v, np.ndarray) for v in found.values()):
            raise ValueError("it does not hold a dict of arrays")
    except Exception as error:  # damaged pickles raise anything
        raise DataError(f"{path} is not a cls_labels.npy that can be read safely: {error}") from error
    return {k if isinstance(k, str) else int(k): v for k, v in found.items()}
