"""Runs Python programs as `python PROGRAM ARGUMENTS` does, each a process of its own that has its libraries already.

As a program it is the process that they are forked from, where other people's libraries are loaded, and nothing of
esol: what esol notes when it is imported (its parent, its environment) is each process's own. A forked process differs
from a started one in this: hashes of strings are alike in all that one server forks; what those libraries read from the
environment while they are imported is what the server was given; and at the end, behind its threads and what it has
registered for then, modules are not taken apart, which takes a second and a half of a processor.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

LIBRARIES = ("torch._dynamo", "torchvision.io", "accelerate", "webdataset", "safetensors.torch", "rich.table")
# not timm, which reads HF_HOME when it is imported, nor mlflow, nor deepspeed, which chooses a device


def run(
    program: Path, *arguments: str, cwd: Path, env: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """What subprocess.run gives for [sys.executable, program, *arguments], its output captured; bounded like it.

    It waits for the program, and not for what that has left running.
    """
    command = [str(program), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("out", "err")]
        server = _server()
        assert server.stdin is not None
        request = {"command": command, "cwd": str(cwd), "env": env, "said": [str(path) for path in said]}
        server.stdin.write(json.dumps(request).encode() + b"\n")
        pid, late = int(_answer(server, 120)), False  # the first waits for the libraries
        try:
            code = int(_answer(server, timeout))
        except TimeoutError:
            late = True
            os.kill(pid, signal.SIGKILL)
            code = int(_answer(server, 60))
        out, err = (path.read_text(errors="replace") for path in said)
    if late:
        raise subprocess.TimeoutExpired([sys.executable, *command], timeout, out, err)
    return subprocess.CompletedProcess([sys.executable, *command], code, out, err)


@cache
def _server() -> subprocess.Popen[bytes]:
    """One for each process of tests, which ends it."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith(("ACCELERATE", "OMP", "HF_"))}
    env["GOMP_SPINCOUNT"] = "1000"  # as esol sets it before torch is imported
    server = subprocess.Popen(
        [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[bytes]) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait(60)


def _answer(server: subprocess.Popen[bytes], timeout: float) -> bytes:
    assert server.stdout is not None
    if not select.select([server.stdout], [], [], timeout)[0]:
        raise TimeoutError(f"no answer of the process that others are forked from in {timeout} s")
    line = server.stdout.readline()
    assert line, f"the process that others are forked from has ended with {server.wait()}"
    return line


def _serve() -> dict[str, Any] | None:
    """Forks a process for every request and returns in it; in the server itself when there are no more, with None."""
    while request := sys.stdin.readline():
        pid = os.fork()
        if not pid:
            own: dict[str, Any] = json.loads(request)
            return own
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def _become(command: list[str], cwd: str, env: dict[str, str], said: list[str]) -> None:
    """Takes on what a new process would have been given, runs the program as __main__, and ends with its code."""
    for target, path in enumerate((os.devnull, *said)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, target)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = command
    added = env["PYTHONPATH"].split(os.pathsep) if env.get("PYTHONPATH") else []
    sys.path[:1] = [str(Path(command[0]).parent), *added]
    sys.modules["numpy"].random.seed()
    code: object = None
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(int(code or 0) & 0xFF)


if __name__ == "__main__":
    for library in LIBRARIES:
        import_module(library)
    assert threading.active_count() == 1, "a process with threads cannot be forked"
    if (own := _serve()) is not None:
        _become(**own)
    os._exit(0)
