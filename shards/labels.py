"""labels.csv as people and their spreadsheets write it: rows, and what the labels in them name."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from esol.base.errors import DataError
from shards.inputs import read_text
from shards.names import check_count, fold, foreground, is_background, matcher, similar, tidy

_HEADERS = (["image", "labels"], ["image", "labels", "split"])
_ASIAN = str.maketrans("；，、｜", ";,,|")  # separators of Asian keyboards


@dataclass
class Row:
    """A row of labels.csv: its line, the cells image and split as they stand, and the classes that labels names."""

    line: int
    image: str
    cell: str
    split: str
    labels: list[str] = field(default_factory=list)


def read_rows(table: str) -> list[Row]:
    """The rows of a table with the header image,labels or image,labels,split; their labels are not looked at yet.

    Columns are separated by commas, semicolons or tabs, as the header shows. Rows of empty cells are left out.
    DataError names the line that does not fit.
    """
    text = io.StringIO(read_text(table), newline=None)
    header, delimiter = _header(text.getvalue(), table)
    reader = csv.reader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
    rows: list[Row] = []
    try:
        for cells in reader:
            while len(cells) > len(header) and not cells[-1].strip():
                cells.pop()  # of empty columns
            if not any(cell.strip() for cell in cells) or (not rows and _is_header(cells, header)):
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{table}, line {reader.line_num}: {len(cells)} columns instead of {len(header)}; an image's"
                    " labels stand in one cell, joined by semicolons"
                    + (', in quotes ("cat;dog")' if delimiter == ";" else "")
                )
            image, labels, split = [cell.strip() for cell in [*cells, ""][:3]]
            rows.append(Row(reader.line_num, image, labels, tidy(split) or "train"))
    except csv.Error as error:
        raise DataError(f"{table}, line {reader.line_num}: {error}") from error
    if not rows:
        raise DataError(f"{table} lists no image")
    return rows


def _header(text: str, table: str) -> tuple[list[str], str]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lower().startswith("sep=")]
    first = lines[0] if lines else ""
    for delimiter in ",;\t":
        cells = [tidy(cell).lower() for cell in next(csv.reader([first], delimiter=delimiter, skipinitialspace=True))]
        while cells and not cells[-1]:
            cells.pop()
        if cells in _HEADERS:
            return cells, delimiter
    raise DataError(f"{table}: the first line must be image,labels or image,labels,split, not {first[:200]}")


def _is_header(cells: list[str], header: list[str]) -> bool:
    return [tidy(cell).lower() for cell in cells] == header or cells[0].lower().startswith("sep=")


def name_labels(rows: Sequence[Row], table: str, listed: Sequence[str] | None) -> tuple[tuple[str, ...], list[str]]:
    """Fills the labels of all rows in; returns the classes, and notes of what was merged or split on the way.

    listed: the lines of classes.txt. A label is the line of its exact spelling, else the only one that differs by case,
    spaces and invisible characters alone; a cell may be one of them, or several joined by semicolons, else bars, else
    commas. What is no line stays as it is written, for check_labels to name.

    Without listed, classes are the labels, sorted. Labels that differ by case alone take the commonest spelling.
    Semicolons separate labels where any cell has one; else bars do; else commas do, if some label between them also
    stands alone. DataError names what could be two classes or one: classes.txt settles it.
    """
    if listed is None:
        return _gather(rows, table)
    classes, notes = foreground(listed, f"{table.rpartition('/')[0]}/classes.txt")
    match, known, split = matcher(classes), set(classes), 0
    for row in rows:
        if match(row.cell) in known:
            row.labels = [match(row.cell)]
            continue
        for part in _parts(row.cell, ";"):
            names = [match(part)]
            for separator in "|,":
                pieces = [match(piece) for piece in _parts(part, separator)]
                if names[0] not in known and known.issuperset(pieces):
                    names, split = pieces, split + 1
            row.labels += names
    if split:
        notes.append(f"{table}: labels joined by | or , were taken apart in {_cells(split)}")
    return classes, notes


def _gather(rows: Sequence[Row], table: str) -> tuple[tuple[str, ...], list[str]]:
    for row in rows:
        if re.fullmatch(r"[\[{(].*['\",;|].*[\]})]", row.cell, re.DOTALL):
            raise DataError(f"{table}, line {row.line}: {row.cell[:80]} is a program's list; write labels as cat;dog")
    separator = _separator(rows, table)
    spellings: dict[str, Counter[str]] = {}
    lines: dict[str, int] = {}
    joined = changed = 0
    for row in rows:
        parts = _parts(row.cell, separator)
        joined += len(parts) > 1
        changed += any(tidy(part) != part.strip() for part in parts)
        row.labels = [name for name in map(tidy, parts) if name]
        for name in row.labels:
            spellings.setdefault(fold(name), Counter())[name] += 1
            lines.setdefault(name, row.line)
    chosen = {same: found.most_common(1)[0][0] for same, found in spellings.items()}  # of equals the first in the file
    for row in rows:
        row.labels = [chosen[fold(name)] for name in row.labels]
    names = tuple(name for name in sorted(chosen.values()) if not is_background(name))
    problems = [_like_one(table, lines, one, other) for one, other in similar(names)]
    problems += [_like_two(table, lines, name) for name in names if _looks_joined(name, chosen)]
    if problems:
        raise DataError("\n  ".join(problems))
    check_count(names, table)
    notes = []
    if separator != ";":
        notes.append(f"{table}: labels joined by {separator} were taken apart in {_cells(joined)}")
    if changed:
        notes.append(f"{table}: {_cells(changed)} lost invisible characters, surplus spaces or quotes")
    for same, found in spellings.items():
        for name, times in found.items():
            if name != chosen[same]:
                notes.append(f"{table}: {name!r} ({times}) is counted as {chosen[same]!r} ({found[chosen[same]]})")
    return names, notes


def _parts(cell: str, separator: str) -> list[str]:
    """Labels of a cell, without separators at its ends; a line break in a cell separates as a semicolon does."""
    cell = re.sub(r"[\r\n]+", ";", cell).translate(_ASIAN)
    return [stripped for part in cell.split(separator) if (stripped := part.strip().strip(";|,").strip())]


def _separator(rows: Sequence[Row], table: str) -> str:
    for separator in ";|":
        if any(len(_parts(row.cell, separator)) > 1 for row in rows):
            return separator
    parts = {row.line: [fold(tidy(part)) for part in _parts(row.cell, ",")] for row in rows}
    alone = {names[0] for names in parts.values() if len(names) == 1}
    commas = [row for row in rows if len(parts[row.line]) > 1]
    if not commas:
        return ";"
    if any(alone.intersection(parts[row.line]) for row in commas):
        return ","
    raise DataError(
        f"{table}, line {commas[0].line}: is '{commas[0].cell}' one class or several? Join labels by semicolons, or"
        f" list the classes in classes.txt ({_cells(len(commas))} with a comma)"
    )


def _looks_joined(name: str, chosen: dict[str, str]) -> bool:
    """Whether a name is made of others: any of them beside a bar or comma, all of them beside other signs."""
    pieces = [fold(tidy(piece)) in chosen for piece in re.split(r"[|,]", name.translate(_ASIAN))]
    others = [fold(tidy(piece)) in chosen for piece in re.split(r"[/+&]", name)]
    return (len(pieces) > 1 and any(pieces)) or (len(others) > 1 and all(others))


def _like_one(table: str, lines: dict[str, int], one: str, other: str) -> str:
    return (
        f"{table}: {one!r} (line {lines[one]}) and {other!r} (line {lines[other]}) look like one class;"
        " write one of them, or list both in classes.txt if they are two"
    )


def _like_two(table: str, lines: dict[str, int], name: str) -> str:
    return (
        f"{table}, line {lines[name]}: {name!r} holds what is a class elsewhere; join labels by semicolons,"
        " or list it in classes.txt if it is one class"
    )


def _cells(count: int) -> str:
    return f"{count} cell" if count == 1 else f"{count} cells"
