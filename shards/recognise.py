"""Whose layout a folder of photos has: VOC's, COCO's, or somebody's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from shards.coco import coco_source
from shards.folder import folder_source
from shards.inputs import list_files, read_head
from shards.samples import Source
from shards.voc import voc_source
from shards.voc_xml import CLASSES, labels_of

_COCO = re.compile(rb'"(images|annotations|categories|info|licenses)"\s*:')
_OTHER_TASKS = ("captions_", "person_keypoints_", "stuff_", "panoptic_", "image_info_")


def any_source(
    root: str, long_side: int = 0, drop_unlabelled: bool = False, table: str = "", negative: Sequence[str] = ()
) -> Source:
    """The photos of a folder or URL, whichever of the known layouts it has; its notes begin with which.

    VOC: JPEGImages and Annotations, of whose classes those count that a photo has. COCO: a file of instances at the top
    or in annotations/. A table, or neither of these: as folder_source. DataError where what was recognised has faults.
    """
    root = root.rstrip("/")
    if not table:
        files = list_files(root)
        for below in ("", "VOC2012/", "VOCdevkit/VOC2012/"):
            if {f"{below}JPEGImages/", f"{below}Annotations/"} <= _folders(files, below):
                return _voc(f"{root}/{below}".rstrip("/"), files, below, long_side, drop_unlabelled)
        if found := [name for name in sorted(files) if name.endswith(".json") and _is_coco(root, name)]:
            return _coco(root, files, found)
    return folder_source(root, long_side, drop_unlabelled, table, negative)


def _folders(files: set[str], below: str) -> set[str]:
    """The folders that lie right below one, each with its path and a slash."""
    inside = (name.removeprefix(below) for name in files if name.startswith(below))
    return {f"{below}{name.split('/', 1)[0]}/" for name in inside if "/" in name}


def _voc(root: str, files: set[str], below: str, long_side: int, drop_unlabelled: bool) -> Source:
    there = _folders(files, below)
    masks = next((m for m in ("SegmentationClassAug", "SegmentationClass") if f"{below}{m}/" in there), "")
    lists = next(
        (m for m in ("Segmentation", "Main") if f"{below}ImageSets/{m}/" in _folders(files, f"{below}ImageSets/")), ""
    )
    used: set[str] = set()
    for name in sorted(files):
        if name.startswith(f"{below}Annotations/") and name.endswith(".xml"):
            used |= set(labels_of(f"{root}/{name.removeprefix(below)}"))
    classes = [name for name in CLASSES if name in used] or CLASSES
    ids = f"{root}/ImageSets/{lists}" if lists else ""
    source = voc_source(
        root, classes=classes, masks=masks, ids_dir=ids, long_side=long_side, drop_unlabelled=drop_unlabelled
    )
    said = f"{root} is laid out as PASCAL VOC: labels from Annotations, masks from {masks or 'nowhere'}"
    return replace(source, notes=(said, *source.notes))


def _is_coco(root: str, name: str) -> bool:
    parts = PurePosixPath(name)
    if len(parts.parts) > 2 or parts.name.startswith(_OTHER_TASKS):
        return False
    return bool(_COCO.search(read_head(f"{root}/{name}", 4096)))


def _coco(root: str, files: set[str], found: Sequence[str]) -> Source:
    folders, splits = [], []
    for name in found:
        stem = PurePosixPath(name).stem.removeprefix("instances_")
        beside = str(PurePosixPath(name).parent)
        places = (stem, f"images/{stem}", "" if beside in (".", "annotations") else beside, "images")
        place = next((p for p in places if p and any(file.startswith(f"{p}/") for file in files)), "")
        folders.append(f"{root}/{place}".rstrip("/"))
        parts = f"{beside}/{stem}".lower()
        split = next((split for split in ("train", "val", "test") if split in parts), "train")
        splits.append(split if split not in splits else f"{split}-{stem}")
    source = coco_source(folders, [f"{root}/{name}" for name in found], splits)
    said = f"{root} is laid out as COCO: {', '.join(found)}"
    return replace(source, notes=(said, *source.notes))
