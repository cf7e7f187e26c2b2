"""What there is to know of a machine before torch is loaded, and how its threads wait for each other."""

from __future__ import annotations

import os
from pathlib import Path

_BF16 = ("avx512_bf16", "amx_bf16")


def wait_briefly() -> None:
    """Makes threads that wait leave their core to others after some microseconds; what the user has set stays.

    GNU's OpenMP reads it once, when torch is loaded. Its own way is to spin for milliseconds, which beside any other
    busy process takes the core from the very thread that is waited for; not to spin at all costs small operators twice
    their time, since a core that sleeps is slow to wake (benchmarks/beside.py).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies in bf16; where it does not, float32 is faster."""
    about = Path("/proc/cpuinfo")
    flags = about.read_text(errors="replace") if about.exists() else ""
    return any(flag in flags for flag in _BF16)
