"""What a stranger may have made: files read within bounds, names that stay in their folder, text fit for a terminal."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

from esol.base.errors import CheckpointError

MOST = 1 << 26  # bytes of a file that is read whole; the manifest of 300,000 outputs has as many
DEPTH = 64  # levels of a JSON tree
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def content(path: Path, most: int = MOST) -> bytes:
    """A file's bytes; OSError as from open, ValueError for a pipe, a device or a file of more than `most` bytes."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is no file")
        if about.st_size > most:
            raise ValueError(f"it has {about.st_size:,} bytes, more than the {most:,} that are read")
        return file.read(about.st_size)


def json_tree(text: bytes | str) -> Any:
    """JSON whose numbers, texts and depth every reader can deal with; ValueError says what of it is not so."""
    try:
        tree = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check(tree, DEPTH)
    return tree


def _check(value: Any, left: int) -> None:
    if isinstance(value, (dict, list)):
        if not left:
            raise ValueError(f"it is nested deeper than {DEPTH} levels")
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _check(item, left - 1)
    elif isinstance(value, str):
        value.encode()  # half of a pair of surrogates cannot be written again
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number of JSON")
    elif isinstance(value, int) and abs(value) >= 1 << 63:
        raise ValueError("it has a whole number of more than 64 bits")


def plain(name: str) -> bool:
    """Whether a name, or path with slashes, is that of something below a folder, and has no control characters."""
    return not _CONTROL.search(name) and all(part not in ("", ".", "..") for part in name.split("/"))


def printable(text: str) -> str:
    """For terminals: control characters, those that turn the direction, and what is no Unicode are spelled out."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def lines(text: str) -> str:
    """Printable text of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def markdown(text: str) -> str:
    """Text as part of a line of Markdown, where it is neither markup nor the end of a table's cell."""
    return re.sub(r"([\\`|<>\[\]*])", r"\\\1", printable(text))


def without_following(path: str, flags: int) -> int:
    """An opener for what is written in place: OSError where the path is a link, whose target is somebody else's."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def refuse_links(*places: Path) -> None:
    """CheckpointError where a place, or anything below it, is a link or a pipe: what is written lands elsewhere."""
    for place in places:
        for path in (place, *(place.rglob("*") if place.is_dir() and not place.is_symlink() else ())):
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise CheckpointError(f"{path} is neither a file nor a folder: delete it")
            if path.is_symlink():
                raise CheckpointError(
                    f"{path} is a link to {os.readlink(path)}: a run writes and deletes in its own folder alone, so "
                    "put what it leads to in its place, or delete it"
                )
