"""Real processes as the ranks of one job over gloo: started quickly, bounded, their output kept apart."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")  # one process imports torch, the ranks are forked from it
_CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "esol.training.loop", "esol.training.checkpoint", "esol.engines.accelerate_engine"]
)


@dataclass
class Outcome:
    """How one rank ended: exit code (negative: signal), what it printed, and what its function returned."""

    exitcode: int | None
    output: str
    result: Any


def run_ranks(
    count: int, function: Callable[..., Any], *args: Any, bound: float = 60, env: dict[str, str] | None = None
) -> list[Outcome]:
    """Calls function(*args), importable by name, in `count` processes with torchrun's environment variables.

    A process that runs longer than `bound` seconds is killed, and AssertionError shows the output of all.
    """
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        processes = []
        for rank in range(count):
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if env is None else env
            process = _CONTEXT.Process(target=_rank, args=(Path(folder) / str(rank), own, function, args))
            process.start()
            processes.append(process)
        end = time.monotonic() + bound
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in late:
            processes[rank].kill()
            processes[rank].join()
        outcomes = [_outcome(Path(folder) / str(rank), process.exitcode) for rank, process in enumerate(processes)]
    text = "\n".join(f"--- rank {rank}: {o.exitcode}\n{o.output}" for rank, o in enumerate(outcomes))
    assert not late, f"ranks {late} ran longer than {bound} s\n{text}"
    return outcomes


def _rank(folder: Path, env: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    folder.mkdir()
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(env)
    try:
        result = function(*args)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    (folder / "result").write_bytes(pickle.dumps(result))
    sys.stdout.flush()


def _outcome(folder: Path, exitcode: int | None) -> Outcome:
    output, result = folder / "output", folder / "result"
    return Outcome(
        exitcode,
        output.read_text(errors="replace") if output.exists() else "",
        pickle.loads(result.read_bytes()) if result.exists() else None,
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
