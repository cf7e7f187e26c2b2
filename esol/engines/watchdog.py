"""Ends a job in which a rank stands still: says which and at what, writes the stacks of all, and leaves."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from esol.base import exits
from esol.engines.deadline import Deadline

_STACKS = signal.SIGUSR2  # upon which a process writes where it stands
_BEAT, _VERDICT = "esol-watchdog/beat-{}", "esol-watchdog/verdict"

_TOLD = 8  # different places at which ranks stand, in a verdict


@dataclass
class _Seen:
    """What another rank last said, and when that was new: monotonic seconds of this process."""

    said: dict[str, Any]
    moved: float  # its work
    alive: float  # its watchdog


class Watchdog:
    """Threads of each rank that tell rank 0 what it does; rank 0 watches all, and all watch rank 0.

    A rank has stalled when for `limit` seconds it has begun nothing new and is not waiting for others, or its process
    does not answer. All ranks waiting for as long is a stall as well. store: the job's, None for a single process;
    folder: for rank-N.txt with the stacks. Between making and starting it all ranks must meet. Calls of beat cost an
    assignment. Rank 0 alone reads what all say, so that the store's work grows with the ranks, not with their square.
    """

    def __init__(self, rank: int, world_size: int, store: Any, folder: Path, limit: float) -> None:
        self._rank, self._folder, self._limit = rank, folder, limit
        self._period = min(15.0, limit / 6)
        self._store = None
        if store is not None:
            self._store = store.clone()  # a connection of its own, or it would stand behind a waiting one
            self._store.set_timeout(timedelta(seconds=30))
            self._store.set(_VERDICT, "")
            self._store.set(_BEAT.format(rank), "{}")
        # The others leave a process that answers no more behind, and nobody but the kernel can end that: its launcher
        # would wait for it as long as it stands. Alone it is somebody's who has stopped it and may let it go on.
        self._deadline = Deadline(limit + 6 * self._period) if world_size > 1 else None
        self._doing, self._count, self._waiting = "starting", 0, False
        self._watched = list(range(world_size)) if rank == 0 else [0, rank]
        self._seen: dict[int, _Seen] = {}
        self._heard, self._verdict = 0.0, ""  # when the store last answered, and why the job must end
        self._done = threading.Event()
        # two, because a store whose machine is gone without a farewell never answers, and holds who asks it
        threads = (("talks", self._talk), ("watches", self._watch))
        self._threads = [threading.Thread(target=f, name=f"watchdog {name}", daemon=True) for name, f in threads]

    def beat(self, doing: str) -> None:
        """The rank begins something new."""
        self._doing, self._count = doing, self._count + 1

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Inside, the rank waits for others."""
        before, self._doing, self._waiting = self._doing, what, True
        self._count += 1
        try:
            yield
        finally:
            self._doing, self._waiting = before, False
            self._count += 1

    def start(self) -> None:
        self._heard = time.monotonic()
        self._seen = {rank: _Seen({}, self._heard, self._heard) for rank in self._watched}
        faulthandler.register(_STACKS, 2, all_threads=True)  # data workers, which are forked later, have it as well
        self._put_off()
        for thread in self._threads:
            thread.start()

    def _put_off(self) -> None:
        if self._deadline is not None:
            self._deadline.put_off()

    def stop(self) -> None:
        """This rank is done; the others no longer wait for its word."""
        self._done.set()
        for thread in self._threads:
            thread.join(self._period + 1)
        if self._deadline is not None:
            self._deadline.lift()
        faulthandler.unregister(_STACKS)
        if self._store is not None and not self._threads[0].is_alive():
            with suppress(Exception):  # where the host of the store has left first, nobody needs to hear it
                self._store.set(_BEAT.format(self._rank), json.dumps({"left": True}))

    def _talk(self) -> None:
        tick = 0
        while not self._verdict and not self._done.wait(self._period):
            tick += 1
            own = {"tick": tick, "count": self._count, "doing": self._doing, "waiting": self._waiting}
            with suppress(Exception):  # whatever a store raises whose host is gone
                self._verdict = self._exchange(own)
                self._heard = time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(self._period):
            self._put_off()
            silent = time.monotonic() - self._heard > self._limit + self._period
            verdict = self._verdict or ("the job's store (on rank 0) does not answer" if silent else "")
            if verdict and not self._done.is_set():
                self._end(verdict)

    def _exchange(self, own: dict[str, Any]) -> str:
        """Tells, listens, and returns why the job must end, or nothing."""
        now = time.monotonic()
        said = {self._rank: own}
        if self._store is not None:
            self._store.set(_BEAT.format(self._rank), json.dumps(own))
            others = [rank for rank in self._seen if rank != self._rank]
            keys = [_VERDICT, *(_BEAT.format(rank) for rank in others)]  # one request, however many ranks
            verdict, *beats = (value.decode() for value in self._store.multi_get(keys))
            if verdict:
                return verdict
            said |= {rank: json.loads(beat) for rank, beat in zip(others, beats, strict=True)}
        for rank, new in said.items():
            if "left" in new:
                del self._seen[rank]
                continue
            seen = self._seen[rank]
            if new.get("tick") != seen.said.get("tick"):
                seen.alive = now
            if new.get("count") != seen.said.get("count"):
                seen.moved = now
            seen.said = new
        verdict = self._judge(now)
        if verdict and self._store is not None:
            verdict = self._store.compare_set(_VERDICT, "", verdict).decode()  # the first one counts for all
        return verdict

    def _judge(self, now: float) -> str:
        # rank 0 knows more: the others speak up only where it has not, because it is gone or does not answer itself
        limit = self._limit + (0 if self._rank == 0 else 3 * self._period)
        old = [rank for rank, seen in self._seen.items() if now - seen.moved > limit]
        silent = [rank for rank, seen in self._seen.items() if now - seen.alive > limit]
        stuck = [rank for rank in old if not self._seen[rank].said.get("waiting")]
        if stuck or silent:
            rank = (stuck or silent)[0]
            dead = now - self._seen[rank].alive > 3 * self._period
            how = ", and its process does not answer," if dead else ""
            others = self._listed("at:", (other for other in self._seen if other != rank))
            return f"rank {rank} has stood for {self._limit:g} s{how} at: {self._at(rank)}{others and '; ' + others}"
        if self._rank == 0 and len(old) == len(self._seen):
            return f"all ranks have waited for {self._limit:g} s: {self._listed('for', old)}"
        return ""

    def _at(self, rank: int) -> str:
        return str(self._seen[rank].said.get("doing", "its start"))

    def _listed(self, word: str, ranks: Iterable[int]) -> str:
        """What each rank does, those that do the same together."""
        together: dict[str, list[int]] = {}
        for rank in ranks:
            together.setdefault(self._at(rank), []).append(rank)
        told = [f"{_names(found)} {word} {at}" for at, found in together.items()]
        more = sum(len(found) for found in list(together.values())[_TOLD:])
        return "; ".join(told[:_TOLD] + ([f"{more} ranks elsewhere"] if more else []))

    def _end(self, verdict: str) -> None:
        path = self._folder / f"rank-{self._rank}.txt"
        print(f"error: stalled: {verdict}. Stacks of rank {self._rank}: {path}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        for worker in multiprocessing.active_children():  # it may be one of these that stands
            with suppress(OSError):
                os.kill(int(worker.pid or 0), _STACKS)
        threading.Thread(target=self._write_stacks, args=(path, verdict), daemon=True).start()  # the disk may hang too
        time.sleep(2 * self._period + 0.5)  # the others must still find the verdict in the store
        os._exit(exits.note(exits.LOST))

    def _write_stacks(self, path: Path, verdict: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            file.write(f"{verdict}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def _names(ranks: list[int]) -> str:
    """Ascending ranks in words: "rank 3", "ranks 0 to 5, 7"."""
    rows: list[list[int]] = []
    for rank in ranks:
        if rows and rows[-1][-1] == rank - 1:
            rows[-1].append(rank)
        else:
            rows.append([rank])
    told = [f"{row[0]} to {row[-1]}" if len(row) > 2 else ", ".join(map(str, row)) for row in rows]
    return ("ranks " if len(ranks) > 1 else "rank ") + ", ".join(told)
