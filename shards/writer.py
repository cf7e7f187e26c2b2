"""Writes shard sets: balanced, in an order shuffled once, every file whole or absent, index.json last."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np

from esol.base.errors import DataError
from esol.base.machine import cores
from esol.base.progress import progress
from esol.data.index import write_index
from esol.data.storage import filesystem, is_local, patient
from shards.census import Census
from shards.making import Made, Wanted, by_processes, make_shard
from shards.samples import Reads, Source, listing
from shards.turn import cannot_write, storage, turn

SAMPLES_PER_SHARD = 128
WORTH = 500  # photos from which on processes of their own are faster, whose start costs about a second


def create(
    source: Source,
    out: str,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    seed: int = 0,
    overwrite: bool = False,
    workers: int = 0,
    drop_damaged: bool = False,
) -> tuple[Census, list[str]]:
    """Writes all keys of the source's splits, shuffled by seed, into shards whose sizes differ by at most one.

    The same source and seed give the same bytes. Every sample is read before any problem is reported; DataError lists
    them all, and no index is written then; drop_damaged leaves such samples out and returns the reasons. workers: that
    read, check and write, 0 = one per core; processes where there are WORTH photos and the source's read is a Reads,
    else threads. DataError as well where labels and masks cannot mean the same classes.
    """
    splits = {name: set(keys) for name, keys in source.splits.items()}
    keys = sorted(set().union(*splits.values()))
    if not keys:
        raise DataError(f"nothing to write to {out}: no split has an image")
    _check_keys(keys)
    order = [keys[i] for i in np.random.default_rng(seed).permutation(len(keys))]
    parts = np.array_split(np.arange(len(order)), -(-len(order) // samples_per_shard))
    try:
        with turn(out, overwrite) as check:
            census, shards = Census(source.classes), [[order[i] for i in part] for part in parts]
            records, dropped = _write_all(source, out, shards, workers or cores(), check, drop_damaged, census)
            census.refuse(out)
            order = [key for record in records for key in record["keys"]]
            ordinals = {name: [i for i, key in enumerate(order) if key in own] for name, own in splits.items()}
            check()
            with storage(out):
                write_index(out, source.classes, ordinals, records)
        return census, dropped
    except OSError as error:
        raise DataError(cannot_write(out, error)) from error


def _write_all(
    source: Source,
    out: str,
    parts: list[list[str]],
    workers: int,
    check: Callable[[], None],
    drop: bool,
    census: Census,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The shards' records, and the problems of what was left out."""
    problems: list[str] = []
    records = []
    fs, path = filesystem(out)
    with ExitStack() as stack:
        # what goes to an object store is made here and carried there by this process, which knows whose turn it is
        folder = path if is_local(fs) else stack.enter_context(tempfile.TemporaryDirectory())
        advance = stack.enter_context(progress("create", sum(map(len, parts)), "images", visible=True))

        def wanted() -> Iterator[Wanted]:
            for number, keys in enumerate(parts):
                read = source.read.part(keys) if isinstance(source.read, Reads) else source.read
                yield Wanted(f"shard-{number:06d}.tar", source.classes, read, keys, drop, write=drop or not problems)

        made: Iterator[Made]
        if workers > 1 and isinstance(source.read, Reads) and sum(map(len, parts)) >= WORTH:
            made = stack.enter_context(by_processes(folder, wanted(), len(parts), workers, advance))
        else:
            made = _by_threads(folder, wanted(), workers, advance)
        for shard in made:
            problems += shard.problems
            census.include(shard.census)
            if shard.record is None:
                continue
            if not is_local(fs):
                name = shard.record["name"]
                file = os.path.join(folder, name)
                check()
                with storage(out):
                    # stores put whole objects or none
                    patient(fs, f"{out}/{name}", shard.record["bytes"], fs.put_file, file, f"{path}/{name}")
                os.unlink(file)
            records.append(shard.record)
    if problems and not (drop and records):
        headline = f"{len(problems)} images cannot be used; nothing was finished"
        more = "" if drop else "; --drop-damaged leaves them out"
        raise DataError(listing(headline + more, sorted(problems)))
    return records, sorted(problems)


def _by_threads(
    folder: str, wanted: Iterator[Wanted], workers: int, advance: Callable[[int, str], None]
) -> Iterator[Made]:
    done = 0

    def read(count: int) -> None:
        advance(done + count, "")

    for one in wanted:
        yield make_shard(folder, one, workers, read)
        done += len(one.keys)


def _check_keys(keys: list[str]) -> None:
    for key in keys:
        if not key or any(c in "./\\" or c.isspace() or not c.isprintable() for c in key):
            raise DataError(f"key {key!r}: a key must not be empty or hold dots, slashes or spaces; rename the image")
        if len(key.encode()) > 80:  # tar headers hold 100 bytes, extension included
            raise DataError(f"key {key!r} is longer than 80 bytes; rename the image")
