"""Exit codes of a run, and how they get past launchers, which replace every code by 1.

0 done; 1 a bug; the others stand below. A launcher that was started by launch/entrypoint.sh has ESOL_EXIT_FILE in its
environment: the first process of the machine leaves its code there.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PARENT = os.getppid()
"""Who started this process, noted early: a launcher may be gone by the time that torch is imported."""

MEND = 2
"""Something the user can mend, said in one line: starting again without that is of no use."""

LOST = 70
"""A rank stood still or was lost (EX_SOFTWARE of sysexits.h): go on with --resume."""

STOPPED = 75
"""Stopped by a signal, all saved (EX_TEMPFAIL, "try again later"): go on with --resume."""


def note(code: int) -> int:
    """The code, left for launch/entrypoint.sh if that waits for it."""
    path = os.environ.get("ESOL_EXIT_FILE")
    if path and os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):
            Path(path).write_text(f"{code}\n")
    return code
