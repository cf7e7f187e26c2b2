"""Single members of a shard set by their place in the index: ranged reads, every byte checked."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sys
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from esol.base.errors import DataError
from esol.base.files import hold
from esol.data.index import Index, Shard
from esol.data.storage import filesystem

OPEN_FILES = 128  # per process, least recently used closed first
DOWNLOAD_MINUTES = 30  # how long a process waits for another one of its node to fetch a shard


_READING = threading.Lock()  # open files are closed when there are too many; not a reader's own, which is pickled


def _renew_lock() -> None:
    global _READING
    _READING = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # a thread that held it is not in the child


class ShardReader:
    """Reads members of an index's shards; shards behind a URL are fetched whole, once per node, into `cache`.

    What is fetched is checked against the index; a cached shard that turns out damaged later is fetched once more.
    Safe to hand to forked or spawned workers: files are opened by the process that reads them. Threads may share it.
    """

    def __init__(self, index: Index, cache: str = "") -> None:
        self.index = index
        self.cache = cache or "~/.cache/esol"
        self._files: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()
        self._remote = "://" in index.root
        self._again: set[int] = set()  # shards that were fetched a second time

    def read(self, ordinal: int, ext: str) -> bytes:
        """The member's bytes; DataError naming shard and key where it is missing or damaged."""
        return self._read(ordinal, (ext,))[0]

    def _read(self, ordinal: int, extensions: tuple[str, ...]) -> list[bytes]:
        """Several members of a sample; they lie side by side, so one read gets them all."""
        members = []
        for ext in extensions:
            if ext not in self.index.members or self.index.members[ext][ordinal, 0] < 0:
                raise DataError(f"{self.name(ordinal)}: has no .{ext} member")
            members.append(self.index.members[ext][ordinal].tolist())
        shard = int(self.index.shard_of[ordinal])
        with _READING:
            found, damage = self._members(shard, extensions, members)
            if damage and self._fetch_again(shard):
                found, damage = self._members(shard, extensions, members)
        if damage and shard in self._again:
            damage += f"; if that finds nothing, the disk of data.cache, {self.cache}, damages files"
        if damage:
            raise DataError(f"{self.name(ordinal)}: the shard {damage}")
        return found

    def _members(self, shard: int, extensions: tuple[str, ...], members: list[list[int]]) -> tuple[list[bytes], str]:
        """The bytes, and what is wrong with them; nothing where all is well."""
        descriptor = self._open(shard)
        begin = min(offset for offset, _, _ in members)
        end = max(offset + size for offset, size, _ in members)
        try:
            if end > os.fstat(descriptor).st_size:  # before so much memory is asked for
                return [], f"ends before it (.{extensions[0]}); run esol-shards verify {self.index.root}"
            data = os.pread(descriptor, end - begin, begin)
        except OSError as error:
            return [], f"cannot be read: {error.strerror}"
        found = []
        for ext, (offset, size, crc) in zip(extensions, members, strict=True):
            member = data[offset - begin : offset - begin + size]
            if len(member) != size or zlib.crc32(member) != crc:
                how = "ends before it" if len(member) != size else "holds other bytes than were indexed"
                return [], f"{how} (.{ext}); run esol-shards verify {self.index.root}"
            found.append(member)
        return found, ""

    def image(self, ordinal: int) -> bytes:
        """The photo's bytes as they were when the shard was made."""
        return self.read(ordinal, self.index.image_ext(ordinal))

    def labels(self, ordinal: int) -> NDArray[np.float32]:
        """Multi-hot labels (C,); DataError where a label is not one of the index's classes."""
        return self._multi_hot(ordinal, self.read(ordinal, "json"))

    def occurrence(self, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many of the samples show each class (C,): by the index where it says so, else from the shards."""
        if self.index.labels is not None:
            return self.index.labels[ordinals].sum(0)
        return np.sum([self.labels(int(o)) > 0 for o in ordinals], 0)

    def image_and_labels(self, ordinal: int) -> tuple[bytes, NDArray[np.float32]]:
        """Both in one read, for training."""
        image, record = self._read(ordinal, (self.index.image_ext(ordinal), "json"))
        return image, self._multi_hot(ordinal, record)

    def _multi_hot(self, ordinal: int, record: bytes) -> NDArray[np.float32]:
        multi_hot = np.zeros(len(self.index.classes), np.float32)
        try:
            labels = json.loads(record)["labels"]
            if not isinstance(labels, list):
                raise TypeError("labels is no list")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{self.name(ordinal)}: its json must hold a list of labels ({type(error).__name__}: {error})"
            ) from error
        for name in labels:
            if name not in self.index.classes:
                close = difflib.get_close_matches(str(name), self.index.classes, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise DataError(f"{self.name(ordinal)}: label {name!r} is not one of the classes{hint}")
            multi_hot[self.index.classes.index(name)] = 1
        return multi_hot

    def name(self, ordinal: int) -> str:
        """Shard and key, for messages."""
        return f"{self.index.shards[int(self.index.shard_of[ordinal])].name}, sample {self.index.keys[ordinal]}"

    def _open(self, shard: int) -> int:
        if self._owner != os.getpid():  # forked: leave the parent's descriptors to the parent
            self._files, self._owner = OrderedDict(), os.getpid()
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        path = self._local(shard)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in its place is not waited for
        except OSError as error:
            raise DataError(f"shard {path} cannot be opened: {error.strerror}") from error
        self._files[shard] = descriptor
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def _local(self, shard: int, damaged: os.stat_result | None = None) -> Path:
        """The shard's file; one from a URL is fetched where the cache lacks it or has no other than the damaged one."""
        spec = self.index.shards[shard]
        if not self._remote:
            return Path(self.index.root) / spec.name
        try:
            cache = Path(self.cache).expanduser()
        except RuntimeError as error:
            raise DataError(f"{self.cache}: this user has no home folder; set data.cache to another folder") from error
        folder = cache / hashlib.sha256(self.index.root.encode()).hexdigest()[:16]
        target = folder / f"{spec.sha256[:16]}-{spec.name}"

        def usable() -> bool:
            try:
                status = target.stat()
            except FileNotFoundError:
                return False
            return status.st_size == spec.bytes and not (damaged and os.path.samestat(status, damaged))

        try:
            if not usable():
                folder.mkdir(parents=True, exist_ok=True)
                with hold(folder / f"{spec.name}.lock", DOWNLOAD_MINUTES * 60):
                    if not usable():
                        _fetch(self.index.root, spec, target)
        except TimeoutError as error:
            what = f"for {error} to fetch {self.index.root.rstrip('/')}/{spec.name}"
            raise DataError(f"waited {DOWNLOAD_MINUTES} minutes {what}") from None
        except OSError as error:
            raise DataError(
                f"data.cache: cannot write {error.filename or folder}: {error.strerror or error};"
                " give a folder that can be written and has room for the shards"
            ) from error
        return target

    def _fetch_again(self, shard: int) -> bool:
        """Replaces a cached shard that turned out to be damaged, once; whether there is another one to read now."""
        if not self._remote or shard in self._again:
            return False
        self._again.add(shard)
        descriptor = self._files.pop(shard)
        damaged = os.fstat(descriptor)
        print(
            f"{self.index.shards[shard].name} in {self.cache} is damaged: fetching it again",
            file=sys.stderr,
            flush=True,
        )
        try:
            self._local(shard, damaged)
        finally:
            os.close(descriptor)
        return True


def _fetch(root: str, spec: Shard, target: Path) -> None:
    """Puts a shard into the cache, whole; OSError where the cache is at fault, DataError where the source is."""
    _sweep(target.parent)
    temporary = target.with_suffix(".tmp")
    url, digest = f"{root.rstrip('/')}/{spec.name}", hashlib.sha256()
    try:
        # Not emptied first: where locks do nothing, several processes write the same bytes to the same places.
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as local:
            for block in _blocks(root, spec.name, url):
                local.write(block)
                digest.update(block)
            size = local.tell()
            local.truncate()
        if (size, digest.hexdigest()) != (spec.bytes, spec.sha256):
            what = f"{size} bytes instead of {spec.bytes}" if size != spec.bytes else "other bytes than were indexed"
            raise DataError(f"{url}: a fresh copy holds {what}; run esol-shards verify {root}")
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _blocks(root: str, name: str, url: str) -> Iterator[bytes]:
    try:
        fs, path = filesystem(root)
        with fs.open(f"{path}/{name}", "rb") as remote:
            while block := remote.read(1 << 20):
                yield block
    except Exception as error:  # every storage back end has its own
        raise DataError(f"{url} cannot be fetched: {error}") from error


def _sweep(folder: Path) -> None:
    """Removes what processes that were killed have left; the next fetch of the same shard takes up its own."""
    for path in folder.glob("*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > DOWNLOAD_MINUTES * 60:
                path.unlink()
