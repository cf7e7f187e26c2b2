"""Inference over a split: one shard is one unit of work, done by one rank, its output a shard of the same name.

Beside <shard>, written whole or not at all, lies <shard>.counts.npz: whole numbers that add up over shards in any
order, so that scores do not depend on who did what, and the hash of the shard. What a killed job has finished is kept
where it still is what was written.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from esol.base.errors import DataError
from esol.base.files import atomic_write, sha256
from esol.base.progress import progress
from esol.data.index import Index, scan_shard, write_index
from esol.data.reader import ShardReader
from esol.data.transforms import decode, decode_mask
from esol.pipeline.context import Context
from shards.writer import write_mirror_shard

Tally = dict[str, NDArray[Any]]
Members = dict[str, bytes]
_SHARD = "shard sha256"  # of the counts: what the shard beside them holds
Work = Callable[[NDArray[np.int64], Tally], Iterable[tuple[int, Members]]]


def mask_splits(context: Context) -> tuple[str, str]:
    """The splits that maps, labels and pseudo masks are made for."""
    return context.config.data.mask_split, context.config.data.score_split


def over_shards(
    context: Context, name: str, folder: Path, splits: Sequence[str], work: Work, writes: bool = True
) -> Tally:
    """Runs work(ordinals, tally) on every shard's samples of the splits; returns the sum of all tallies on every rank.

    work yields (ordinal, members of the output sample) in any order and leaves its counts in tally at the end; writes
    False: nothing but the counts is kept. Stopped after a signal, when all ranks have finished a shard.
    """
    engine, index = context.engine, context.index
    ordinals = np.unique(np.concatenate([index.split(split) for split in splits]))
    shard_of = index.shard_of[ordinals]
    shards = np.unique(shard_of)
    _discard_foreign(context, name, folder)
    if advice := advice_on_shards(name, len(shards), len(ordinals), engine.world_size):
        context.say(advice)
    mine = shards[engine.rank :: engine.world_size]
    with progress(name, int(np.isin(shard_of, mine).sum()), "images of this process", engine.is_main) as advance:
        done = 0
        for shard in mine:
            spec = index.shards[shard].name
            members = ordinals[shard_of == shard]
            context.engine.beat(f"the check of {folder / spec}")
            if not _finished(folder, spec, writes):
                _one_shard(context, name, folder, spec, members, work, partial(_advance, advance, done, spec), writes)
            done += len(members)
            advance(done, spec)
            if context.stop:
                break
    if engine.any(bool(context.stop)):
        raise context.stop.stopped(engine, f"{name} stopped after whole shards")
    engine.barrier(f"the shards of {name} from all ranks")
    names = [index.shards[s].name for s in shards]
    if engine.is_main and writes:
        places = {s: np.searchsorted(ordinals, index.split(s)) for s in splits}
        records = []
        for shard_name in names:
            engine.beat(f"the index of {folder / shard_name}")
            records.append(scan_shard(folder, shard_name))
        write_index(folder, index.classes, places, records)
    return _sum(folder / f"{n}.counts.npz" for n in names)


def _advance(advance: Callable[[int, str], None], before: int, spec: str, count: int) -> None:
    advance(before + count, spec)


def advice_on_shards(name: str, shards: int, samples: int, world_size: int) -> str:
    """What to say where processes outnumber shards, else nothing: a shard is the unit of work here."""
    if shards >= world_size:
        return ""
    return (
        f"{name}: the split lies in {shards} shards, fewer than {world_size} processes: some have nothing to do. "
        f"To use all, create the set again with --samples-per-shard {max(1, samples // world_size)} or fewer"
    )


def _discard_foreign(context: Context, name: str, folder: Path) -> None:
    """Removes what a run with other settings left in the folder."""
    mark = folder / "fingerprint.json"  # of the settings that the shards beside it were made with
    if context.engine.is_main:
        stamp = json.dumps({"fingerprint": context.fingerprint})
        if not mark.exists() or mark.read_text() != stamp:
            for path in folder.iterdir():
                if path.is_file():
                    path.unlink(missing_ok=True)
            atomic_write(mark, stamp)
    context.engine.barrier(f"the main rank to clear the folder of {name}")


def _one_shard(
    context: Context,
    name: str,
    folder: Path,
    spec: str,
    ordinals: NDArray[np.int64],
    work: Work,
    advance: Callable[[int], None],
    writes: bool,
) -> None:
    """One shard's samples in order, then its two files, the counts last."""
    tally: Tally = {}
    samples: dict[int, Members] = {}
    try:
        for ordinal, members in work(ordinals, tally):
            context.engine.beat(f"{name} behind sample {context.index.keys[ordinal]} of {spec}")
            samples[ordinal] = members
            advance(len(samples))
    except DataError as error:
        raise DataError(f"{error}; {name} needs every sample of its split") from error
    written = ""
    if writes:
        keys = context.index.keys
        mirrored = ({"__key__": str(keys[o]), **samples[int(o)]} for o in ordinals)
        written = write_mirror_shard(folder, spec, mirrored)["sha256"]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **tally, **{_SHARD: np.array(written)})  # type: ignore[arg-type]
    atomic_write(folder / f"{spec}.counts.npz", buffer.getvalue())


