"""Progress of anything that takes more than a few seconds: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from esol.base.strangers import printable

PLAIN_SECONDS = 10.0  # between two plain lines at most; every tenth of the work has one as well
Advance = Callable[[int, str], None]


@contextmanager
def progress(label: str, total: int, unit: str, visible: bool) -> Iterator[Advance]:
    """Yields advance(done, note): the count so far and a short text; does nothing where not visible (other ranks)."""
    if not visible:
        yield lambda done, note: None
    elif sys.stderr.isatty():
        yield from _bar(label, total, unit)
    else:
        yield from _lines(label, total, unit)


def _bar(label: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, note="")
        yield lambda done, note: bar.update(task, completed=done, note=printable(note))


def _lines(label: str, total: int, unit: str) -> Iterator[Advance]:
    begun = time.monotonic()
    last, tenths = begun, 0

    def advance(done: int, note: str) -> None:
        nonlocal last, tenths
        now = time.monotonic()
        if now - last < PLAIN_SECONDS and done * 10 // total == tenths:
            return
        last, tenths = now, done * 10 // total
        left = f", {(now - begun) / done * (total - done):.0f} s left" if done else ""
        print(
            f"{label}: {done}/{total} {unit}, {now - begun:.0f} s{left}  {printable(note)}", file=sys.stderr, flush=True
        )

    yield advance
