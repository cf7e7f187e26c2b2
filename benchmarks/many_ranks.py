"""What a job of hundreds of ranks costs its rank 0: simulated, with ranks as threads of a few processes on loopback.

    python -m benchmarks.many_ranks watchdog [--ranks 2 64 256 1024] [--seconds 60]
    python -m benchmarks.many_ranks groups [--ranks 64 256]

watchdog: one process hosts the job's store and rank 0's watchdog, and does nothing else; every other rank is a watchdog
of its own, with its own connections, in one of four processes. Then a rank stops, and all must notice.
groups: every rank is a thread that joins a gloo group as the engine does, with and without connections that wait until
they are used; then all meet at a barrier and reduce a number.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import machine, table
from esol.config import EngineConfig
from esol.engines.watchdog import Watchdog

PROCESSES = 4  # that the ranks other than 0 are spread over
STALL = 30.0  # seconds: engine.stall of the ranks that shall notice one that stands
BOUND = timedelta(minutes=5)


class Counting:
    """A store that counts what goes through it: requests, and bytes of keys and values."""

    def __init__(self, store: Any) -> None:
        self._store, self.requests, self.bytes = store, 0, 0

    def clone(self) -> Counting:
        self._store = self._store.clone()
        return self

    def set_timeout(self, timeout: timedelta) -> None:
        self._store.set_timeout(timeout)

    def set(self, key: str, value: str) -> None:
        self._count(key, value)
        self._store.set(key, value)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        found = self._store.multi_get(keys)
        self._count(*keys, *found)
        return found

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self._count(key, expected, desired)
        return self._store.compare_set(key, expected, desired)

    def _count(self, *texts: str | bytes) -> None:
        self.requests += 1
        self.bytes += sum(map(len, texts))


class Noticing(Watchdog):
    """A watchdog that notes when and why it would end its process."""

    ended, why = 0.0, ""

    def _end(self, verdict: str) -> None:
        self.ended, self.why = time.monotonic(), verdict
        self._done.set()


def _store(port: int, host: bool) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=host, wait_for_workers=False, timeout=BOUND)


def _watchdogs(ranks: Sequence[int], world: int, port: int, limit: float, talk: Connection) -> None:
    """The ranks of one process: they work until they are told to stand, and answer what they noticed."""
    stores = [Counting(_store(port, host=False)) for _ in ranks]
    dogs = [Noticing(rank, world, store, Path(), limit) for rank, store in zip(ranks, stores, strict=True)]
    talk.send("made")
    talk.recv()
    for dog in dogs:
        dog.start()
    began, standing = time.monotonic(), ""
    while standing != "end":
        for dog in dogs if not standing else dogs[1:]:
            dog.beat("a step")
        if talk.poll(0.5):
            standing = talk.recv()
            if standing == "count":
                elapsed, standing = time.monotonic() - began, ""
                talk.send([sum(s.requests for s in stores) / elapsed, sum(s.bytes for s in stores) / elapsed])
    talk.send([(dog.ended, dog.why) for dog in dogs])
    for dog in dogs:
        dog.stop()


def _spawn(function: Callable[..., None], ranks: range, *arguments: Any) -> tuple[list[Connection], list[Any]]:
    """Pipes to processes that share the ranks, and the processes: function(its ranks, *arguments, its pipe)."""
    context, talks, processes = multiprocessing.get_context("spawn"), [], []
    for number in range(min(PROCESSES, len(ranks))):
        ours, theirs = context.Pipe()
        process = context.Process(target=function, args=(ranks[number::PROCESSES], *arguments, theirs), daemon=True)
        process.start()
        talks.append(ours)
        processes.append(process)
    return talks, processes


class _Job:
    """A job whose ranks all work: rank 0 and the store in this process, the others in processes of their own."""

    def __init__(self, world: int, limit: float) -> None:
        self._store = _store(0, host=True)
        self.talks, self._processes = _spawn(_watchdogs, range(1, world), world, self._store.port, limit)
        self.dog = Noticing(0, world, self._store, Path(), limit)
        for talk in self.talks:
            talk.recv()
        self.tell("start")
        self.dog.start()
        self.work(10)

    def work(self, seconds: float) -> None:
        """Lets rank 0 work for so long; the others do until they are told to stand."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.dog.beat("a step")
            time.sleep(0.5)

    def tell(self, what: str) -> None:
        for talk in self.talks:
            talk.send(what)

    def ask(self, what: str) -> list[Any]:
        self.tell(what)
        return [talk.recv() for talk in self.talks]

    def end(self) -> list[tuple[float, str]]:
        """When and why each rank would have ended the job."""
        found = [(self.dog.ended, self.dog.why), *(item for part in self.ask("end") for item in part)]
        self.dog.stop()
        for process in self._processes:
            process.join(60)
        return found