def _finished(folder: Path, spec: str, writes: bool) -> bool:
    """Whether a shard's two files are there and undamaged."""
    try:
        with np.load(folder / f"{spec}.counts.npz", allow_pickle=False) as counts:
            members = {key: counts[key] for key in counts.files}  # reading checks every member's checksum
        return not writes or sha256(folder / spec) == str(members[_SHARD])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return False


def _sum(paths: Iterator[Path]) -> Tally:
    total: Tally = {}
    for path in paths:
        with np.load(path, allow_pickle=False) as counts:
            for key in counts.files:
                if key == _SHARD:
                    continue
                total[key] = total[key] + counts[key] if key in total else counts[key]
    return total


class StageShards:
    """What an inference stage of the run wrote, read by the ordinals of the data.

    Safe to hand to data workers. CheckpointError or DataError where it is not there or damaged.
    """

    def __init__(self, context: Context, stage: str) -> None:
        self._keys = context.index.keys
        self._reader = ShardReader(Index.load(context.run_dir / stage))
        self._place = {str(key): i for i, key in enumerate(self._reader.index.keys)}
        self._stage = stage

    def __contains__(self, ordinal: int) -> bool:
        return str(self._keys[ordinal]) in self._place

    def read(self, ordinal: int, member: str) -> bytes:
        """A member of the stage's sample."""
        key = str(self._keys[ordinal])
        if key not in self._place:
            raise DataError(f"{self._stage} has no sample {key}: run it again")
        return self._reader.read(self._place[key], member)

    def arrays(self, ordinal: int, member: str) -> dict[str, NDArray[Any]]:
        """An .npz member."""
        with np.load(io.BytesIO(self.read(ordinal, member)), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def label_map(self, ordinal: int, member: str) -> NDArray[np.uint8]:
        """A .png member: (H, W), 0 background, 1..C, 255 void."""
        name = f"{self._stage}, sample {self._keys[ordinal]}"
        return decode_mask(self.read(ordinal, member), name, len(self._reader.index.classes))


def photo(context: Context, ordinal: int) -> Tensor:
    """The sample's photo, uint8 (3, H, W), on the CPU."""
    context.engine.beat(f"the photo {context.index.keys[ordinal]}")  # pictures of the main rank too, while others wait
    return decode(context.reader.image(ordinal), context.reader.name(ordinal))


@dataclass(frozen=True)
class TrueMasks:
    """The samples' own masks (H, W); DataError where the shards have none or it is damaged. For data workers too."""

    reader: ShardReader

    def __call__(self, ordinal: int) -> NDArray[np.uint8]:
        reader = self.reader
        return decode_mask(reader.read(ordinal, "mask.png"), reader.name(ordinal), len(reader.index.classes))


def truth_of(context: Context, ordinal: int, size: tuple[int, ...], split: str = "") -> NDArray[np.uint8] | None:
    """The sample's mask, if the split (data.score_split) has it and the shard a mask; DataError where not of size.

    A photo that is labelled as showing nothing is all background, where the split has masks at all.
    """
    index = context.index
    members = index.split(split or context.config.data.score_split)
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


def pictured(context: Context, split: str = "") -> list[int]:
    """The samples of the split (data.score_split) that pictures show, evenly spread."""
    members = context.index.split(split or context.config.data.score_split)
    count = min(context.config.tracking.pictures, len(members))
    return members[np.linspace(0, len(members) - 1, count).astype(int)].tolist()
