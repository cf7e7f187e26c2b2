"""Where a shard set stands, a local folder or a URL, who is writing to it, and how long a store may not answer."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from esol.base.errors import DataError, first_line
from esol.base.files import holder
from esol.base.urls import secret_in

UNFINISHED = "creation-unfinished"  # stands in a folder while shards are written that no index vouches for yet
# memory: within one process only; what is not named here (pipes, shells, chained URLs) is refused
_STORES = ("s3", "gs", "gcs", "az", "abfs", "abfss")
SCHEMES = ("file", "http", "https", *_STORES, "hdfs", "sftp", "memory")

TRIES = 6  # of a request
PAUSE = 1.0  # seconds before the second, twice as many before each further one
PATIENCE = 120.0  # seconds after which no further try begins
ANSWER = 30.0  # seconds that a store has for an answer, and more for its bytes:
SLOWEST = 1 << 16  # bytes a second
LIKELY = 1 << 24  # bytes at most of most files whose size is not known before they are read
TOGETHER = 16  # requests under way at a time where many small ones are needed
_REFUSED = {errno.EINVAL, errno.EPERM, errno.ENOSYS, socket.EAI_NONAME}
_MAY_PASS = {408, 425, 429}  # of the HTTP answers 4xx, which else mean that the request is wrong
CACHE = "~/.cache/esol"  # where no data.cache is given
DOWNLOAD_MINUTES = 30  # how long a process waits for another one of its node to fetch a file
Found = TypeVar("Found")


def filesystem(root: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and path behind a local folder or URL; DataError for an unknown scheme or a URL with secrets."""
    scheme, separator, _ = root.partition("://")
    if not separator:
        return fsspec.filesystem("file"), os.path.abspath(root)
    secret, bare = secret_in(root)
    if secret:
        raise DataError(
            f"{bare}: the URL holds {secret}, which would be written into the run's files: take it out of the URL and "
            "give the credentials in the environment (docs/object-stores.md)"
        )
    if scheme not in SCHEMES:
        raise DataError(f"{root}: URL scheme {scheme!r} is not supported; known: {', '.join(SCHEMES)}")
    # what other processes write must be seen, and listings that fsspec keeps are never looked at again
    options = {"use_listings_cache": False} if scheme in _STORES else {}
    try:
        fs, path = fsspec.core.url_to_fs(root, **options)
    except ImportError as error:
        raise DataError(f"{root}: {error}") from error
    return fs, path.rstrip("/")


def patient(
    fs: fsspec.AbstractFileSystem, place: str, size: int, call: Callable[..., Found], *arguments: Any, **options: Any
) -> Found:
    """What a store answers to a call of `fs` that moves about `size` bytes; tried again where the failure may pass.

    place: for the line that says so. Raises ConnectionError, which says how often and how long it was tried, where it
    does not pass, and any other failure as the back end has it. The back ends' own retries happen inside of one try.
    """
    if is_local(fs):
        return call(*arguments, **options)
    limit = ANSWER + size / SLOWEST
    if fs.async_impl:  # a deadline in whatever the back end does, which holds against a server that stalls as well
        options["timeout"] = limit
    began, tries = time.monotonic(), 0
    while True:
        tries += 1
        try:
            return call(*arguments, **options)
        except Exception as error:  # every storage back end has its own
            if _stays(error):
                raise
            late = isinstance(error, TimeoutError) and not str(error)
            what = f"no whole answer within {limit:.0f} s" if late else first_line(error)
            pause, spent = PAUSE * 2 ** (tries - 1), time.monotonic() - began
            if tries == TRIES or spent + pause > PATIENCE:
                often = "once" if tries == 1 else f"{tries} times"
                raise ConnectionError(f"{what}; tried {often} in {spent:.0f} s") from error
            print(f"{place}: {what}; trying again in {pause:g} s", file=sys.stderr, flush=True)
            time.sleep(pause)


def _stays(error: Exception) -> bool:
    """Whether the same request would fail again: what it asks for is missing, forbidden or misspelt."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _MAY_PASS
    if isinstance(error, OSError):
        kinds = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
        return isinstance(error, kinds) or error.errno in _REFUSED
    return isinstance(error, (ImportError, ValueError, TypeError)) or "Credentials" in type(error).__name__


def sizes(root: str, names: list[str]) -> list[int | None]:
    """Sizes in bytes of files below a folder or URL: -1 where one is missing, None where the server does not say.

    DataError where the store cannot be reached.
    """
    fs, path = filesystem(root)
    if root.partition("://")[0] in _STORES:  # a request for a thousand of them, instead of one for each
        try:
            listed = patient(fs, root, LIKELY, fs.ls, path, detail=True)
        except ConnectionError as error:
            raise DataError(f"cannot list {root}: {error}") from error
        except Exception:  # every back end has its own; who may read may not always list
            pass
        else:
            there = {Path(about["name"]).name: about["size"] for about in listed}
            return [there.get(name, -1) for name in names]

    def info(place: str, **options: Any) -> dict[str, Any]:
        try:
            return dict(fs.info(place, **options))
        except FileNotFoundError as error:
            # fsspec's http says so of every failure, and has the real one as its cause
            if {"http", "https"} & set(fs.protocol) and getattr(error.__cause__, "status", 0) not in (404, 410):
                raise error.__cause__ or error from None
            raise

    def size(name: str) -> int | None:
        try:
            found: int | None = patient(fs, f"{root}/{name}", 0, info, f"{path}/{name}")["size"]
        except FileNotFoundError:
            return -1
        except Exception as error:  # every storage back end has its own
            raise DataError(f"cannot reach {root}/{name}: {first_line(error)}") from error
        return found

    with ThreadPoolExecutor(1 if is_local(fs) else TOGETHER) as pool:
        return list(pool.map(size, names))


def cache_folder(root: str, cache: str) -> Path:
    """Where what is fetched of the set at a URL is kept, below `cache`; DataError where there is no home folder."""
    try:
        return Path(cache).expanduser() / hashlib.sha256(root.encode()).hexdigest()[:16]
    except RuntimeError as error:
        raise DataError(f"{cache}: this user has no home folder; set data.cache to another folder") from error


def writer_of(root: str) -> str:
    """Who is creating the shard set at the moment: process, host, since when; empty where nobody is known to.

    In an object store a process that was killed still counts.
    """
    fs, path = filesystem(root)
    if is_local(fs):
        return holder(Path(path) / UNFINISHED)
    try:
        line = bytes(fs.cat_file(f"{path}/{UNFINISHED}")).decode(errors="replace").partition("\n")[0]
    except Exception:  # every storage back end has its own, and some forbid what is not there
        return ""
    return line if line.startswith("process ") else ""


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def why_missing(fs: fsspec.AbstractFileSystem, path: str, root: str) -> str:
    try:
        if writer := writer_of(root):
            return f"it is being created by {writer}: wait until that is done"
        if fs.exists(f"{path}/{UNFINISHED}"):
            return "its creation was interrupted: run the same esol-shards create again"
        if not fs.exists(path):
            return "there is no such folder" if is_local(fs) else "there is no such folder or bucket"
    except Exception:  # every storage back end has its own; the hint below still helps
        pass
    return f"run: esol-shards index {root} --classes FILE"
