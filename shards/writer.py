"""Writes shard sets: balanced, in an order shuffled once, every file whole or absent, index.json last."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np

from esol.base.errors import DataError
from esol.base.progress import progress
from esol.data.index import write_index
from esol.data.samples import write_mirror_shard
from shards.census import Census
from shards.samples import Source, listing
from shards.turn import cannot_write, storage, turn

SAMPLES_PER_SHARD = 128


def create(
    source: Source,
    out: str,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    seed: int = 0,
    overwrite: bool = False,
    threads: int = 0,
    drop_damaged: bool = False,
) -> tuple[Census, list[str]]:
    """Writes all keys of the source's splits, shuffled by seed, into shards whose sizes differ by at most one.

    The same source and seed give the same bytes. Every sample is read before any problem is reported; DataError lists
    them all, and no index is written then; drop_damaged leaves such samples out and returns the reasons. threads: that
    read and check samples, 0 = one per core. DataError as well where labels and masks cannot mean the same classes.
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
            records, dropped = _write_all(source, out, shards, threads, check, drop_damaged, census)
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
    threads: int,
    check: Callable[[], None],
    drop: bool,
    census: Census,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The shards' records, and the problems of what was left out."""
    problems: list[str] = []
    records = []
    with (
        ThreadPoolExecutor(threads or os.cpu_count()) as pool,
        progress("create", sum(map(len, parts)), "images", visible=True) as advance,
    ):

        def attempt(key: str) -> dict[str, bytes] | None:
            try:
                return source.read(key)
            except DataError as error:
                problems.append(str(error))
                return None

        done = 0
        for number, part in enumerate(parts):
            samples = []
            for sample in pool.map(attempt, part):  # at most one shard's samples are in memory
                done += 1
                advance(done, "")
                if sample is not None:
                    samples.append(sample)
                    census.add(str(sample["__key__"]), sample)
            if samples and (drop or not problems):
                check()
                with storage(out) if "://" in out else nullcontext():
                    records.append(write_mirror_shard(out, f"shard-{number:06d}.tar", samples))
    if problems and not (drop and records):
        headline = f"{len(problems)} images cannot be used; nothing was finished"
        more = "" if drop else "; --drop-damaged leaves them out"
        raise DataError(listing(headline + more, sorted(problems)))
    return records, sorted(problems)


def _check_keys(keys: list[str]) -> None:
    for key in keys:
        if not key or any(c in "./\\" or c.isspace() or not c.isprintable() for c in key):
            raise DataError(f"key {key!r}: a key must not be empty or hold dots, slashes or spaces; rename the image")
        if len(key.encode()) > 80:  # tar headers hold 100 bytes, extension included
            raise DataError(f"key {key!r} is longer than 80 bytes; rename the image")
