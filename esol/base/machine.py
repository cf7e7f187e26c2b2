"""What there is to know and to settle of a machine before torch is loaded: cores, memory, waiting threads, bf16."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_BF16 = ("avx512_bf16", "amx_bf16")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000" in a container of two cores, "max 100000" without a quota
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h


def keep_memory() -> None:
    """Makes glibc keep freed memory for the next tensor; what the user has set stays.

    Its own way gives every block of 32 MiB and more back to the system, and a step that gets new memory for each of its
    tensors spends a quarter of its time on the kernel's handing out of pages (benchmarks/memory.py). Blocks above 256
    MiB and what is free beyond 512 MiB at the end of the heap are given back as before.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")) for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    mallopt(_MMAP_THRESHOLD, 256 << 20)
    mallopt(_TRIM_THRESHOLD, 512 << 20)


def wait_briefly() -> None:
    """Makes threads that wait leave their core to others after some microseconds; what the user has set stays.

    GNU's OpenMP reads it once, when torch is loaded. Its own way is to spin for milliseconds, which beside any other
    busy process takes the core from the very thread that is waited for; not to spin at all costs small operators twice
    their time, since a core that sleeps is slow to wake (benchmarks/beside.py).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def cores() -> int:
    """Processor cores that this process may use: those it is bound to, or fewer where its container has a quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _QUOTA.read_text().partition(" ") if _QUOTA.exists() else ("max", "", "")
    return bound if quota == "max" else max(1, min(bound, round(int(quota) / int(period))))


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies in bf16; where it does not, float32 is faster."""
    about = Path("/proc/cpuinfo")
    flags = about.read_text(errors="replace") if about.exists() else ""
    return any(flag in flags for flag in _BF16)
