"""Reads the files that shards are made from: local paths and fsspec URLs alike."""

from __future__ import annotations

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
    """A whole UTF-8 file; DataError where it is none."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a UTF-8 text file: {error}") from error


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
    except Exception as error:  # every storage back end has its own
        raise DataError(f"cannot list {folder}: {error}") from error
