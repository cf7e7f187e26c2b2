"""Files that are either there in full or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from esol.base.errors import ConfigError
from esol.base.strangers import without_following


def atomic_write(path: Path | str, data: bytes | memoryview | str) -> None:
    """Writes path through a temporary file beside it: fsync, then rename, so that no reader meets half a file.

    Text is UTF-8. OSError as from open or write; nothing is left behind then. Of several writers the last wins.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", opener=without_following) as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside a folder survive a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse fsync on folders; their renames are durable by themselves
        pass
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's content; OSError for a pipe or a device, which may have no end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file", str(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def writable(run_dir: Path) -> None:
    """Makes the folder where it is missing; ConfigError, naming what stands in its way, where it cannot be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(run_dir))
    except (OSError, ValueError) as error:
        parts = (run_dir, *run_dir.parents)
        way = next((part for part in parts if os.path.lexists(part) and not os.path.isdir(part)), None)
        reason = getattr(error, "strerror", "") or str(error)
        if way is not None:
            reason = f"{way} is a link to {os.readlink(way)}, no folder" if way.is_symlink() else f"{way} is a file"
        raise ConfigError(f"run_dir = {run_dir} cannot be used: {reason}; set it to a folder that can be") from error


class Lock:
    """A lock of hold; gone when it is closed or its process ends, however it ends. Used as a context manager or kept.

    unlocked: "" where it keeps others out, else why the file system could not lock.
    """

    def __init__(self, file: IO[str], unlocked: str) -> None:
        self._file, self.unlocked = file, unlocked

    def fileno(self) -> int:
        """Of the file that is held."""
        return self._file.fileno()

    def close(self) -> None:
        """Lets the next one in."""
        self._file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def hold(path: Path, patience: float) -> Lock:
    """Keeps other processes that call this for path out; works over NFS. Not between threads of one process.

    TimeoutError, naming the holder, where another process has it for longer than `patience` seconds. A file system that
    cannot lock (Lustre without its flock option, NFS without lockd, some FUSE) is told apart from that and taken as it
    is at once: see Lock.unlocked. OSError where path cannot be opened for writing.
    """
    # it stays open; a link is not followed, for what it leads to would be emptied
    file = open(path, "a+", encoding="utf-8", errors="replace", opener=without_following)  # noqa: SIM115
    try:
        unlocked = _lock(file, patience)
        if not unlocked:
            file.truncate(0)
            file.write(f"{signature()}\n")
            file.flush()
    except BaseException:
        file.close()
        raise
    return Lock(file, unlocked)


def _lock(file: IO[str], patience: float) -> str:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return ""
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # ENOLCK, EOPNOTSUPP, ENOSYS, EINVAL, EIO: no lock here
                return error.strerror or str(error)
        if time.monotonic() > deadline:
            file.seek(0)
            raise TimeoutError(file.read().strip() or "a process that has not said its name")
        time.sleep(0.2)


def holder(path: Path) -> str:
    """Who holds path at the moment, in another process, in hold's words; empty where nobody does or can be seen."""
    with suppress(OSError), open(path) as file:
        try:
            os.lockf(file.fileno(), os.F_TEST, 0)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return file.read().strip() or "a process that has not said its name"
    return ""


def signature() -> str:
    """This process, for people who want to know who it is that they wait for."""
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}"
