"""Shards behind a URL: what of them is fetched, once a node, into which files of a cache.

Of a shard behind a URL the samples that are wanted are fetched once a node into a cache, where they stand in a file at
their own places. Neighbours come with one request, and so do samples so near to each other that what lies between them
is sooner fetched than another request made, NEAR bytes. Where that leaves no half of the shard unread, counting a
request as NEAR bytes, the whole shard is fetched: hardly slower, checked as a whole, and there for other splits too.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esol.base.errors import DataError
from esol.base.files import hold
from esol.data.index import Index, Shard
from esol.data.storage import DOWNLOAD_MINUTES, TOGETHER, cache_folder, filesystem, patient

NEAR = 64 << 10  # bytes: the share of one request in 100 ms at 10 MB/s, of which TOGETHER are under way at a time
BLOCK = 8 << 20  # bytes that are fetched at a time and tried again alone
AHEAD = 1  # shards that a process fetches before it reads them; sixteen only took the line from the one that is wanted
OTHERS = "other bytes than were indexed"

_FETCHING: dict[Path, threading.Lock] = {}  # by a thread of this process; between processes a file's lock counts
_FAILED: dict[Path, str] = {}  # what the last of them said
os.register_at_fork(after_in_child=_FETCHING.clear)  # a thread that held one is not in the child


class RemoteShards:
    """An index's shards in the cache, as far as the wanted samples (None: all) want them; threads may share it."""

    def __init__(self, index: Index, cache: str, wanted: NDArray[np.int64] | None) -> None:
        self.index, self.cache = index, cache
        self._wanted = None if wanted is None else np.unique(wanted)
        self._parts: dict[int, list[tuple[int, int]]] = {}
        self._ahead: _Ahead | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None}  # threads stay where they are

    def ahead(self, shards: Iterable[int]) -> None:
        """As ShardReader's."""
        if self._ahead:
            self._ahead.end()
        self._ahead = _Ahead(self, shards)

    def keeps(self, shard: int, begin: int, end: int) -> bool:
        """Whether these bytes of a shard are in its file."""
        return any(start <= begin and end <= stop for start, stop in self.parts(shard))

    def file(self, shard: int, damaged: os.stat_result | None = None) -> Path:
        """The shard's file, fetched where the cache lacks it or has no other than the damaged one; DataError."""
        if self._ahead:
            self._ahead.opened(shard)
        try:
            return self.obtain(shard, DOWNLOAD_MINUTES * 60, damaged)
        except TimeoutError as error:
            what = f"for {error} to fetch {self._url(shard)}"
            raise DataError(f"waited {DOWNLOAD_MINUTES} minutes {what}") from None
        except OSError as error:
            raise DataError(
                f"data.cache: cannot write {error.filename or self._folder()}: {error.strerror or error};"
                " give a folder that can be written and has room for the shards"
            ) from error

    def obtain(self, shard: int, patience: float, damaged: os.stat_result | None = None) -> Path:
        """The shard's file in the cache; TimeoutError where another process is fetching it for longer than patience."""
        spec, parts, folder = self.index.shards[shard], self.parts(shard), self._folder()
        which = "" if parts == [(0, spec.bytes)] else f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}-"
        target = folder / f"{spec.sha256[:16]}-{which}{spec.name}"

        def usable() -> bool:
            try:
                status = target.stat()
            except FileNotFoundError:
                return False
            return status.st_size == spec.bytes and not (damaged and os.path.samestat(status, damaged))

        if usable():
            return target
        turn = _FETCHING.setdefault(target, threading.Lock())
        waits = not turn.acquire(blocking=False)
        if waits:
            turn.acquire()
        try:
            if waits and (error := _FAILED.get(target)):  # another thread has just tried for as long as it may
                raise DataError(error)
            if not usable():
                folder.mkdir(parents=True, exist_ok=True)
                with hold(folder / f"{spec.name}.lock", patience):
                    if not usable():
                        self._fetch(shard, target)
            _FAILED.pop(target, None)
        except DataError as error:
            _FAILED[target] = str(error)
            raise
        finally:
            turn.release()
        return target

    def _folder(self) -> Path:
        """Of this set's files in the cache."""
        return cache_folder(self.index.root, self.cache)

    def _url(self, shard: int) -> str:
        return f"{self.index.root.rstrip('/')}/{self.index.shards[shard].name}"

    def parts(self, shard: int) -> list[tuple[int, int]]:
        """(begin, end) of what is fetched of a shard, in rising order: of all of it, or of its wanted samples."""
        if shard not in self._parts:
            self._parts[shard] = self._find_parts(shard)
        return self._parts[shard]

    def _find_parts(self, shard: int) -> list[tuple[int, int]]:
        spec, first = self.index.shards[shard], int(self.index.first[shard])
        whole = [(0, spec.bytes)]
        if self._wanted is None:
            return whole
        begin, end = np.searchsorted(self._wanted, (first, first + spec.samples))
        own = self._wanted[begin:end]
        if not len(own):
            return []
        tables = np.stack([table[own] for table in self.index.members.values()])
        there = tables[..., 0] >= 0
        begins = np.where(there, tables[..., 0], spec.bytes).min(0)
        ends = np.where(there, tables[..., 0] + tables[..., 1], 0).max(0)
        order = np.argsort(begins)
        begins, ends = begins[order], ends[order]
        cuts = np.flatnonzero(begins[1:] - ends[:-1] > NEAR) + 1
        parts = [(int(b[0]), int(e[-1])) for b, e in zip(np.split(begins, cuts), np.split(ends, cuts), strict=True)]
        cost = sum(end - begin + NEAR for begin, end in parts)
        return parts if cost < spec.bytes / 2 else whole

    def _fetch(self, shard: int, target: Path) -> None:
        """Puts what is wanted of a shard into the cache; OSError where the cache is at fault, DataError the source."""
        spec, parts, url = self.index.shards[shard], self.parts(shard), self._url(shard)
        _sweep(target.parent)
        temporary = target.with_suffix(".tmp")
        try:
            for last in (False, True):
                # Not emptied first: where locks do nothing, several processes write the same bytes to the same places.
                with open(os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as local:
                    for begin, block in _blocks(self.index.root, spec, parts, url):
                        local.seek(begin)
                        local.write(block)
                    size = spec.bytes if parts != [(0, spec.bytes)] else local.tell()
                    local.truncate(size)
                    local.flush()
                    wrong = self._wrong(shard, local, size)
                if not wrong:
                    break
                if last:
                    raise DataError(
                        f"{url}: two fresh copies hold {wrong}: the object in the store is not the one that the set's "
                        f"index.json was made for; run esol-shards verify {self.index.root}"
                    )
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _wrong(self, shard: int, local: BufferedRandom, size: int) -> str:
        """What is wrong with a fetched shard, held against the index."""
        spec, parts = self.index.shards[shard], self.parts(shard)
        local.seek(0)
        if parts == [(0, spec.bytes)]:
            if size != spec.bytes:
                return f"{size} bytes instead of {spec.bytes}"
            return "" if hashlib.file_digest(local, "sha256").hexdigest() == spec.sha256 else OTHERS
        first = int(self.index.first[shard])
        for table in self.index.members.values():
            for offset, length, crc in table[first : first + spec.samples].tolist():
                if any(begin <= offset and offset + length <= end for begin, end in parts) and offset >= 0:
                    local.seek(offset)
                    if zlib.crc32(local.read(length)) != crc:
                        return OTHERS
        return ""

    def apart(self, shard: int, begin: int, end: int) -> bytes:
        """Bytes of a shard that nothing is kept of."""
        spec = self.index.shards[shard]
        data = bytearray(end - begin)
        for place, block in _blocks(self.index.root, spec, [(begin, end)], self._url(shard)):
            if len(block) == spec.bytes:  # from a server that knows no ranges
                return block[begin:end]
            data[place - begin : place - begin + len(block)] = block
        return bytes(data)


class _Ahead:
    """A thread that fetches shards before they are read; what goes wrong in it, their reader will meet and say."""

    def __init__(self, remote: RemoteShards, order: Iterable[int]) -> None:
        self._opened: set[int] = set()
        self._waiting: set[int] = set()  # fetched, and not opened yet
        self._changed, self._ended, self._owner = threading.Condition(), False, os.getpid()
        self._shards = remote
        threading.Thread(target=self._fetch, args=(iter(order),), name="shards ahead", daemon=True).start()

    def _fetch(self, order: Iterator[int]) -> None:
        for shard in order:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or len(self._waiting) < AHEAD)
                if self._ended:
                    return
                if shard in self._opened or shard in self._waiting:
                    continue
            try:
                self._shards.obtain(shard, 0)
            except TimeoutError:  # another process has begun with it: there is other work
                pass
            except Exception:
                return
            with self._changed:
                if shard not in self._opened:
                    self._waiting.add(shard)

    def opened(self, shard: int) -> None:
        """Somebody reads it now."""
        if self._owner != os.getpid():  # the thread has stayed in the process that was forked
            return
        with self._changed:
            self._opened.add(shard)
            self._waiting.discard(shard)
            self._changed.notify()

    def end(self) -> None:
        """Begins with no other shard."""
        if self._owner != os.getpid():
            return
        with self._changed:
            self._ended = True
            self._changed.notify()


