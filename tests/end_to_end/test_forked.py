"""What the other tests start by forking is a process as `python PROGRAM` starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest

PROGRAM = """
import atexit, json, multiprocessing, os, signal, sys, threading
seen = {
    "argv": sys.argv, "path": sys.path, "main": [__name__, __file__],
    "cwd": os.getcwd(), "env": dict(os.environ), "in": sys.stdin.read(),
    "files": sorted(os.listdir("/dev/fd"))[:4],
    "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
    "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])], "group": os.getpgid(0),
    "threads": threading.active_count(), "parent": multiprocessing.parent_process(), "out": sys.stdout.isatty(),
    "esol": [name for name in sys.modules if name.split(".")[0] in ("esol", "mlflow", "timm", "deepspeed")],
}
print(json.dumps(seen))
threading.Timer(0.3, lambda: print("a thread", file=sys.stderr)).start()  # behind what is said at the end
atexit.register(print, "the end")
if sys.argv[1] == "stand":
    threading.Event().wait()
elif sys.argv[1] == "SIGKILL":
    os.kill(os.getpid(), signal.SIGKILL)
elif sys.argv[1] == "raise":
    raise ValueError("what it said")
sys.exit({"3": 3, "words": "said at the end"}.get(sys.argv[1]))
"""


def test_a_forked_program_is_given_what_a_started_one_is_and_ends_like_it(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    env = {**os.environ, "OWN": "value", "PYTHONPATH": os.pathsep.join((str(tmp_path / "a"), str(tmp_path / "b")))}
    for word in ("done", "3", "words", "raise", "SIGKILL"):
        ours = forked.run(program, word, cwd=tmp_path, env=env, timeout=60)
        command = [sys.executable, str(program), word]
        how = {"cwd": tmp_path, "env": env, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        started = subprocess.run(command, **how, timeout=60)
        assert (ours.args, ours.returncode) == (started.args, started.returncode)
        if word == "SIGKILL":
            continue  # nothing was written out
        own, theirs = (json.loads(done.stdout.splitlines()[0]) for done in (ours, started))
        assert own == theirs
        assert ours.stdout.splitlines()[1:] == started.stdout.splitlines()[1:] == ["the end"]
        assert ours.stderr.splitlines()[-2:] == started.stderr.splitlines()[-2:]
    with pytest.raises(subprocess.TimeoutExpired) as late:
        forked.run(program, "stand", cwd=tmp_path, env=env, timeout=2)
    assert "a thread" in str(late.value.stderr)
