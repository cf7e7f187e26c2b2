"""MS COCO as a source: photos, and labels and masks from instances json files, through pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from esol.errors import DataError
from shards.inputs import read_bytes
from shards.samples import Source, encode_mask, pack


@dataclass(frozen=True)
class _Entry:
    """Where one image comes from: its photo, its json file (for messages) and what that says of it."""

    photo: str
    place: str
    info: dict[str, Any]
    annotations: list[dict[str, Any]]  # without crowd regions, in the file's order


def coco_source(
    images: Sequence[str], annotations: Sequence[str], splits: Sequence[str], keep_unannotated: bool = False
) -> Source:
    """One split per instances file; images: a folder for each, or one for all.

    Classes are the categories by ascending id, numbered 1..C. Masks leave crowd regions out, and later annotations
    overwrite earlier ones; labels are the categories of the annotations that are no crowd. Images without any are left
    out (82,081 and 40,137 of 2014's 82,783 and 40,504 stay) unless keep_unannotated.
    """
    if len(annotations) != len(splits):
        raise DataError(f"{len(annotations)} --annotations need as many --split names, got {len(splits)}")
    if len(images) not in (1, len(annotations)):
        raise DataError(f"{len(annotations)} --annotations need one --images each, or one for all, got {len(images)}")
    if len(set(splits)) != len(splits):
        raise DataError(f"--split names must differ: {', '.join(splits)}")
    folders = list(images) * len(annotations) if len(images) == 1 else images
    entries: dict[str, _Entry] = {}
    lists: dict[str, list[str]] = {}
    categories: dict[int, str] = {}
    for folder, file, split in zip(folders, annotations, splits, strict=True):
        coco = _load(file)
        try:
            named = {int(c["id"]): str(c["name"]) for c in coco.dataset["categories"]}
            found = _entries(coco, folder, file, keep_unannotated)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file} is not a COCO instances file: {type(error).__name__} {error}") from error
        if categories and named != categories:
            raise DataError(f"{file} has other categories than {annotations[0]}")
        categories = named
        for key in entries.keys() & found.keys():
            raise DataError(f"image {key} is in {found[key].place} and in {entries[key].place}")
        entries |= found
        lists[split] = list(found)
    classes = tuple(categories[i] for i in sorted(categories))
    number = {category: n for n, category in enumerate(sorted(categories), start=1)}

    def read(key: str) -> dict[str, bytes]:
        entry = entries[key]
        mask = encode_mask(_paint(entry, number))
        labels = {categories[a["category_id"]] for a in entry.annotations}
        name = f"{entry.place}: image {entry.info['id']}"
        return pack(key, entry.photo, read_bytes(entry.photo), labels, classes, mask, name)

    return Source(classes, lists, read)


def _load(file: str) -> Any:
    from pycocotools.coco import COCO  # imports matplotlib: not at the top, so that --help is quick

    coco = COCO()
    try:
        coco.dataset = json.loads(read_bytes(file))
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            coco.createIndex()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{file} is not a COCO instances file: {type(error).__name__} {error}") from error
    return coco


def _entries(coco: Any, folder: str, file: str, keep_unannotated: bool) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for image in coco.dataset["images"]:
        annotations = [a for a in coco.imgToAnns.get(image["id"], []) if not a.get("iscrowd", 0)]
        for annotation in annotations:
            if annotation["category_id"] not in coco.cats:
                raise DataError(
                    f"{file}: annotation {annotation['id']} has unknown category {annotation['category_id']}"
                )
        if annotations or keep_unannotated:
            key = PurePosixPath(image["file_name"]).stem
            if key in entries:
                raise DataError(f"{file} lists image {key} twice")
            entries[key] = _Entry(f"{folder.rstrip('/')}/{image['file_name']}", file, image, annotations)
    return entries


def _paint(entry: _Entry, number: dict[int, int]) -> np.ndarray:
    """uint8 (H, W) mask; the same conversions as COCO.annToMask, which wants the whole data set at hand."""
    from pycocotools import mask as rle

    height, width = int(entry.info["height"]), int(entry.info["width"])
    levels = np.zeros((height, width), dtype=np.uint8)
    for annotation in entry.annotations:
        shape: Any = annotation.get("segmentation")
        try:
            if isinstance(shape, list):
                coded = rle.merge(rle.frPyObjects(shape, height, width))
            elif isinstance(shape["counts"], list):
                coded = rle.frPyObjects(shape, height, width)
            else:
                coded = shape
            inside = rle.decode(coded)
            levels[inside > 0] = number[annotation["category_id"]]
        except Exception as error:  # pycocotools raises bare Exceptions
            raise DataError(f"{entry.place}: annotation {annotation.get('id')}: bad segmentation ({error})") from error
    return levels
