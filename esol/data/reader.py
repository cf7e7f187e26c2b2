"""Single members of a shard set by their place in the index: ranged reads, every byte checked."""

from __future__ import annotations

import difflib
import json
import os
import sys
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from esol.base.errors import DataError
from esol.data.index import Index
from esol.data.remote import OTHERS, RemoteShards
from esol.data.storage import CACHE

OPEN_FILES = 128  # per process, least recently used closed first

_READING = threading.Lock()  # open files are closed when there are too many; not a reader's own, which is pickled


def _renew_lock() -> None:
    global _READING
    _READING = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # a thread that held it is not in the child


class ShardReader:
    """Reads members of an index's shards; those of shards behind a URL are fetched once per node into `cache`.

    wanted: the samples that will be read, None = all; others can be read as well, each by requests of its own, and are
    not kept. What is fetched is checked against the index; what turns out damaged in the cache later is fetched once
    more. Safe to hand to forked or spawned workers: files are opened by the process that reads them. Threads may share
    it.
    """

    def __init__(self, index: Index, cache: str = "", wanted: NDArray[np.int64] | None = None) -> None:
        self.index = index
        self.cache = cache or CACHE
        self._remote = RemoteShards(index, self.cache, wanted) if "://" in index.root else None
        self._files: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()
        self._again: set[int] = set()  # shards that were fetched a second time

    def ahead(self, shards: Iterable[int]) -> None:
        """Begins to fetch shards, one ahead, in the order in which this process reads them; ends an earlier call's."""
        if self._remote:
            self._remote.ahead(shards)

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
        if damage and shard in self._again and shard in self._files:
            damage += f"; if that finds nothing, the disk of data.cache, {self.cache}, damages files"
        if damage:
            raise DataError(f"{self.name(ordinal)}: the shard {damage}")
        return found

    def _members(self, shard: int, extensions: tuple[str, ...], members: list[list[int]]) -> tuple[list[bytes], str]:
        """The bytes, and what is wrong with them; nothing where all is well."""
        begin = min(offset for offset, _, _ in members)
        end = max(offset + size for offset, size, _ in members)
        if self._remote and not self._remote.keeps(shard, begin, end):
            data = self._remote.apart(shard, begin, end)
        else:
            descriptor = self._open(shard)
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
                how = "ends before it" if len(member) != size else f"holds {OTHERS}"
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
        path = self._remote.file(shard) if self._remote else Path(self.index.root) / self.index.shards[shard].name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in its place is not waited for
        except OSError as error:
            raise DataError(f"shard {path} cannot be opened: {error.strerror}") from error
        self._files[shard] = descriptor
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def _fetch_again(self, shard: int) -> bool:
        """Replaces a cached shard that turned out to be damaged, once; whether there may be other bytes to read now."""
        if not self._remote or shard in self._again:
            return False
        self._again.add(shard)
        descriptor = self._files.pop(shard, None)
        if descriptor is None:  # what was damaged came from the store just now
            return True
        damaged = os.fstat(descriptor)
        print(
            f"{self.index.shards[shard].name} in {self.cache} is damaged: fetching it again",
            file=sys.stderr,
            flush=True,
        )
        try:
            self._remote.file(shard, damaged)
        finally:
            os.close(descriptor)
        return True
