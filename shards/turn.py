"""One writer at a time for a shard set: a lock in a folder; in an object store, a marker that names the writer."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import fsspec

from esol.base.errors import DataError, EsolError
from esol.base.files import Lock, hold, signature
from esol.data import columns
from esol.data.storage import UNFINISHED, filesystem, is_local, patient, writer_of

_FLAT = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}  # stores without folders; making one could make a bucket
_LEFT = b"interrupted: esol-shards create writes index.json last; without it these shards count for nothing\n"


def turn(out: str, overwrite: bool) -> AbstractContextManager[Callable[[], None]]:
    """Empties a folder or URL for a new shard set and keeps others from writing there until the end of the block.

    Gives a function to call before each write: DataError where somebody else has taken the place over, which only
    object stores let happen. DataError too where `out` holds something or is being written to; it says by whom.
    """
    fs, path = filesystem(out)
    return _folder(out, Path(path), overwrite) if is_local(fs) else _store(out, fs, path, overwrite)


@contextmanager
def _folder(out: str, folder: Path, overwrite: bool) -> Iterator[Callable[[], None]]:
    folder.mkdir(parents=True, exist_ok=True)
    _refuse(out, os.listdir(folder), overwrite)
    marker = folder / UNFINISHED
    try:
        lock = _lock(marker)
    except TimeoutError as error:
        raise DataError(f"{out} is being written by {error}: wait until it is done, or choose another folder") from None
    with lock:
        try:
            _refuse(out, os.listdir(folder), overwrite)
        except DataError:
            marker.unlink()
            raise
        for name in _old(os.listdir(folder)):
            (folder / name).unlink()
        yield lambda: None
        marker.unlink()


def _lock(marker: Path) -> Lock:
    while True:
        lock = hold(marker, 0)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), marker.stat()):
                return lock
        lock.close()  # whoever had it was done in between and has removed it


@contextmanager
def _store(out: str, fs: fsspec.AbstractFileSystem, path: str, overwrite: bool) -> Iterator[Callable[[], None]]:
    """Stores have no locks: the marker is written, read back, and read again before every write."""
    place = f"{path}/{UNFINISHED}"
    mine = f"{signature()}\n{secrets.token_hex(8)}\n".encode()

    def check() -> None:
        with storage(out):
            if not patient(fs, place, 0, fs.exists, place) or patient(fs, place, 0, fs.cat_file, place) != mine:
                other = writer_of(out) or "another process that is done by now"
                raise DataError(f"{out} was taken over by {other}: what this process was writing is not finished")

    with storage(out):
        if not _FLAT & set([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
            fs.makedirs(path, exist_ok=True)
        names = _names(fs, path)
        _refuse(out, names, overwrite)
        if not overwrite and (writer := writer_of(out)):
            raise DataError(
                f"{out} is being written by {writer}: wait until it is done; if that process is dead, give --overwrite"
            )
        patient(fs, place, 0, fs.pipe_file, place, mine)
    check()
    try:
        with storage(out):
            for name in _old(names):
                fs.rm_file(f"{path}/{name}")
        yield check
        with storage(out):
            fs.rm_file(place)
    except BaseException:
        with suppress(Exception):  # the first error counts
            check()
            fs.pipe_file(place, _LEFT)
        raise


@contextmanager
def storage(root: str) -> Iterator[None]:
    """Turns what a storage back end raises, each its own, into a DataError of one line."""
    try:
        yield
    except EsolError:
        raise
    except Exception as error:
        raise DataError(cannot_write(root, error)) from error


def cannot_write(root: str, error: Exception) -> str:
    """The message for what a file system or storage back end has raised."""
    what = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
    where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    return f"cannot write to {root}: {what}{where}; run the command again when mended"


def _names(fs: fsspec.AbstractFileSystem, path: str) -> set[str]:
    try:
        return {Path(name).name for name in fs.ls(path, detail=False)}
    except (
        FileNotFoundError
    ):  # object stores know no empty folders; a bucket that is missing is noticed when written to
        return set()


def _refuse(out: str, names: Collection[str], overwrite: bool) -> None:
    if "index.json" in names and not overwrite:
        raise DataError(f"{out} already holds a shard set; choose another folder, or replace it with --overwrite")
    if _shards(names) and not {"index.json", UNFINISHED} & set(names):
        raise DataError(
            f"{out} holds shards without index.json that this command did not write; choose another folder,"
            f" or index them: esol-shards index {out} --classes FILE"
        )


def _old(names: Collection[str]) -> list[str]:
    """What to remove, the index first: without it the shards count for nothing."""
    return [name for name in ("index.json", columns.NAME) if name in names] + _shards(names)


def _shards(names: Collection[str]) -> list[str]:
    return sorted(name for name in names if name.startswith("shard-") and name.endswith((".tar", ".tar.tmp")))
