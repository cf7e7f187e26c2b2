"""A clock of the kernel's that kills this process unless it is set again in time, wherever the process stands."""

from __future__ import annotations

import ctypes
import signal
import sys
import time

_LINUX = sys.platform == "linux"


class _Event(ctypes.Structure):
    """sigevent of <signal.h>: send a signal (SIGEV_SIGNAL is 0)."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("how", ctypes.c_int),
        ("rest", ctypes.c_int * 12),
    )


class _Setting(ctypes.Structure):
    """itimerspec of <time.h>: the interval of repeats, and the time to the first."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("every", "every_ns", "seconds", "nanoseconds"))


class Deadline:
    """SIGKILL for this process that many seconds after the last `put_off`; none before the first, none after `lift`.

    It strikes a process that was stopped (SIGSTOP), and one whose interpreter a library holds, in which no thread of
    Python's runs any more and no signal has a handler. On other systems than Linux it never strikes.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._timer = seconds, ctypes.c_void_p()
        if _LINUX:
            self._libc = ctypes.CDLL(None, use_errno=True)
            if not hasattr(self._libc, "timer_create"):  # before glibc 2.34
                self._libc = ctypes.CDLL("librt.so.1", use_errno=True)
            event = _Event(None, signal.SIGKILL, 0)
            self._check(self._libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)))

    def put_off(self) -> None:
        """The seconds begin anew."""
        if _LINUX:
            setting = _Setting(0, 0, int(self._seconds), int(self._seconds % 1 * 1e9))
            self._check(self._libc.timer_settime(self._timer, 0, ctypes.byref(setting), None))

    def lift(self) -> None:
        """Nothing strikes any more, for good."""
        if _LINUX:
            self._check(self._libc.timer_delete(self._timer))

    def _check(self, code: int) -> None:
        if code:
            raise OSError(ctypes.get_errno(), "a timer of the kernel")
