"""One shard from its photos to its tar file, by this process or by several: what comes back is small."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from ctypes import c_int64
from dataclasses import dataclass
from typing import Any

from esol.base.errors import DataError
from esol.data.samples import write_mirror_shard
from shards.census import Census

AHEAD = 2  # shards that wait for a process to be free
LOOK_SECONDS = 0.5  # between two looks at how far the processes are
_FOLDER: str  # where a process of by_processes writes to; how many samples of each shard are read; whether to stop
_READ: Any
_STOP: Any


@dataclass(frozen=True)
class Wanted:
    """A shard to be made: its file's name, its keys in order, and whether to write it, where its samples are sound.

    drop: write it without those that are not.
    """

    name: str
    classes: tuple[str, ...]
    read: Callable[[str], dict[str, bytes]]
    keys: list[str]
    drop: bool
    write: bool


@dataclass(frozen=True)
class Made:
    """record: of the tar file, None where none was written; problems: a line for each sample that cannot be used."""

    record: dict[str, Any] | None
    problems: list[str]
    census: Census


def make_shard(folder: str, wanted: Wanted, threads: int, count: Callable[[int], None]) -> Made:
    """Reads and checks the samples of one shard, all of which are in memory then, and writes it to a local folder.

    count: is told after each sample how many are read. Same wanted, same bytes.
    """
    samples, problems, census = list[dict[str, bytes]](), list[str](), Census(wanted.classes)

    def attempt(key: str) -> dict[str, bytes] | None:
        try:
            return wanted.read(key)
        except DataError as error:
            problems.append(str(error))
            return None

    with ThreadPoolExecutor(threads) as pool:
        for number, sample in enumerate(pool.map(attempt, wanted.keys), 1):
            count(number)
            if sample is not None:
                samples.append(sample)
                census.add(str(sample["__key__"]), sample)
    write = wanted.write and samples and (wanted.drop or not problems)
    return Made(write_mirror_shard(folder, wanted.name, samples) if write else None, problems, census)


@contextmanager
def by_processes(
    folder: str, wanted: Iterator[Wanted], shards: int, processes: int, advance: Callable[[int, str], None]
) -> Iterator[Iterator[Made]]:
    """Gives the shards in their order, made by processes of their own, each of which holds one shard's samples.

    They come from a server process that has webdataset loaded, and torch with it: a fork of this one would take over
    its threads' locks. At the end of the block, however it comes, they leave what they are at behind the next photo.
    DataError where one was killed. `wanted` has to be fit for pickling.
    """
    os.environ.setdefault("WDS_SECURE", "1")  # before the server loads it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shards.making", "webdataset.writer"])
    # plain memory, a place for each shard: a lock that a killed process has held would stop all others
    read, stop = context.RawArray(c_int64, shards), context.RawValue(c_int64, 0)
    pool = ProcessPoolExecutor(processes, context, _set_up, (folder, read, stop))

    def submit(number: int, one: Wanted) -> Future[Made]:
        # where none is free this starts a process, which a Ctrl-C must not reach before it ignores it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.submit(_one_shard, number, one)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def made() -> Iterator[Made]:
        waiting: deque[Future[Made]] = deque()
        try:
            for number, one in enumerate(wanted):
                waiting.append(submit(number, one))
                if len(waiting) >= processes + AHEAD:
                    yield result(waiting.popleft())
            while waiting:
                yield result(waiting.popleft())
        except BrokenProcessPool as error:
            raise DataError(
                f"one of the {processes} processes that make shards was killed, perhaps for want of memory: run the "
                "command again, on fewer cores where that is so (taskset -c 0 esol-shards ...)"
            ) from error

    def result(future: Future[Made]) -> Made:
        while wait([future], LOOK_SECONDS).not_done:
            advance(sum(read), "")
        advance(sum(read), "")
        return future.result()

    try:
        yield made()
    finally:
        stop.value = 1
        pool.shutdown(cancel_futures=True)


def _set_up(folder: str, read: Any, stop: Any) -> None:
    """In a new process: it leaves Ctrl-C to the main process, and does not outlive it."""
    global _FOLDER, _READ, _STOP
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _FOLDER, _READ, _STOP = folder, read, stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _one_shard(number: int, wanted: Wanted) -> Made:
    def count(samples: int) -> None:
        if _STOP.value:
            raise InterruptedError
        _READ[number] = samples

    return make_shard(_FOLDER, wanted, 1, count)