def _blocks(root: str, spec: Shard, parts: list[tuple[int, int]], url: str) -> Iterator[tuple[int, bytes]]:
    """Places and bytes of parts of a shard; all of it at once from a server that knows no ranges. DataError."""
    cuts = [(b, min(b + BLOCK, end)) for begin, end in parts for b in range(begin, end, BLOCK)]
    try:
        fs, path = filesystem(root)
        while cuts:
            count, size = 1, cuts[0][1] - cuts[0][0]
            while count < min(len(cuts), TOGETHER) and size + cuts[count][1] - cuts[count][0] <= BLOCK:
                size += cuts[count][1] - cuts[count][0]
                count += 1
            now, cuts = cuts[:count], cuts[count:]
            begins, ends = (list(edges) for edges in zip(*now, strict=True))
            names = [f"{path}/{spec.name}"] * count
            for begin, end, block in zip(
                begins, ends, patient(fs, url, size, fs.cat_ranges, names, begins, ends, on_error="raise"), strict=True
            ):
                if len(block) > end - begin:
                    yield 0, block
                    return
                yield begin, block
    except Exception as error:  # every storage back end has its own
        raise DataError(f"{url} cannot be fetched: {error}") from error


def _sweep(folder: Path) -> None:
    """Removes what processes that were killed have left; the next fetch of the same shard takes up its own."""
    for path in folder.glob("*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > DOWNLOAD_MINUTES * 60:
                path.unlink()
