"""Reads the files that shards are made from: local paths and fsspec URLs alike."""

from __future__ import annotations

import codecs
from pathlib import PurePosixPath

from esol.data.index import filesystem
from esol.errors import DataError


def read_bytes(path: str) -> bytes:
    """A whole file; DataError names it where it cannot be read."""
    fs, inner = filesystem(path)
    try:
        return bytes(fs.cat_file(inner))
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except Exception as error:  # every storage back end has its own
        raise DataError(f"cannot read {path}: {error}") from error


def read_text(path: str) -> str:
    """A whole text file in UTF-8, or in UTF-16 with a byte order mark (Excel's Unicode text); DataError else."""
    data = read_bytes(path)
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path} is not a UTF-8 text file (line {line}): save it as UTF-8") from error
    if "\0" in text:
        raise DataError(f"{path} is not a UTF-8 text file (it holds zero bytes): save it as UTF-8")
    return text


def read_lines(path: str) -> list[str]:
    """The lines of a text file that are not blank, stripped."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def list_files(folder: str) -> set[str]:
    """Paths, relative to it, of all files in and below a folder; empty where there is none."""
    fs, inner = filesystem(folder)
    try:
        return {str(PurePosixPath(name).relative_to(inner)) for name in fs.find(inner)}
    except (FileNotFoundError, NotADirectoryError):
        return set()
