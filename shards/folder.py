"""The user's own photos as a source: images/, labels.csv, and where there are some masks/ and classes.txt."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from esol.data.index import PHOTO_EXTENSIONS
from esol.errors import DataError
from shards.inputs import list_files, read_bytes, read_lines, read_text
from shards.samples import Source, check_labels, listing, pack

_HEADERS = (["image", "labels"], ["image", "labels", "split"])


@dataclass(frozen=True)
class _Row:
    line: int
    image: str
    labels: list[str]
    split: str


def folder_source(root: str, long_side: int = 0) -> Source:
    """Reads ROOT/images, ROOT/labels.csv, ROOT/masks/<same name>.png and ROOT/classes.txt (a folder or URL).

    labels.csv has the header image,labels or image,labels,split; labels are separated by semicolons; split is train
    where none is given. Classes are the lines of classes.txt, else the labels of the csv, sorted. DataError lists
    every row and file that does not fit.
    """
    root = root.rstrip("/")
    table = f"{root}/labels.csv"
    rows = _read_rows(table)
    photos = {name for name in list_files(f"{root}/images") if name.rpartition(".")[2].lower() in PHOTO_EXTENSIONS}
    masks = {name for name in list_files(f"{root}/masks") if name.lower().endswith(".png")}
    if "classes.txt" in list_files(root):
        classes = tuple(read_lines(f"{root}/classes.txt"))
    else:
        classes = tuple(sorted({label for row in rows for label in row.labels}))
    if len(set(classes)) != len(classes):
        raise DataError(f"{root}/classes.txt names a class twice")
    if len(classes) > 254:
        raise DataError(f"{root}: {len(classes)} classes; masks can number 254")
    problems: list[str] = []
    by_key: dict[str, _Row] = {}
    for row in rows:
        where = f"{table}, line {row.line}"
        key = re.sub(r"[./\\\s]", "_", str(PurePosixPath(row.image).with_suffix("")))
        if key in by_key:
            problems.append(f"{where}: image {row.image} has the same key {key} as line {by_key[key].line}")
            continue
        by_key[key] = row
        if row.image not in photos:
            problems.append(f"{where}: there is no image images/{row.image} (JPEG, PNG or WebP)")
        if not row.labels:
            problems.append(f"{where}: image {row.image} has no label")
        try:
            check_labels(row.labels, classes, where)
        except DataError as error:
            problems.append(str(error))
    listed = {row.image for row in rows}
    problems += [f"images/{name} has no row in {table}" for name in sorted(photos - listed)]
    expected = {_mask_of(name) for name in listed}
    problems += [f"masks/{name} belongs to no image of {table}" for name in sorted(masks - expected)]
    if problems:
        raise DataError(listing(f"{root}: {len(problems)} problems", problems))

    def read(key: str) -> dict[str, bytes]:
        row = by_key[key]
        mask_name = _mask_of(row.image)
        mask = read_bytes(f"{root}/masks/{mask_name}") if mask_name in masks else None
        photo = read_bytes(f"{root}/images/{row.image}")
        return pack(
            key, f"images/{row.image}", photo, row.labels, classes, mask, f"masks/{mask_name}", long_side=long_side
        )

    splits: dict[str, list[str]] = {}
    for key, row in by_key.items():
        splits.setdefault(row.split, []).append(key)
    return Source(classes, splits, read)


def _mask_of(image: str) -> str:
    return str(PurePosixPath(image).with_suffix(".png"))


def _read_rows(table: str) -> list[_Row]:
    reader = csv.reader(io.StringIO(read_text(table)), strict=True)
    rows: list[_Row] = []
    try:
        header = [cell.strip() for cell in next(reader, [])]
        if header not in _HEADERS:
            raise DataError(
                f"{table}: the first line must be image,labels or image,labels,split, not {','.join(header)}"
            )
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(f"{table}, line {reader.line_num}: {len(cells)} columns instead of {len(header)}")
            image, labels, split = [cell.strip() for cell in [*cells, ""][:3]]
            names = [label.strip() for label in labels.split(";") if label.strip()]
            rows.append(_Row(reader.line_num, image, names, split or "train"))
    except csv.Error as error:
        raise DataError(f"{table}, line {reader.line_num}: {error}") from error
    if not rows:
        raise DataError(f"{table} lists no image")
    return rows
