"""Reads a COCO instances file as annotation tools write it, and says in one line what cannot be meant."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from esol.base.errors import DataError
from shards.inputs import read_bytes
from shards.names import fold, is_background, similar, tidy

Id = int | str


@dataclass
class CocoImage:
    """An image of a file, its size (height, width) where the file gives one, and its annotations without crowds."""

    id: Id
    file_name: str
    size: tuple[int, int] | None
    annotations: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class CocoFile:
    """What a file holds; categories: id -> (name, supercategory); strays: annotations of no image of the file."""

    place: str
    categories: dict[Id, tuple[str, str]]
    images: list[CocoImage]
    used: set[Id] = field(default_factory=set)
    crowds: int = 0
    strays: int = 0


def read_coco(file: str) -> CocoFile:
    """The file's images with their annotations, ids as numbers wherever they are whole numbers, "7" and 7.0 too.

    DataError names the entry that is not what COCO says, an id that stands for two, and a category that is not there.
    """
    try:
        tree = json.loads(read_bytes(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not a COCO instances file: {type(error).__name__} {error}") from error
    parts = {name: _entries(tree, name, file) for name in ("images", "annotations", "categories")}
    categories: dict[Id, tuple[str, str]] = {}
    for entry in parts["categories"]:
        key, name = _id(entry, "id", file, "a category"), _name(entry, file)
        if key in categories and fold(categories[key][0]) != fold(name):
            raise DataError(f"{file}: category id {key} is given twice, for {categories[key][0]!r} and for {name!r}")
        parent = entry.get("supercategory")
        categories.setdefault(key, (name, tidy(parent) if isinstance(parent, str) else ""))
    images: dict[Id, CocoImage] = {}
    for entry in parts["images"]:
        key = _id(entry, "id", file, "an image")
        photo = entry.get("file_name")
        if not isinstance(photo, str) or not photo.strip() or not photo.isprintable():
            raise DataError(f"{file}: image {key} has no file_name that can be used: {_short(photo)}")
        if key in images:
            raise DataError(
                f"{file}: image id {key} is given twice, for {images[key].file_name} and for {photo}; number merged"
                " files' images and annotations anew"
            )
        images[key] = CocoImage(key, photo, _size(entry, f"{file}: image {key}"))
    held = CocoFile(file, categories, list(images.values()))
    for entry in parts["annotations"]:
        what = f"annotation {entry.get('id')}"
        image, category = _id(entry, "image_id", file, what), _id(entry, "category_id", file, what)
        if category not in categories:
            raise DataError(f"{file}: {what} has unknown category {category}")
        crowd = _crowd(entry, f"{file}: {what}")
        if image not in images:
            held.strays += 1
            continue
        held.used.add(category)
        if crowd:
            held.crowds += 1
        else:
            entry["category_id"] = category
            images[image].annotations.append(entry)
    if held.strays and held.strays == len(parts["annotations"]):
        raise DataError(f"{file}: no annotation belongs to an image of the file: no image_id is the id of one")
    return held


def classes_of(files: list[CocoFile]) -> tuple[tuple[str, ...], dict[Id, int], list[str]]:
    """Classes by ascending id, the number of each category id in them, and notes.

    Categories of one name are one class. A category that no annotation uses is left out where it is only the heading of
    others (Roboflow's 0) or called background. DataError where files have other categories than the first.
    """
    categories, first = files[0].categories, files[0].place
    used = set().union(*(file.used for file in files))
    names = [{key: name for key, (name, _) in file.categories.items()} for file in files]
    for file, own in zip(files, names, strict=True):
        if own != names[0]:
            raise DataError(f"{file.place} has other categories than {first}")
    parents = {fold(parent) for name, parent in categories.values() if fold(parent) != fold(name)}
    named: dict[str, tuple[str, int]] = {}
    number: dict[Id, int] = {}
    notes = []
    for key in sorted(categories, key=lambda key: (isinstance(key, str), key)):
        name, parent = categories[key]
        heading = fold(name) in parents and fold(parent) in ("", "none", "null", "root")
        if key in used and is_background(name):
            raise DataError(
                f"{first}: annotations have the category {name!r} ({key}), which is no class but what is left where "
                "there is none: take them out of the file"
            )
        if key not in used and (heading or is_background(name) or fold(name) == "__ignore__"):
            notes.append(f"{first}: category {name!r} ({key}) has no annotation and is only a heading: left out")
            continue
        if fold(name) in named:
            notes.append(f"{first}: category {name!r} ({key}) is merged with {named[fold(name)][0]!r} of the same name")
        number[key] = named.setdefault(fold(name), (name, len(named) + 1))[1]
    classes = tuple(name for name, _ in named.values())
    notes += [
        f"{first}: categories {one!r} and {other!r} are two classes; are they one?" for one, other in similar(classes)
    ]
    return classes, number, notes


def _entries(tree: Any, name: str, file: str) -> list[dict[str, Any]]:
    entries = tree.get(name) if isinstance(tree, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{file} is not a COCO instances file: it has no list of {name}")
    return entries


def _id(entry: dict[str, Any], field: str, file: str, what: str) -> Id:
    value = entry.get(field)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value.strip()):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise DataError(f"{file}: {what} has the {field} {_short(value)}; a number or text is expected")
    return value


def _name(entry: dict[str, Any], file: str) -> str:
    value = entry.get("name")
    name = tidy(str(value)) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not name or not name.isprintable():
        raise DataError(f"{file}: category {_short(entry.get('id'))} has no name that can be used: {_short(value)}")
    return name


def _size(entry: dict[str, Any], where: str) -> tuple[int, int] | None:
    """(height, width); None where the file leaves one of them open."""
    sides = []
    for side in ("height", "width"):
        value = entry.get(side)
        if value in (None, "", 0):
            return None
        try:
            sides.append(int(value))
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"{where} has the {side} {_short(value)}") from None
    return sides[0], sides[1]


def _crowd(entry: dict[str, Any], where: str) -> bool:
    value = entry.get("iscrowd")
    if value in (None, "", 0, "0"):
        return False
    if value in (1, "1"):
        return True
    raise DataError(f"{where} has iscrowd {_short(value)}; 0 or 1 is expected")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."
