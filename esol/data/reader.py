"""Single members of a shard set by their place in the index: ranged reads, every byte checked."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from esol.data.index import Index
from esol.errors import DataError
from esol.files import hold

OPEN_FILES = 128  # per process, least recently used closed first
DOWNLOAD_MINUTES = 30  # how long a process waits for another one of its node to fetch a shard


class ShardReader:
    """Reads members of an index's shards; shards behind a URL are fetched whole, once per node, into `cache`.

    Safe to hand to forked or spawned workers: files are opened by the process that reads them.
    """

    def __init__(self, index: Index, cache: str = "") -> None:
        self.index = index
        self.cache = cache or "~/.cache/esol"
        self._files: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()

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
        begin = min(offset for offset, _, _ in members)
        end = max(offset + size for offset, size, _ in members)
        descriptor = self._open(int(self.index.shard_of[ordinal]))
        try:
            data = os.pread(descriptor, end - begin, begin)
        except OSError as error:
            raise DataError(f"{self.name(ordinal)}: the shard cannot be read: {error.strerror}") from error
        found = []
        for ext, (offset, size, crc) in zip(extensions, members, strict=True):
            member = data[offset - begin : offset - begin + size]
            if len(member) != size or zlib.crc32(member) != crc:
                how = "ends before it" if len(member) != size else "holds other bytes than were indexed"
                raise DataError(
                    f"{self.name(ordinal)}: the shard {how} (.{ext}); run esol-shards verify {self.index.root}"
                )
            found.append(member)
        return found

    def image(self, ordinal: int) -> bytes:
        """The photo's bytes as they were when the shard was made."""
        return self.read(ordinal, self.index.image_ext(ordinal))

    def labels(self, ordinal: int) -> NDArray[np.float32]:
        """Multi-hot labels (C,); DataError where a label is not one of the index's classes."""
        return self._multi_hot(ordinal, self.read(ordinal, "json"))

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
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"shard {path} cannot be opened: {error.strerror}") from error
        self._files[shard] = descriptor
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def _local(self, shard: int) -> Path:
        spec = self.index.shards[shard]
        if "://" not in self.index.root:
            return Path(self.index.root) / spec.name
        try:
            cache = Path(self.cache).expanduser()
        except RuntimeError as error:
            raise DataError(f"{self.cache}: this user has no home folder; set data.cache to another folder") from error
        folder = cache / hashlib.sha256(self.index.root.encode()).hexdigest()[:16]
        target = folder / f"{spec.sha256[:16]}-{spec.name}"
        url = f"{self.index.root.rstrip('/')}/{spec.name}"
        try:
            if target.exists():
                return target
            folder.mkdir(parents=True, exist_ok=True)
            with hold(folder / f"{spec.name}.lock", DOWNLOAD_MINUTES * 60):
                if not target.exists():
                    _fetch(url, target, spec.bytes)
        except TimeoutError as other:
            raise DataError(f"waited {DOWNLOAD_MINUTES} minutes for {other} to fetch {url} to {target}") from None
        except OSError as error:
            raise DataError(
                f"{url} cannot be kept in {folder}: {error.strerror or error}; set data.cache to a folder that can be "
                "written"
            ) from error
        return target


def _fetch(url: str, target: Path, size: int) -> None:
    import fsspec

    temporary = target.with_suffix(f".{os.getpid()}.tmp")  # not every file system has the lock that keeps others out
    try:
        with fsspec.open(url, "rb") as remote, open(temporary, "wb") as local:
            while block := remote.read(1 << 20):
                local.write(block)
        if temporary.stat().st_size != size:
            raise DataError(f"{url}: fetched {temporary.stat().st_size} bytes, the index says {size}")
        os.replace(temporary, target)
    except OSError as error:
        raise DataError(f"{url} cannot be fetched: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
