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

# names of columns; of several the first that stands here
_IMAGE = ("image", "images", "filename", "file_name", "file", "filepath", "file_path", "path", "photo")
IMAGE_COLUMNS = (*_IMAGE, "picture", "img", "image_path", "image_name", "image_id", "name", "id")
LABEL_COLUMNS = ("labels", "label", "classes", "class", "tags", "tag", "categories", "category")
SPLIT_COLUMNS = ("split", "set", "subset", "partition")
_DELIMITERS = ",;\t|"
_YES, _NO = ("1", "1.0", "true", "yes", "y", "x"), ("", "0", "0.0", "false", "no", "n", "-1")
_FILE = re.compile(r".*\.[a-z0-9]{3,5}", re.IGNORECASE | re.DOTALL)
_ASIAN = str.maketrans("；，、｜", ";,,|")  # separators of Asian keyboards


@dataclass
class Row:
    """A photo and its labels: line of the table (0 without one), cells image and split, the classes that are named."""

    line: int
    image: str
    cell: str
    split: str
    labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Columns:
    """Where a table has what: numbers of columns, -1 for none; classes: column -> class, where each has its own."""

    delimiter: str
    width: int
    image: int
    labels: int
    split: int
    classes: dict[int, str]
    first: int  # line of the table that the rows begin at, counted without blank ones


def read_table(table: str, listed: Sequence[str] | None) -> tuple[list[Row], tuple[str, ...], list[str]]:
    """Rows, classes and notes of a table of photos, in whatever dialect people and their programs write it.

    The first line names the columns: one for the photo (image, filename, ...), one for its labels (labels, class, ...)
    or one for each class that holds 0 and 1, and perhaps one for the split; others are passed over, and said. A table
    of two or three columns whose first line begins with a file has image, labels, split. Columns are separated by
    commas, semicolons, tabs or bars. listed: lines of classes.txt. DataError names the line that does not fit.
    """
    text = io.StringIO(read_text(table), newline=None)
    columns, notes = _columns(text.getvalue(), table)
    reader = csv.reader(text, delimiter=columns.delimiter, skipinitialspace=True, strict=True)
    rows: list[Row] = []
    skip = columns.first
    try:
        for cells in reader:
            while len(cells) > columns.width and not cells[-1].strip():
                cells.pop()  # of empty columns
            if not any(cell.strip() for cell in cells) or cells[0].lower().startswith("sep="):
                continue
            if skip:
                skip -= 1
                continue
            if len(cells) != columns.width:
                raise DataError(
                    f"{table}, line {reader.line_num}: {len(cells)} columns instead of {columns.width}; an image's"
                    " labels stand in one cell, joined by semicolons"
                    + (', in quotes ("cat;dog")' if columns.delimiter == ";" else "")
                )
            rows.append(_row(cells, columns, f"{table}, line {reader.line_num}", reader.line_num))
    except csv.Error as error:
        raise DataError(f"{table}, line {reader.line_num}: {error}") from error
    if not rows:
        raise DataError(f"{table} lists no image")
    if columns.labels >= 0:
        classes, more = _name_labels(rows, table, listed)
        return rows, classes, notes + more
    if listed is None:
        classes, more = foreground([name for name in columns.classes.values() if not is_background(name)], table)
    else:
        classes, more = foreground(listed, f"{table.rpartition('/')[0]}/classes.txt")
        match = matcher(classes)
        for row in rows:
            row.labels = [match(label) for label in row.labels]
    return rows, classes, notes + more


def is_table(path: str) -> bool:
    """Whether a file begins as a table of photos does."""
    try:
        _columns(read_text(path), path)
    except DataError:
        return False
    return True


def _row(cells: list[str], columns: _Columns, where: str, line: int) -> Row:
    cells = [cell.strip() for cell in cells]
    split = tidy(cells[columns.split]) if columns.split >= 0 else ""
    row = Row(line, cells[columns.image], cells[columns.labels] if columns.labels >= 0 else "", split or "train")
    for number, name in columns.classes.items():
        value = cells[number].lower()
        if value not in _YES + _NO:
            raise DataError(
                f"{where}: column {name!r} holds {cells[number]!r}. A table has a column for labels "
                f"({', '.join(LABEL_COLUMNS[:4])}), or one for each class, 1 where a photo shows it and 0 where not"
            )
        if value in _YES:
            row.labels.append(name)
    return row


def _columns(text: str, table: str) -> tuple[_Columns, list[str]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lower().startswith("sep=")]
    first = lines[0] if lines else ""
    for delimiter in _DELIMITERS:
        try:
            names = [tidy(cell) for cell in next(csv.reader([first], delimiter=delimiter, skipinitialspace=True))]
        except (csv.Error, StopIteration):
            continue
        while names and not names[-1]:
            names.pop()
        lower = [name.lower() for name in names]
        image, labels, split = (
            next((lower.index(name) for name in known if name in lower), -1)
            for known in (IMAGE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS)
        )
        if image >= 0 and len(names) > 1:
            rest = [n for n in range(len(names)) if n not in (image, labels, split)]
            if labels < 0 and len(rest) == 1 and not _holds_marks(lines[1:], rest[0], delimiter):
                labels, rest = rest[0], []
            if labels < 0 and not rest:
                continue
            if labels < 0:
                return _Columns(delimiter, len(names), image, -1, split, {n: names[n] for n in rest}, 1), []
            passed = [f"{table}: columns that are not read: {', '.join(names[n] for n in rest)}"] if rest else []
            return _Columns(delimiter, len(names), image, labels, split, {}, 1), passed
        if 1 < len(names) < 4 and _FILE.fullmatch(names[0]):  # no header
            return _Columns(delimiter, len(names), 0, 1, 2 if len(names) == 3 else -1, {}, 0), []
    raise DataError(
        f"{table}: the first line must name the columns, such as image,labels: one for the photo "
        f"({', '.join(IMAGE_COLUMNS[:4])}, ...), and one for its labels ({', '.join(LABEL_COLUMNS[:4])}, ...) or one "
        f"for each class; it is {first[:200]!r}"
    )


def _holds_marks(lines: Sequence[str], column: int, delimiter: str) -> bool:
    """Whether a column holds nothing but marks for yes and no."""
    cells = [row[column].strip().lower() for row in csv.reader(lines, delimiter=delimiter) if len(row) > column]
    return bool(cells) and set(cells) <= {*_YES, *_NO}


def _name_labels(rows: Sequence[Row], table: str, listed: Sequence[str] | None) -> tuple[tuple[str, ...], list[str]]:
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
