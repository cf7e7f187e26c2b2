"""The user's own photos as a source: images/, labels.csv, and where there are some masks/ and classes.txt."""

from __future__ import annotations

import unicodedata
from pathlib import PurePosixPath

from esol.data.index import PHOTO_EXTENSIONS
from esol.errors import DataError
from shards.inputs import list_files, read_bytes, read_lines
from shards.labels import Row, name_labels, read_rows
from shards.names import FileNames, safe_key
from shards.samples import Source, check_labels, listing, pack

_SPLITS = ("train", "val", "test")  # names of splits, whatever the classes are called


def folder_source(root: str, long_side: int = 0) -> Source:
    """Reads ROOT/images, ROOT/labels.csv, ROOT/masks/<same name>.png and ROOT/classes.txt (a folder or URL).

    labels.csv as shards.labels reads it; split is train where none is given. Classes are the lines of classes.txt, else
    the labels of the csv, sorted. DataError lists every row and file that does not fit.
    """
    root = root.rstrip("/")
    table = f"{root}/labels.csv"
    rows = read_rows(table)
    photos = FileNames(name for name in list_files(f"{root}/images") if _extension(name) in PHOTO_EXTENSIONS)
    masks = FileNames(name for name in list_files(f"{root}/masks") if _extension(name) == "png")
    listed = read_lines(f"{root}/classes.txt") if "classes.txt" in list_files(root) else None
    classes, notes = name_labels(rows, table, listed)
    problems: list[str] = []
    by_key: dict[str, Row] = {}
    photo_of: dict[str, str] = {}
    line_of: dict[str, int] = {}
    renamed: list[str] = []
    for row in rows:
        where = f"{table}, line {row.line}"
        photo = photos.find(row.image)
        name = row.image if photo is None else photo
        if photo is not None and photo != photos.same(row.image):
            renamed.append(f"{row.image!r} is {photo!r}")
        key = safe_key(_stem(name if name == row.image else unicodedata.normalize("NFC", name)))
        if name in line_of:
            problems.append(
                f"{where}: image {row.image} stands in line {line_of[name]} too; one row an image, labels joined by ;"
            )
            continue
        if key in by_key:
            problems.append(f"{where}: image {row.image} has the same key {key} as line {by_key[key].line}")
            continue
        line_of[name], by_key[key], photo_of[key] = row.line, row, name
        if photo is None:
            problems.append(f"{where}: there is no image images/{row.image} (JPEG, PNG or WebP)")
        if not row.labels:
            problems.append(f"{where}: image {row.image} has no label")
        try:
            check_labels(row.labels, classes, where)
        except DataError as error:
            problems.append(str(error))
        if row.split in classes and row.split not in _SPLITS:
            problems.append(f"{where}: split {row.split!r} is the name of a class; labels are joined by ; in one cell")
    expected = {masks.same(f"{_stem(name)}.png") for name in line_of}
    problems += [f"images/{name} has no row in {table}" for name in sorted(photos.names - set(line_of))]
    problems += [f"masks/{name} belongs to no image of {table}" for name in sorted(masks.names - expected)]
    if problems:
        raise DataError(listing(f"{root}: {len(problems)} problems", problems))

    if renamed:
        notes.append(f"{table}: {len(renamed)} photos were found under another name: {', '.join(renamed[:2])}")

    def read(key: str) -> dict[str, bytes]:
        photo, labels = photo_of[key], by_key[key].labels
        mask_name = masks.same(f"{_stem(photo)}.png")
        mask = read_bytes(f"{root}/masks/{mask_name}") if mask_name else None
        data = read_bytes(f"{root}/images/{photo}")
        return pack(key, f"images/{photo}", data, labels, classes, mask, f"masks/{mask_name}", long_side=long_side)

    splits: dict[str, list[str]] = {}
    for key, row in by_key.items():
        splits.setdefault(row.split, []).append(key)
    return Source(classes, splits, read, tuple(notes))


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _stem(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.name else name
