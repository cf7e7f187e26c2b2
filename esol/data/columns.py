"""What a large set's index says of each sample, in one file beside index.json that ranks and workers map and share.

index.npy is one array with a row for each sample: .EXT, int64 (3,): offset, size and crc32 of the member, or -1; key,
unicode; splits, bool (S,): those that it belongs to; labels, bool (C,), where the index knows them. All of a sample
lies on one page or two, so that what is read anywhere in the file costs a single access to the disk.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esol.base.strangers import plain

NAME = "index.npy"
_SAFE = np.array([chr(code).isalnum() or chr(code) in "-_\0" for code in range(128)] + [False])  # letters of most keys
AT_ONCE = 1 << 16  # rows that a check copies


@dataclass(frozen=True, eq=False)
class Columns:
    """The arrays of an Index."""

    keys: NDArray[np.str_]
    members: dict[str, NDArray[np.int64]]
    splits: dict[str, NDArray[np.int64]]
    labels: NDArray[np.bool_] | None


def pack(columns: Columns) -> memoryview:
    """The bytes of index.npy; splits in the order in which columns names them."""
    fields: list[tuple[Any, ...]] = [(f".{ext}", "<i8", (3,)) for ext in columns.members]
    fields += [("key", columns.keys.dtype), ("splits", "?", (len(columns.splits),))]
    fields += [] if columns.labels is None else [("labels", "?", columns.labels.shape[1:])]
    table = np.zeros(len(columns.keys), fields)
    table["key"] = columns.keys
    for ext, rows in columns.members.items():
        table[f".{ext}"] = rows
    for number, ordinals in enumerate(columns.splits.values()):
        table["splits"][ordinals, number] = True
    if columns.labels is not None:
        table["labels"] = columns.labels
    file = io.BytesIO()
    np.lib.format.write_array(file, table, allow_pickle=False)
    return file.getbuffer()


def load(path: Path, splits: Sequence[str], classes: int, shards: Sequence[tuple[int, int]]) -> Columns:
    """Maps what pack wrote and checks all of it; ValueError where it is no such file or does not fit the shards.

    shards: samples and bytes of each.
    """
    columns, total = mapped(path, splits), sum(samples for samples, _ in shards)
    keys, labels = columns.keys, columns.labels
    if len(keys) != total:
        raise ValueError(f"it has {len(keys)} rows, the shards hold {total} samples")
    room = np.repeat(np.array([size for _, size in shards], np.int64), [samples for samples, _ in shards])
    if labels is not None and labels.shape != (total, classes):
        raise ValueError(f"it has {labels.shape[-1]} labels a row for {classes} classes")
    marks = np.empty(total, np.uint64)
    for part in _parts(total):
        for ext, rows in columns.members.items():
            there = rows[part, 0] >= 0
            outside = (rows[part] < 0).any(1) | (rows[part, 1] > room[part] - rows[part, 0])
            if np.where(there, outside, (rows[part] != -1).any(1)).any():
                raise ValueError(f"it has {ext} members outside their shards")
        letters = np.ascontiguousarray(keys[part]).view(np.uint32).reshape(len(keys[part]), -1)
        if letters.max(initial=0) > 0x10FFFF:
            raise ValueError("it has a key that is no text")
        gaps = (letters[:, 1:] > 0) & (letters[:, :-1] == 0)  # behind the end there are only zeros
        for key in keys[part][~_SAFE[np.minimum(letters, 128)].all(1) | gaps.any(1) | (letters[:, 0] == 0)]:
            if not plain(str(key)):
                raise ValueError(f"it has key {str(key)!r:.80}, which is no plain path below a folder")
        marks[part] = 0
        for letter in letters.T:
            marks[part] = marks[part] * np.uint64(0x9E3779B97F4A7C15) + letter
        if labels is not None and labels[part].view(np.uint8).max(initial=0) > 1:
            raise ValueError("it has labels that are neither 0 nor 1")
    ordered = np.sort(marks)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    found, times = np.unique(keys[np.isin(marks, twice)] if len(twice) else keys[:0], return_counts=True)
    if (times > 1).any():
        raise ValueError(f"key {found[times > 1][0]} appears twice")
    return columns


def mapped(path: Path, splits: Sequence[str]) -> Columns:
    """The columns of a file that pack wrote, not checked but for their kinds; ValueError where it is none."""
    try:
        table = np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except (ValueError, TypeError, KeyError, OverflowError, EOFError, SyntaxError, MemoryError) as error:
        raise ValueError(f"it is no whole array file: {error}") from error
    kinds = {name: kind for name, (kind, *_) in (table.dtype.fields or {}).items()}
    exts = [name for name in kinds if name.startswith(".")]
    wanted = {name: np.dtype(("<i8", (3,))) for name in exts} | {"splits": np.dtype(("?", (len(splits),)))}
    if (
        table.ndim != 1
        or not {"key", "splits"} <= kinds.keys() <= {"key", "splits", "labels", *exts}
        or any(kinds[name] != kind for name, kind in wanted.items())
        or (kinds["key"].kind, kinds["key"].isnative) != ("U", True)
        or ("labels" in kinds and (kinds["labels"].base, len(kinds["labels"].shape)) != (np.dtype(bool), 1))
    ):
        raise ValueError(f"its rows are {table.dtype}, not members, key, {len(splits)} splits and labels")
    return Columns(
        table["key"],
        {name[1:]: table[name] for name in exts},
        {name: np.flatnonzero(table["splits"][:, number]) for number, name in enumerate(splits)},
        table["labels"] if "labels" in kinds else None,
    )


def _parts(total: int) -> Iterator[slice]:
    return (slice(start, min(start + AT_ONCE, total)) for start in range(0, total, AT_ONCE))
