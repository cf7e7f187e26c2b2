"""From a shard set to plain files for other tools: the folder that `esol-shards create folder` reads."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from esol.base.errors import DataError
from esol.base.files import atomic_write
from esol.base.progress import progress
from esol.data.index import PHOTO_EXTENSIONS, Index
from esol.data.reader import ShardReader
from esol.data.samples import decode_mask, encode_mask
from shards.samples import listing

UNSAFE = r"[./\\\s]"  # what becomes an underscore, as in shards.names.safe_key
PARTS = ("labels.csv", "classes.txt", "images", "masks")  # all that export writes, and that --overwrite removes


@dataclass
class Exported:
    """What was written; notes: what the folder cannot hold; problems: damaged samples, by shard and key."""

    images: int = 0
    masks: int = 0
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def export(root: str, out: str, split: str = "", overwrite: bool = False) -> Exported:
    """Writes images/KEY.EXT, masks/KEY.png, classes.txt, and last labels.csv, as far as the set has them, into out.

    Photos' bytes stay as they are; gray masks get VOC's palette. Without split: all splits' samples, which may not
    overlap where there is a labels.csv. A sample with any damage is left out and named in problems. DataError, before
    anything is written, where the set does not fit into such a folder: keys that lead elsewhere or meet in one name.
    """
    index = Index.load(root)
    folder = Path(out)
    if "://" in out:
        raise DataError(f"{out}: export writes to a local folder")
    table = "json" in index.members and any(ext in index.members for ext in PHOTO_EXTENSIONS)
    splits = {split: index.split(split)} if split else index.splits
    ordinals = np.unique(np.concatenate([np.array([], np.int64), *splits.values()]))
    if not len(ordinals):
        raise DataError(f"{root}: no split has a sample, nothing to export")
    if table:
        _check_overlap(root, splits)
    _check_texts(index.classes, splits)
    names = _file_names(index, ordinals)
    _clear(folder, overwrite)
    try:
        return _write(index, folder, splits, ordinals, names, table)
    except OSError as error:
        raise DataError(f"cannot write to {error.filename or out}: {error.strerror or error}") from error


def _write(
    index: Index, folder: Path, splits: dict[str, np.ndarray], ordinals: np.ndarray, names: dict[int, str], table: bool
) -> Exported:
    reader, done = ShardReader(index, wanted=ordinals), Exported()
    split_of = {int(ordinal): name for name, members in splits.items() for ordinal in members}
    rows: list[tuple[str, str, str]] = []
    with progress("export", len(ordinals), "samples", visible=True) as advance:
        for count, ordinal in enumerate(map(int, ordinals), 1):
            try:
                files, labels = _sample(reader, ordinal, names[ordinal], table)
            except DataError as error:
                done.problems.append(str(error))
            else:
                for file, data in files.items():
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    (folder / file).write_bytes(data)
                    if file.startswith("images/"):
                        done.images += 1
                        if table:
                            rows.append((file.removeprefix("images/"), ";".join(labels), split_of[ordinal]))
                    else:
                        done.masks += 1
            advance(count, "")
    atomic_write(folder / "classes.txt", "".join(f"{name}\n" for name in index.classes))
    if table:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("image", "labels", "split"), *sorted(rows)])
        atomic_write(folder / "labels.csv", text.getvalue())
    done.notes = _notes(index, ordinals)
    return done


def _sample(reader: ShardReader, ordinal: int, name: str, table: bool) -> tuple[dict[str, bytes], list[str]]:
    """The sample's files by their path in the folder, and its labels in class order; DataError where one is damaged."""
    index = reader.index
    files: dict[str, bytes] = {}
    labels: list[str] = []
    if any(ext in index.members for ext in PHOTO_EXTENSIONS):
        files[f"images/{name}.{index.image_ext(ordinal)}"] = reader.image(ordinal)
    if table:
        labels = [index.classes[i] for i in np.flatnonzero(reader.labels(ordinal))]
    if "mask.png" in index.members and index.members["mask.png"][ordinal, 0] >= 0:
        data = reader.read(ordinal, "mask.png")
        levels = decode_mask(data, f"{reader.name(ordinal)}: mask.png", len(index.classes))
        with Image.open(io.BytesIO(data)) as png:
            files[f"masks/{name}.png"] = data if png.mode == "P" else encode_mask(levels)
    return files, labels


def _check_overlap(root: str, splits: dict[str, np.ndarray]) -> None:
    """A row of labels.csv has one split."""
    names = list(splits)
    for i, name in enumerate(names):
        for other in names[:i]:
            shared = len(np.intersect1d(splits[name], splits[other]))
            if shared:
                raise DataError(
                    f"{root}: {shared} samples are in {other} and in {name}, but labels.csv has one split for each;"
                    f" export one at a time: --split {name}"
                )


def _check_texts(classes: Sequence[str], splits: dict[str, np.ndarray]) -> None:
    """Names that would come back as others: classes.txt has one a line, labels.csv joins labels with semicolons."""
    for name in (*classes, *splits):
        if name != name.strip() or not name.isprintable() or not name or (name in classes and ";" in name):
            raise DataError(f"{name!r}: labels.csv and classes.txt cannot hold this name of a class or split")


def _file_names(index: Index, ordinals: np.ndarray) -> dict[int, str]:
    """Key to file name by the rule of create folder: dots, slashes and spaces become underscores."""
    names: dict[int, str] = {}
    owner: dict[str, str] = {}
    problems: list[str] = []
    for ordinal in map(int, ordinals):
        key = str(index.keys[ordinal])
        where = f"{index.shards[int(index.shard_of[ordinal])].name}: key {key!r}"
        if not key.isprintable() or "\\" in key or re.match("[A-Za-z]:", key):
            problems.append(f"{where} is no name for a file")
            continue
        name = names[ordinal] = re.sub(UNSAFE, "_", key)
        if name in owner:
            problems.append(f"{where} would overwrite {owner[name]!r}: both are {name} as a file name")
        owner[name] = key
    if problems:
        raise DataError(listing(f"{index.root}: {len(problems)} keys cannot be exported; nothing was", problems))
    return names


def _clear(folder: Path, overwrite: bool) -> None:
    try:
        if not folder.exists() or not any(folder.iterdir()):
            return
        if not overwrite:
            raise DataError(f"{folder} is not empty; choose another folder, or give --overwrite to replace its export")
        for part in (folder / name for name in PARTS):
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {error.filename or folder}: {error.strerror or error}") from error


def _notes(index: Index, ordinals: np.ndarray) -> list[str]:
    known = {"json", "mask.png", *PHOTO_EXTENSIONS}
    notes = []
    if others := sorted(set(index.members) - known):
        notes.append(f"left out, having no place in the folder: members {', '.join(others)}")
    everywhere = np.unique(np.concatenate(list(index.splits.values())))
    if len(everywhere) < len(index):
        notes.append(f"left out: {len(index) - len(everywhere)} samples of no split")
    return notes
