"""What inference stages of a run have made, and the photos' true masks, read by the photos' place in the data."""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from esol.base.errors import DataError
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.samples import decode_mask
from esol.pipeline.context import Context


class _OfRun(Protocol):
    """Whatever knows a run and its data, as a stage's context does."""

    @property
    def index(self) -> Index: ...

    @property
    def run_dir(self) -> Path: ...


MOST_ARRAYS = 1 << 32  # bytes of an .npz, unpacked: maps of 40 classes of a photo of 100 million pixels
ARRAY_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading a damaged .npz may raise."""


def read_arrays(file: IO[bytes] | Path) -> dict[str, NDArray[Any]]:
    """All arrays of an .npz, without objects; ARRAY_ERRORS, ValueError where they would fill more than MOST_ARRAYS."""
    with np.load(file, allow_pickle=False) as arrays:
        if (size := sum(member.file_size for member in arrays.zip.infolist())) > MOST_ARRAYS:
            raise ValueError(f"it unpacks to {size:,} bytes")
        return {name: arrays[name] for name in arrays.files}


class StageShards:
    """What an inference stage of the run wrote, read by the ordinals of the data.

    Safe to hand to data workers. CheckpointError or DataError where it is not there or damaged.
    """

    def __init__(self, run: _OfRun, stage: str) -> None:
        self._keys = run.index.keys
        self._reader = ShardReader(Index.load(run.run_dir / stage))
        self._place = {str(key): i for i, key in enumerate(self._reader.index.keys)}
        self._stage = stage

    def __contains__(self, ordinal: int) -> bool:
        return str(self._keys[ordinal]) in self._place

    def holds(self, ordinal: int, member: str) -> bool:
        """Whether the stage's sample has this member."""
        members, place = self._reader.index.members, self._place.get(str(self._keys[ordinal]), -1)
        return place >= 0 and member in members and bool(members[member][place, 0] >= 0)

    def read(self, ordinal: int, member: str) -> bytes:
        """A member of the stage's sample."""
        key = str(self._keys[ordinal])
        if key not in self._place:
            raise DataError(f"{self._stage} has no sample {key}: run it again")
        return self._reader.read(self._place[key], member)

    def arrays(self, ordinal: int, member: str) -> dict[str, NDArray[Any]]:
        """An .npz member."""
        try:
            return read_arrays(io.BytesIO(self.read(ordinal, member)))
        except ARRAY_ERRORS as error:
            raise DataError(
                f"{self._stage}, sample {self._keys[ordinal]}: .{member} holds no arrays ({error})"
            ) from error

    def label_map(self, ordinal: int, member: str) -> NDArray[np.uint8]:
        """A .png member: (H, W), 0 background, 1..C, 255 void."""
        name = f"{self._stage}, sample {self._keys[ordinal]}"
        return decode_mask(self.read(ordinal, member), name, len(self._reader.index.classes))


@dataclass(frozen=True)
class TrueMasks:
    """The samples' own masks (H, W); DataError where the shards have none or it is damaged. For data workers too."""

    reader: ShardReader

    def __call__(self, ordinal: int) -> NDArray[np.uint8]:
        reader = self.reader
        return decode_mask(reader.read(ordinal, "mask.png"), reader.name(ordinal), len(reader.index.classes))


def truth_of(context: Context, ordinal: int, size: tuple[int, int], split: str) -> NDArray[np.uint8] | None:
    """The sample's mask, if the split has it and the shard a mask; DataError where it is not of this size.

    A photo that is labelled as showing nothing is all background, where the split has masks at all.
    """
    index = context.index
    members = index.split(split)
    place = int(np.searchsorted(members, ordinal))
    if place == len(members) or members[place] != ordinal:
        return None
    masks = index.members.get("mask.png")
    if masks is None:
        return None
    if masks[ordinal, 0] < 0:
        empty = index.labels is not None and not index.labels[ordinal].any() and (masks[members, 0] >= 0).any()
        return np.zeros(size, np.uint8) if empty else None
    truth = TrueMasks(context.reader)(ordinal)
    if truth.shape != size:
        raise DataError(f"{context.reader.name(ordinal)}: the mask is {truth.shape}, the image {size} (height, width)")
    return truth
