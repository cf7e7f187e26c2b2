"""Ctrl-C: the first one ends a command in order, a second one at once, wherever the process is.

A thread reads what Python's own handler writes for every signal, so that a second one is noticed inside a long step or
a collective too, where no Python code runs. One press may come twice: the terminal signals the whole process group, and
torchrun, which is in it, hands SIGINT on to its ranks as well. So what comes within SAME seconds of the first counts as
the same press: long enough for a launcher, hardly noticed without one.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

LAUNCHED = {"TORCHELASTIC_RUN_ID", "CROSS_SIZE"}  # set by torchrun and accelerate, by deepspeed
SAME = 1.0 if os.environ.keys() & LAUNCHED else 0.2
GRACE = 10.0  # seconds that an interrupted command may tidy up; it may sit where no KeyboardInterrupt reaches it


class Interrupts:
    """While entered, the first SIGINT raises KeyboardInterrupt, once; then `leave(line)` must end the process.

    It is called from a thread: at a second SIGINT, and GRACE seconds after a first one that was not `saving`. Does
    nothing outside the main thread, where Python takes no signals.
    """

    saving = False
    """Whether somebody else (loop.StopSignal) takes SIGINT now and ends in order, however long a step lasts."""

    taken = False
    """Whether the first SIGINT was handed to this process's main thread."""

    def __init__(self, leave: Callable[[str], None]) -> None:
        self._leave = leave

    def __enter__(self) -> Interrupts:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            Interrupts.saving = Interrupts.taken = False
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._former_descriptor = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._former = signal.signal(signal.SIGINT, _interrupt)
            self._thread = threading.Thread(target=self._watch, name="interrupts", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._main or Interrupts.taken:  # a launcher's copy, or a second one, may still come
            return
        signal.signal(signal.SIGINT, self._former)
        signal.set_wakeup_fd(self._former_descriptor)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _watch(self) -> None:
        first: float | None = None
        left: float | None = None
        while True:
            if not select.select([self._read], [], [], left)[0]:
                return self._leave("interrupted")
            numbers = os.read(self._read, 4096)
            if not numbers:
                return None
            now = time.monotonic()
            if signal.SIGINT in numbers:
                if first is None:
                    first, left = now, None if Interrupts.saving else GRACE
                elif now - first > SAME:
                    return self._leave("interrupted again: ended at once")
            if left is not None and first is not None:
                left = max(0.0, first + GRACE - now)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not Interrupts.taken:
        Interrupts.taken = True
        raise KeyboardInterrupt


def end_children() -> None:
    """Kills the data workers, which wait for orders of a process that is about to be gone."""
    for child in multiprocessing.active_children():
        child.kill()


os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # its signals are not its parent's
