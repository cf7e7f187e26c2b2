"""Features of training crops on disk: what a frozen backbone makes of a crop is the same in every stage and run.

A crop follows from seed, epoch and sample (esol.data.plan.sample_rng); its number is epoch * samples of the index +
place in the index. A folder holds parts, one that each process has written, of raw rows: PART.bin, and PART.npy with
the number of each row's crop, which is written last, so that what a killed process leaves behind is never read.
"""

from __future__ import annotations

import io
import logging
import math
import os
import shutil
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esol.base.files import atomic_write

SPARE = 2 * 2**30  # bytes of the disk that are left to everything else
_LOG = logging.getLogger(__name__)
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}  # numpy has no bf16


class FeatureStore:
    """The features of one backbone's crops in a folder, which ranks share; each adds a part of its own.

    shape: (channels, h, w) of a crop's features; kind: their type; room: bytes that this process may write. What is
    there when it is made is known; what is added is known to those that are made after it was left.
    """

    known: NDArray[np.int64]
    """The numbers of the crops that are there, in rising order."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], kind: torch.dtype, room: int) -> None:
        self._folder, self._kind, self._room = folder, kind, room
        self._row = math.prod(shape) * kind.itemsize
        self._file: BinaryIO | None = None
        self._added: list[NDArray[np.int64]] = []
        self._parts: list[NDArray[np.int16 | np.int32]] = []
        numbers, places = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)]
        for path in sorted(folder.glob("*.npy")):
            own, rows = np.load(path, allow_pickle=False), path.with_suffix(".bin")
            if not len(own) or rows.stat().st_size < len(own) * self._row:  # more, where a disk filled up within a row
                continue
            channels, height, width = shape
            bits = np.int16 if kind.itemsize == 2 else np.int32
            places.append(np.stack((np.full(len(own), len(self._parts)), np.arange(len(own))), 1))
            numbers.append(own)
            self._parts.append(np.memmap(rows, bits, "r", shape=(len(own), height, width, channels)))
        self.known, first = np.unique(np.concatenate(numbers), return_index=True)
        self._place = np.concatenate(places)[first]

    def get(self, crops: NDArray[np.int64]) -> Tensor:
        """The features (B, channels, h, w), channels last, of crops that are all known."""
        places = self._place[np.searchsorted(self.known, crops)]
        rows = np.stack([self._parts[part][row] for part, row in places.tolist()])
        return torch.from_numpy(rows).view(self._kind).permute(0, 3, 1, 2)

    def add(self, crops: NDArray[np.int64], features: Tensor) -> None:
        """Keeps the features (B, channels, h, w) of crops, as long as there is room."""
        size = len(crops) * self._row
        if size > self._room:
            return
        try:
            if shutil.disk_usage(self._folder).free < SPARE + size:
                raise OSError(f"less than {SPARE >> 30} GiB of disk are left")
            if self._file is None:
                self._file = self._new_part()
            rows = features.detach().permute(0, 2, 3, 1).contiguous().view(_BITS[self._kind]).cpu()
            self._file.write(rows.numpy().data)
        except OSError as error:
            _LOG.warning("%s: no more features are kept (%s); the rest is computed each time", self._folder, error)
            self._room = 0
            return
        self._room -= size
        self._added.append(crops)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Makes what was added known to the stages that follow, also those after a stop."""
        if self._file is None:
            return
        path, file, self._file = Path(self._file.name), self._file, None
        index = io.BytesIO()
        np.save(index, np.concatenate([np.zeros(0, np.int64), *self._added]))
        try:
            with file:
                file.flush()
                os.fsync(file.fileno())
            atomic_write(path.with_suffix(".npy"), index.getvalue())
        except OSError as error:
            _LOG.warning("%s: the features of this stage are not kept (%s)", self._folder, error)

    def _new_part(self) -> BinaryIO:
        number = 0
        while True:
            try:
                return (self._folder / f"{number:05d}.bin").open("xb")
            except FileExistsError:
                number += 1


def used(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.glob("*")) if folder.exists() else 0


def clear(folder: Path, keep: str) -> None:
    """Removes features of other backbones and settings, and parts that a killed process has left."""
    for other in folder.glob("*"):
        if other.name != keep:
            shutil.rmtree(other, ignore_errors=True)
    for part in (folder / keep).glob("*.bin"):
        if not part.with_suffix(".npy").exists():
            part.unlink()
