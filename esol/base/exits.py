"""Exit codes of a run, and how they get past launchers, which replace every code by 1.

0 done; 1 a bug, or damage that was found; the others stand below. A launcher that was started by launch/entrypoint.sh
has ESOL_EXIT_FILE in its environment: the first process of the machine leaves its code there.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from esol.base.errors import EsolError, LostRankError
from esol.base.interrupts import Interrupts, end_children
from esol.base.machine import keep_memory, wait_briefly
from esol.base.strangers import lines

PARENT = os.getppid()
"""Who started this process, noted early: a launcher may be gone by the time that torch is imported."""

NOTED = "ESOL_EXIT_FILE"
"""The environment variable with the file that a process leaves its code in."""

MEND = 2
"""Something the user can mend, said in one line: starting again without that is of no use."""

LOST = 70
"""A rank stood still or was lost (EX_SOFTWARE of sysexits.h): go on with --resume."""

STOPPED = 75
"""Stopped by a signal, all saved (EX_TEMPFAIL, "try again later"): go on with --resume."""

INTERRUPTED = 130
"""Ended by Ctrl-C (128 + SIGINT, as shells say it); a run that was training has saved first."""


def entry(command: Callable[[], int], again: str = "run the command again") -> int:
    """Calls what a program does and returns its exit code, which is noted however it ends.

    An EsolError and Ctrl-C become one line, of the main rank where there are several; `again` says what to do after
    Ctrl-C. What else is raised is a bug, and goes on.
    """
    code = 1
    wait_briefly()  # before torch is there
    keep_memory()
    with Interrupts(_leave):
        try:
            code = command()
        except EsolError as error:
            print(f"error: {lines(str(error))}", file=sys.stderr, flush=True)
            code = LOST if isinstance(error, LostRankError) else MEND
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a launcher's copy must not kill what is already leaving
            _say(f"interrupted: {again}")
            code = INTERRUPTED
        except SystemExit as leaving:  # argparse: 0 after --help, else 2
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
            raise
        finally:
            note(code)
    return code


def _say(line: str) -> None:
    """Past Python's buffers, which the main thread may hold."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, f"{line}\n".encode())


def _leave(line: str) -> None:
    _say(line)
    end_children()
    os._exit(note(INTERRUPTED))


def note(code: int) -> int:
    """The code, left for launch/entrypoint.sh if that waits for it."""
    path = os.environ.get(NOTED)
    if path and os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):
            Path(path).write_text(f"{code}\n")
    return code
