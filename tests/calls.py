"""Calls between the rows of the house (test_walls.ROWS) in one short run of every stage and an export: how many go up.

python tests/calls.py

A call goes up where a lower row's function calls a function of a higher row. It is declared where the lower row itself,
or one below it, defines the method that the higher row overrides, as Stage and Task do: then the lower row knows what
it calls without knowing who answers.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "end_to_end")]

from test_walls import row_of  # noqa: E402

Call = tuple[str, str, str]  # caller's function, callee's module, callee's name


class Trace:
    """Notes every call between two modules of esol, once a pair of functions."""

    def __init__(self) -> None:
        self.calls: dict[Call, tuple[str, bool]] = {}  # call -> ("up" | "down" | "level", declared)

    def __enter__(self) -> Trace:
        threading.setprofile(self._event)
        sys.setprofile(self._event)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _event(self, frame: FrameType, event: str, arg: object) -> None:
        callee = frame.f_globals.get("__name__", "")
        if event != "call" or not callee.startswith("esol") or frame.f_code.co_name == "<module>":
            return
        back = frame.f_back  # torch's frames in between do not count: who called is the nearest of ours
        while back and not back.f_globals.get("__name__", "").startswith("esol"):
            back = back.f_back
        if back is None or (caller := back.f_globals["__name__"]) == callee or back.f_code.co_name == "<module>":
            return
        here, there = row_of(caller), row_of(callee)
        way = "up" if there > here else "down" if there < here else "level"
        declared = way == "up" and _declared(frame, here)
        # a method that many stages override is one call: the caller says its name once
        who = "" if declared else callee
        self.calls[f"{caller}.{back.f_code.co_qualname}", who, frame.f_code.co_name] = way, declared


def _declared(frame: FrameType, row: int) -> bool:
    """Whether a class that stands in the caller's row or below has the method that was called."""
    owner: Any = frame.f_locals.get("self", frame.f_locals.get("cls"))
    kinds = (owner if isinstance(owner, type) else type(owner)).__mro__
    name = frame.f_code.co_name
    return any(
        name in vars(kind) and (not kind.__module__.startswith("esol") or row_of(kind.__module__) <= row)
        for kind in kinds[1:]
    )


def traced(folder: Path) -> Trace:
    """A run of all stages on 32 scenes of 64 pixels, and its export, in this process."""
    import tiny

    from esol.cli import main
    from shards.synthetic import synthetic_source
    from shards.writer import create

    create(synthetic_source(24, 8, 64, seed=0, classes=3), str(folder / "shards"), samples_per_shard=8)
    config = folder / "config.yaml"
    config.write_text(f"{tiny.TINY}\nrun_dir: {folder / 'run'}\n")
    overrides = [f"data.root={folder / 'shards'}", "data.workers=0", "tracking.uri=none"]
    trace = Trace()
    for command in (
        ["run", "--config", str(config), *(part for pair in overrides for part in ("--set", pair))],
        ["export", str(folder / "run"), "--out", str(folder / "model")],
    ):
        sys.argv = ["esol", *command]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), trace:
            status = main()
        if status:
            sys.exit(f"esol {command[0]} ended with {status}:\n{printed.getvalue()}")
    return trace


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        calls = traced(Path(scratch)).calls
    up = {call: declared for call, (way, declared) in calls.items() if way == "up"}
    print(f"| calls between modules | {len(calls)} |\n|---|---|")
    for way in ("down", "level", "up"):
        print(f"| {way} | {sum(w == way for w, _ in calls.values())} |")
    print(f"| up, through a method that the lower row declares | {sum(up.values())} |")
    print(f"| up, otherwise | {len(up) - sum(up.values())} |\n")
    for (caller, module, name), declared in sorted(up.items(), key=lambda item: (item[1], item[0])):
        print(f"{'declared' if declared else 'other'}: {caller} -> {f'{module}.' if module else ''}{name}")
