"""Reads the files that shards are made from: local paths and fsspec URLs alike."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from pathlib import PurePosixPath

from esol.base.errors import DataError
from esol.data.photos import HEAD
from esol.data.storage import LIKELY, filesystem, is_local, patient


def read_bytes(path: str, size: int = LIKELY) -> bytes:
    """A whole file of about `size` bytes; DataError names it where it cannot be read."""
    fs, inner = filesystem(path)
    try:
        return bytes(patient(fs, path, size, fs.cat_file, inner))
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


def read_head(path: str, size: int = HEAD) -> bytes:
    """The first bytes of a file; empty where it cannot be read."""
    fs, inner = filesystem(path)
    try:
        return bytes(fs.cat_file(inner, end=size))
    except Exception:  # every storage back end has its own
        return b""


def list_files(folder: str, below: bool = True) -> set[str]:
    """Paths, relative to it, of all files in (and below) a folder, through links too; empty where there is none."""
    fs, inner = filesystem(folder)
    if is_local(fs):
        return set(_walk(inner, "", set()) if below else (e.name for e in _entries(inner) if e.is_file()))
    try:
        names = patient(fs, folder, LIKELY, fs.find, inner, maxdepth=None if below else 1)
        return {str(PurePosixPath(name).relative_to(inner)) for name in names}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except Exception as error:  # every storage back end has its own
        raise DataError(f"cannot list {folder}: {error}") from error


def _walk(folder: str, prefix: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Files below a local folder; a folder that links lead to in a circle is entered once."""
    try:
        about = os.stat(folder)
    except OSError:
        return
    if (about.st_dev, about.st_ino) in seen:
        return
    seen.add((about.st_dev, about.st_ino))
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _walk(entry.path, f"{prefix}{entry.name}/", seen)
        else:
            yield f"{prefix}{entry.name}"


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))  # what is really there first
    except (FileNotFoundError, NotADirectoryError):
        return []
