"""Writes shard sets: balanced, in an order shuffled once, every file whole or absent, index.json last."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from esol.data.index import UNFINISHED, filesystem, is_local, scan_shard, write_index
from esol.errors import DataError
from esol.files import sync_folder
from esol.progress import progress
from shards.samples import Source, listing

SAMPLES_PER_SHARD = 128


def create(
    source: Source,
    out: str,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    seed: int = 0,
    overwrite: bool = False,
    threads: int = 0,
) -> Counter[str]:
    """Writes all keys of the source's splits, shuffled by seed, into shards whose sizes differ by at most one.

    The same source and seed give the same bytes. Every sample is read before any problem is reported; DataError lists
    them all, and no index is written then. threads: that read and check samples, 0 = one per core. Returns how many
    images each label has.
    """
    splits = {name: set(keys) for name, keys in source.splits.items()}
    keys = sorted(set().union(*splits.values()))
    if not keys:
        raise DataError(f"nothing to write to {out}: no split has an image")
    _check_keys(keys)
    order = [keys[i] for i in np.random.default_rng(seed).permutation(len(keys))]
    parts = np.array_split(np.arange(len(order)), -(-len(order) // samples_per_shard))
    try:
        _begin(out, overwrite)
        records, labelled = _write_all(source, out, [[order[i] for i in part] for part in parts], threads)
        ordinals = {name: [i for i, key in enumerate(order) if key in members] for name, members in splits.items()}
        write_index(out, source.classes, ordinals, records)
        _end(out)
        return labelled
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise DataError(
            f"cannot write to {out}: {error.strerror or error}{where}; run the command again when mended"
        ) from error


def _write_all(
    source: Source, out: str, parts: list[list[str]], threads: int
) -> tuple[list[dict[str, Any]], Counter[str]]:
    problems: list[str] = []
    labelled: Counter[str] = Counter()
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
                    labelled.update(json.loads(sample["json"])["labels"])
            if not problems:
                records.append(write_mirror_shard(out, f"shard-{number:06d}.tar", samples))
    if problems:
        raise DataError(listing(f"{len(problems)} images cannot be used; nothing was finished", sorted(problems)))
    return records, labelled


def write_mirror_shard(
    out_dir: str | os.PathLike[str], shard_name: str, samples: Iterable[dict[str, Any]]
) -> dict[str, Any]:
    """Writes one tar file, whole or not at all, and returns its record for write_index.

    samples: {"__key__": key, extension: bytes, ...}, e.g. "cam.npy". An inference stage gives its input's shard name
    and keys, in order, so that its output mirrors the input. Same samples, same bytes. A file of that name is replaced.
    """
    fs, path = filesystem(os.fspath(out_dir))
    if is_local(fs):
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{shard_name}.tmp"
        try:
            _write_tar(temporary, samples)
            record = scan_shard(folder, temporary.name) | {"name": shard_name}
            os.replace(temporary, folder / shard_name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(folder)
        return record
    with tempfile.TemporaryDirectory() as scratch:
        _write_tar(Path(scratch, shard_name), samples)
        record = scan_shard(scratch, shard_name)
        fs.put_file(str(Path(scratch, shard_name)), f"{path}/{shard_name}")  # whole objects or none
    return record


def _write_tar(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    os.environ.setdefault("WDS_SECURE", "1")
    from webdataset.writer import TarWriter  # imports torch: not at the top, so that --help is quick

    with open(path, "wb") as file:
        # mtime is the only thing of TarWriter's headers that changes from run to run
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for sample in samples:
                tar.write(sample)
        file.flush()
        os.fsync(file.fileno())


def _check_keys(keys: list[str]) -> None:
    for key in keys:
        if not key or any(c in "./\\" or c.isspace() or not c.isprintable() for c in key):
            raise DataError(f"key {key!r}: a key must not be empty or hold dots, slashes or spaces; rename the image")
        if len(key.encode()) > 80:  # tar headers hold 100 bytes, extension included
            raise DataError(f"key {key!r} is longer than 80 bytes; rename the image")


def _begin(out: str, overwrite: bool) -> None:
    fs, path = filesystem(out)
    fs.makedirs(path, exist_ok=True)
    names = {Path(name).name for name in fs.ls(path, detail=False)}
    shards = {name for name in names if name.startswith("shard-") and name.endswith((".tar", ".tar.tmp"))}
    if "index.json" in names and not overwrite:
        raise DataError(f"{out} already holds a shard set; choose another folder, or replace it with --overwrite")
    if shards and not names & {"index.json", UNFINISHED}:
        raise DataError(
            f"{out} holds shards without index.json that this command did not write; choose another folder,"
            f" or index them: esol-shards index {out} --classes FILE"
        )
    fs.pipe_file(
        f"{path}/{UNFINISHED}",
        b"esol-shards create writes index.json last; without it these shards count for nothing\n",
    )
    if "index.json" in names:
        fs.rm_file(f"{path}/index.json")
    for name in shards:
        fs.rm_file(f"{path}/{name}")


def _end(out: str) -> None:
    fs, path = filesystem(out)
    fs.rm_file(f"{path}/{UNFINISHED}")