def looks(world: int, limit: float, seconds: float) -> list[float]:
    """Share of a core that rank 0's process takes for store and watchdog; requests/s and bytes/s of all other ranks."""
    job = _Job(world, limit)
    used, began = time.process_time(), time.monotonic()
    job.work(seconds)
    share = (time.process_time() - used) / (time.monotonic() - began)
    counts = job.ask("count")
    job.end()
    return [share, sum(requests for requests, _ in counts), sum(size for _, size in counts)]


def notice(world: int) -> list[Any]:
    """Seconds from the moment that a rank of each other process stands until the first and the last one know."""
    job = _Job(world, STALL)
    stood = time.monotonic()
    job.tell("stand")
    job.work(2.5 * STALL)
    found = job.end()
    whys = {why for _, why in found if why}
    ends = [ended - stood for ended, why in found if why]
    missing = len(found) - len(ends)
    return [min(ends, default=-1), max(ends, default=-1), missing, len(whys), max(map(len, whys), default=0)]


def watchdog(worlds: list[int], seconds: float) -> None:
    limit = 60 * EngineConfig().stall
    rows = []
    for world in worlds:
        share, rate, size = looks(world, limit, seconds)
        rows.append([world, f"{share:.3%}", rate, size / 1e3])
    print(f"\nengine.stall {limit:g} s, the default; {seconds:g} s each\n")
    print(table(("ranks", "rank 0's process, of one core", "requests a second", "kB a second"), rows))
    print(f"\nFour ranks of {STALL:g} s (engine.stall) stand, one of each process\n")
    head = ("ranks", "the first knows after, s", "the last, s", "do not notice", "verdicts", "longest, characters")
    print(table(head, [[world, *notice(world)] for world in worlds if world > PROCESSES]))


def _join(ranks: Sequence[int], world: int, port: int, lazy: bool, talk: Connection) -> None:
    os.environ |= {"TORCH_GLOO_LAZY_INIT": str(int(lazy)), "GLOO_SOCKET_IFNAME": "lo"}
    seconds: list[list[float]] = []
    failed: list[str] = []

    def rank_of(rank: int) -> None:
        try:
            store = dist.PrefixStore("group", _store(port, host=False))
            connected.wait()  # behind it lies how fast the machine resolves its own name
            began = time.monotonic()
            group = dist.ProcessGroupGloo(store, rank, world, BOUND)
            joined = time.monotonic()
            group.monitored_barrier(BOUND, True)
            met = time.monotonic()
            values = torch.ones(1)
            group.allreduce([values]).wait()
            assert float(values) == world
            seconds.append([joined - began, met - joined, time.monotonic() - met])
            talked.wait(BOUND.total_seconds())  # a group that goes while others still read ends their wait
        except Exception as error:
            failed.append(f"rank {rank}: {error}")

    connected, talked = threading.Barrier(len(ranks)), threading.Event()
    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in ranks]
    talk.recv()
    for thread in threads:
        thread.start()
    while len(seconds) + len(failed) < len(ranks):
        time.sleep(0.05)
    talk.send((seconds, failed[:1], len(os.listdir("/proc/self/fd"))))
    talk.recv()
    talked.set()
    for thread in threads:
        thread.join()


def join(world: int, lazy: bool) -> list[Any]:
    """Seconds, at most, of joining, of the first barrier and of a reduction; file handles a rank."""
    store = _store(0, host=True)
    talks, processes = _spawn(_join, range(world), world, store.port, lazy)
    for talk in talks:
        talk.send("start")
    found = [talk.recv() for talk in talks]
    for talk in talks:
        talk.send("end")
    for process in processes:
        process.join(120)
    if errors := [error for _, failed, _ in found for error in failed]:
        return ["-", "-", "-", "-", errors[0][:120]]
    seconds = [item for part, *_ in found for item in part]
    handles = sum(part[2] for part in found) / world
    return [*(max(column) for column in zip(*seconds, strict=True)), handles, ""]


def groups(worlds: list[int]) -> None:
    rows = [
        [world, "when used" if lazy else "at once", *join(world, lazy)] for world in worlds for lazy in (False, True)
    ]
    head = ("ranks", "connections", "join, s", "first barrier, s", "a reduction, s", "file handles a rank", "failed")
    print(table(head, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("watchdog", "groups"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[])
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    print(machine() + "\n")
    if args.what == "watchdog":
        watchdog(args.ranks or [2, 64, 256, 1024], args.seconds)
    else:
        groups(args.ranks or [64, 256])


if __name__ == "__main__":
    main()
