"""How somebody's photos lie in their folder, and what it says of each: a table of labels, or a folder for a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from esol.base.errors import DataError
from esol.data.photos import photo_format
from shards.inputs import list_files, read_head, read_lines
from shards.labels import Row, is_table, read_table
from shards.names import FileNames, check_count, foreground, is_negative, matcher, similar, tidy
from shards.samples import listing

_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
PICTURES = frozenset(
    "jpg jpeg jpe jfif pjpeg pjp mpo png webp avif bmp gif heic heif jp2 jxl tif tiff dng nef cr2 arw".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Layout:
    """What a folder holds.

    table: of labels, "" where folders name the classes; base: what stands before every photo's name, "images/" or "";
    rows: a photo and its labels each; photos: all files below base.
    """

    table: str
    base: str
    rows: list[Row]
    classes: tuple[str, ...]
    photos: FileNames
    notes: list[str]


def lay_out(root: str, table: str = "", negative: Sequence[str] = ()) -> Layout:
    """The photos of a folder with their labels; DataError where neither a table nor folders say what they show.

    table, negative: as in shards.folder.folder_source.
    """
    files = list_files(root)
    table = table or _table_in(root, files)
    base = "images/" if any(name.startswith("images/") for name in files) else ""
    photos = FileNames(_photos_below(files, base))
    listed = read_lines(f"{root}/classes.txt") if "classes.txt" in files else None
    if table:
        rows, classes, notes = read_table(table, listed)
    else:
        rows, classes, notes = _rows_of_folders(root, base, photos.names, listed)
    classes = _without_negatives(rows, classes, negative, listed is not None, notes)
    return Layout(table, base, rows, classes, photos, notes)


def _table_in(root: str, files: set[str]) -> str:
    """labels.csv, or the one other file at the top of a folder that is a table of photos; "" where there is none."""
    if "labels.csv" in files:
        return f"{root}/labels.csv"
    tables = [name for name in sorted(files) if "/" not in name and name.lower().endswith((".csv", ".tsv", ".txt"))]
    tables = [name for name in tables if name != "classes.txt" and is_table(f"{root}/{name}")]
    if len(tables) > 1:
        raise DataError(f"{root} holds several tables of labels, {', '.join(tables)}: say which with --labels FILE")
    return f"{root}/{tables[0]}" if tables else ""


def _photos_below(files: set[str], base: str) -> set[str]:
    """Names below base; at the top of a folder without those of masks/."""
    names = {name.removeprefix(base) for name in files if name.startswith(base)}
    return names if base else {name for name in names if not name.startswith("masks/")}


def _rows_of_folders(
    root: str, base: str, names: set[str], listed: Sequence[str] | None
) -> tuple[list[Row], tuple[str, ...], list[str]]:
    """A row for each photo, its label the folder that it lies in."""
    pictures = sorted(name for name in names if is_picture(f"{root}/{base}{name}"))
    if not pictures:
        raise DataError(f"{root} holds no photo, neither in folders by class nor in images/ beside a table of labels")
    tops = {name.split("/", 1)[0] for name in pictures if "/" in name}
    divided = bool(tops) and all(top.lower() in _SPLIT_FOLDERS for top in tops)
    rows, loose = [], []
    for name in pictures:
        parts = name.split("/")
        split = _SPLIT_FOLDERS[parts.pop(0).lower()] if divided and len(parts) > 1 else "train"
        if len(parts) < 2:
            loose.append(name)
            continue
        rows.append(Row(0, name, parts[0], split, [tidy(parts[0])]))
    if loose:
        raise DataError(
            listing(
                f"{root}: {len(loose)} photos lie in no folder of a class, and there is no table of labels. Put each "
                "into a folder that is named as what it shows (cat/, dog/, none/), or give --labels FILE",
                [f"{base}{name}" for name in loose],
            )
        )
    if listed is not None:
        classes, notes = foreground(listed, f"{root}/classes.txt")
        match = matcher(classes)
        for row in rows:
            row.labels = [match(label) for label in row.labels]
        return rows, classes, notes
    found = sorted({row.labels[0] for row in rows})
    if alike := similar([name for name in found if not is_negative(name)]):
        one, other = alike[0]
        raise DataError(
            f"{root}: the folders {one!r} and {other!r} look like one class: join them, or list both in classes.txt"
        )
    check_count([name for name in found if not is_negative(name)], root)
    return rows, tuple(found), []


def _without_negatives(
    rows: Sequence[Row], classes: tuple[str, ...], negative: Sequence[str], listed: bool, notes: list[str]
) -> tuple[str, ...]:
    """The classes without those that say that a photo shows none of them, which leave the rows as well."""
    asked = {tidy(name).lower() for name in negative}
    used = {label for row in rows for label in row.labels}
    if unknown := asked - {name.lower() for name in used}:
        raise DataError(
            f"--negatives {sorted(unknown)[0]}: no photo is labelled so; the labels are {', '.join(sorted(used))}"
        )
    chosen = {
        name for name in used if name.lower() in asked or (is_negative(name) and not (listed and name in classes))
    }
    for row in rows:
        if (both := chosen.intersection(row.labels)) and len(set(row.labels)) > len(both):
            where = f"line {row.line}" if row.line else row.image
            raise DataError(
                f"{where}: labels {'; '.join(row.labels)}: {sorted(both)[0]!r} says that there is no object"
            )
        row.labels = [label for label in row.labels if label not in chosen]
    if chosen:
        notes.append(f"photos labelled {', '.join(sorted(chosen))} show none of the classes")
    return tuple(name for name in classes if name not in chosen)


def is_picture(place: str) -> bool:
    """Whether a file is a photo that somebody may miss, by its name or its first bytes."""
    name = PurePosixPath(place)
    if name.name.startswith("."):
        return False
    suffix = name.suffix.lower().lstrip(".")
    return suffix in PICTURES or (not suffix and bool(photo_format(read_head(place))))
