"""How a program ends: codes, one line for what the user did, and Ctrl-C at every moment."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from esol import cli, train
from esol.base import exits
from esol.base.errors import DataError, LostRankError
from esol.pipeline import job

PROGRAM = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from esol.base import exits, interrupts
from esol.base.interrupts import Interrupts
interrupts.GRACE = 1.0

def say(text):
    print(text, flush=True)

def tidies():
    try:
        say("up")
        time.sleep(60)
    finally:
        say("tidied")
    return 0

def saves():
    multiprocessing.Process(target=time.sleep, args=(300,)).start()  # as data workers, which nobody starts anew
    Interrupts.saving = True
    signal.signal(signal.SIGINT, lambda *_: os.write(1, b"saving\\n"))  # print may be at work
    say("up")
    while True:
        time.sleep(60)

def swallows():  # as a callback from C does, whose exceptions go nowhere
    told = False
    while True:
        try:
            if not told:
                told = True
                say("up")
            time.sleep(60)
        except KeyboardInterrupt:
            pass

def launched():
    interrupts.SAME = 30.0
    return tidies()

sys.exit(exits.entry(globals()[sys.argv[1]]))
"""


@pytest.mark.parametrize(
    ("how", "presses", "printed", "said"),
    [
        ("tidies", 1, {"tidied"}, "interrupted: run the command again"),
        ("saves", 2, set(), "interrupted again: ended at once"),
        ("swallows", 1, set(), "interrupted"),  # after the time to tidy up
        ("launched", 2, {"tidied"}, "interrupted: run the command again"),  # torchrun hands on what the terminal sent
    ],
)
def test_ctrl_c_is_one_line_and_130(how: str, presses: int, printed: set[str], said: str, tmp_path: Path) -> None:
    env = {"ESOL_EXIT_FILE": str(tmp_path / "code"), "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    for press in range(presses):
        if press and how == "saves":
            assert process.stdout.readline() == "saving\n"
            time.sleep(0.5)  # no longer the same press
        process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)  # until the last child has closed them
    found = set(output.split()) - {"saving"}
    assert (process.returncode, found, errors.strip()) == (exits.INTERRUPTED, printed, said)
    assert (tmp_path / "code").read_text() == "130\n"


def _raises(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


def test_every_end_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "code"
    monkeypatch.setenv("ESOL_EXIT_FILE", str(file))
    before = signal.getsignal(signal.SIGINT)
    ends = {0: lambda: 0, exits.STOPPED: lambda: exits.STOPPED, exits.MEND: _raises(DataError("bad"))}
    ends[exits.LOST] = _raises(LostRankError("gone"))
    for code, command in ends.items():
        assert exits.entry(command) == code
        assert file.read_text() == f"{code}\n"
    assert capsys.readouterr().err == "error: bad\nerror: gone\n"
    with pytest.raises(ZeroDivisionError):
        exits.entry(_raises(ZeroDivisionError()))
    assert file.read_text() == "1\n"
    for arguments, code in ((["nonsense"], 2), (["--version"], 0), (["run", "--config", str(tmp_path / "no.yaml")], 2)):
        monkeypatch.setattr(sys, "argv", ["esol", *arguments])
        file.unlink()
        try:
            found = cli.main()
        except SystemExit as leaving:
            found = leaving.code
        assert found == code
        assert file.read_text() == f"{code}\n"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("name", [None, "somewhere/else"])
def test_a_disk_that_refuses_is_named(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Writing to an open file fails without a name: then it is the run's folder that stands on that disk."""
    config = tmp_path / "config.yaml"
    config.write_text(f"run_dir: {tmp_path / 'run'}\ndata: {{root: {tmp_path}}}")
    error = OSError(errno.EROFS, os.strerror(errno.EROFS), name)
    monkeypatch.setattr(job, "run_job", lambda *_: _raises(error)())
    parser = argparse.ArgumentParser(add_help=False)
    train.add_arguments(parser)
    assert train.run(parser.parse_args(["--config", str(config)])) == exits.MEND
    said = f"error: {name or tmp_path / 'run'}: Read-only file system; when that is mended, go on with --resume\n"
    assert capsys.readouterr().err == said
