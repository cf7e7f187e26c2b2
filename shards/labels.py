"""labels.csv as spreadsheets and people write it."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections import Counter
from dataclasses import dataclass

from esol.errors import DataError
from shards.inputs import read_text
from shards.names import clean, fold

_HEADERS = (["image", "labels"], ["image", "labels", "split"])
_SEPARATORS = (";", "|", ",")  # of labels in a cell; the first one that any cell holds is the file's


@dataclass(frozen=True)
class Row:
    """One photo; image: its path below images/ as written, in NFC; labels: as written."""

    line: int
    image: str
    labels: list[str]
    split: str


def read_rows(table: str, classes: tuple[str, ...] = ()) -> tuple[list[Row], list[str]]:
    """The rows of a labels.csv, their labels those of classes where these are given, else folded; and notes.

    Cells are separated by commas, semicolons or tabs, as the first line has it. DataError names the line.
    """
    text = read_text(table)
    if "\0" in text:
        raise DataError(f"{table}, line {text[: text.index(chr(0))].count(chr(10)) + 1}: it holds a NUL character")
    first = text.split("\n", 1)[0]
    delimiter = next((d for d in (",", ";", "\t") if _header(first, d) in _HEADERS), ",")
    header = _header(first, delimiter)
    if header not in _HEADERS:
        raise DataError(f"{table}: the first line must be image,labels or image,labels,split, not {','.join(header)}")
    cells = _cells(table, text, delimiter, len(header))
    if not cells:
        raise DataError(f"{table} lists no image")
    known = {clean(name).casefold(): name for name in classes}
    separator = next((s for s in _SEPARATORS if s != delimiter and any(s in row[2] for row in cells)), "")
    if delimiter == "," and not separator and any("," in row[2] for row in cells):
        separator = ","
    written = [_split(text, separator, known) for _, _, text, _ in cells]
    counts = Counter(label for labels in written for label in labels)
    notes = [f"{table}: labels of a cell are separated by {separator!r}"] if separator not in ("", ";") else []
    if classes:
        same = {label: known.get(clean(label).casefold(), clean(label)) for label in counts}
    else:
        _mixed(table, counts, separator)
        same, more = fold(counts)
        notes += [f"{table}: {note}" for note in more]
    rows = []
    for (line, image, _, split), labels in zip(cells, written, strict=True):
        rows.append(Row(line, image, list(dict.fromkeys(same[label] for label in labels)), split or "train"))
    return rows, notes


def _header(line: str, delimiter: str) -> list[str]:
    return [clean(cell).lower() for cell in line.rstrip("\r").rstrip(delimiter).split(delimiter)]


def _cells(table: str, text: str, delimiter: str, columns: int) -> list[tuple[int, str, str, str]]:
    """Line, image, labels and split of every row that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    found = []
    try:
        next(reader)
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            while len(cells) > columns and not cells[-1]:
                cells.pop()
            if not any(cells):
                continue
            if len(cells) != columns:
                raise DataError(f"{table}, line {reader.line_num}: {len(cells)} columns instead of {columns}")
            image, labels, split = [*cells, ""][:3]
            if not image:
                raise DataError(f"{table}, line {reader.line_num}: the cell of the image is empty")
            image = unicodedata.normalize("NFC", image).replace("\\", "/").removeprefix("./").removeprefix("images/")
            found.append((reader.line_num, image, labels, split))
    except csv.Error as error:
        raise DataError(f"{table}, line {reader.line_num}: {error}") from error
    return found


def _split(text: str, separator: str, known: dict[str, str]) -> list[str]:
    """The labels of a cell; a cell that is a class as a whole holds no separator."""
    if not separator or clean(text).casefold() in known:
        return [text] if clean(text) else []
    return [label.strip() for label in text.split(separator) if clean(label)]


def _mixed(table: str, counts: Counter[str], separator: str) -> None:
    """DataError for a label that other separators than the file's would make labels of that are there as well."""
    names = {clean(label).casefold() for label in counts}
    for label in sorted(counts):
        for other in _SEPARATORS:
            parts = {clean(part).casefold() for part in label.split(other) if clean(part)}
            if other != separator and len(parts) > 1 and parts & names:
                raise DataError(
                    f"{table}: the label {label!r} holds {other!r}, and {min(parts & names)!r} is a label as well: "
                    "separate all labels by ';'"
                )
