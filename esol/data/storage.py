"""Where a shard set stands, a local folder or a URL, and who is writing to it."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec

from esol.base.errors import DataError
from esol.base.files import holder

UNFINISHED = "creation-unfinished"  # stands in a folder while shards are written that no index vouches for yet
# memory: within one process only; what is not named here (pipes, shells, chained URLs) is refused
_STORES = ("s3", "gs", "gcs", "az", "abfs", "abfss")
SCHEMES = ("file", "http", "https", *_STORES, "hdfs", "sftp", "memory")


def filesystem(root: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and path behind a local folder or URL; DataError for a scheme that is not known."""
    scheme, separator, _ = root.partition("://")
    if not separator:
        return fsspec.filesystem("file"), os.path.abspath(root)
    if scheme not in SCHEMES:
        raise DataError(f"{root}: URL scheme {scheme!r} is not supported; known: {', '.join(SCHEMES)}")
    # what other processes write must be seen, and listings that fsspec keeps are never looked at again
    options = {"use_listings_cache": False} if scheme in _STORES else {}
    try:
        fs, path = fsspec.core.url_to_fs(root, **options)
    except ImportError as error:
        raise DataError(f"{root}: {error}") from error
    return fs, path.rstrip("/")


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
