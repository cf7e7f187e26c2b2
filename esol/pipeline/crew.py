"""Several photos at a time through a stage: what they come to in order, within a bounded memory."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

ROOM = 2**22  # pixels of the photos that are worked on at once
GPU_THREADS = 4  # while one waits for the GPU, others read, score and pack
TOGETHER = 4  # photos that a thread gives a GPU at once
AHEAD = 2  # pieces of work that each thread has before it
Item = TypeVar("Item")
Found = TypeVar("Found")


class Crew:
    """The threads of this process, each with a photo of its own.

    Reading, scoring, packing and the small operators of a walk or a CRF leave a second thread idle that is given to
    them; another photo does not. What a photo comes to then does not depend on how many threads there are. One that is
    too large to stand beside others has all threads to itself.
    """

    def __init__(self, device: torch.device) -> None:
        self._computing = torch.get_num_threads()
        self.threads = self._computing if device.type == "cpu" else min(GPU_THREADS, os.cpu_count() or 1)
        self._free, self._changed = ROOM, threading.Condition()

    def map(self, work: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
        """Yields work(item) of every item, in their order; what a piece of work raises is raised in its place.

        Where the caller stops listening, what is under way is finished, and nothing new begun.
        """
        if self.threads == 1:
            yield from map(work, items)
            return
        pool = self.pool()
        waiting: deque[Future[Found]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > AHEAD * self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(self._computing)  # a thread's own number is the next new thread's as well

    def pool(self) -> ThreadPoolExecutor:
        """New threads of this number, each of which computes by itself."""
        return ThreadPoolExecutor(self.threads, "photos", torch.set_num_threads, (1,))

    @contextmanager
    def room(self, *sizes: tuple[int, int]) -> Iterator[None]:
        """Inside, a piece of work is at photos of these heights and widths; it waits until they find room."""
        pixels = sum(height * width for height, width in sizes)
        alone = pixels * self.threads > ROOM
        taken = ROOM if alone else pixels
        with self._changed:
            self._changed.wait_for(lambda: self._free >= taken)
            self._free -= taken
        try:
            if alone and self.threads > 1:
                torch.set_num_threads(self._computing)
            yield
        finally:
            if alone and self.threads > 1:
                torch.set_num_threads(1)
            with self._changed:
                self._free += taken
                self._changed.notify_all()
