"""Python's wall clock, moved by what a file says: for drills: a Python whose PYTHONPATH has this folder imports it.

The file that ESOL_DRILL_CLOCK names holds seconds, and may change at any moment. time.time, time.time_ns and what
imports them follow; C code does not, nor do clocks that are not to jump (time.monotonic).
"""

from __future__ import annotations

import os
import time

_PLACE, _NOW = os.environ.get("ESOL_DRILL_CLOCK"), time.time


def _moved() -> float:
    assert _PLACE
    with open(_PLACE) as file:
        return _NOW() + float(file.read() or 0)


if _PLACE:
    time.time = _moved
    time.time_ns = lambda: int(_moved() * 1e9)
