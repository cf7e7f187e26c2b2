"""Tracking: metrics.jsonl in the run directory, which a second process carries into MLflow.

The training process only appends lines to a file. `python -m esol.tracking.follower` follows the file and makes every
MLflow call; so MLflow (seconds of import and migrations, servers that die or never answer) can neither stop nor slow
training, memory stays bounded, a server that comes back gets what it missed, and what is left is sent by `esol replay`.

Records, one JSON object a line, all with "time" (seconds since the epoch):
{"stage", "step", "metrics": {name: value}}; {"event": "run", "params", "tags", "identity", "data"}; {"event": "begin",
"stage", "resume"}; {"event": "end", "stage" (null: the run), "status"}; {"event": "results", "stage", "values",
"words"}; {"event": "headline", "stage" (null: the run), "values"}; {"event": "artifact", "stage", "path", "folder"}
with a path relative to the run directory; {"event": "model", "path", "example"}, a photo in base64. After a resume,
steps past the checkpoint stand there twice; the later line counts.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from esol.base.schema import fingerprint, finite
from esol.base.strangers import without_following
from esol.config import Config

_LOG = logging.getLogger(__name__)
JSONL, MLFLOW_LOG = "metrics.jsonl", "mlflow.log"  # in the run directory


class Tracker:
    """Notes what a run does, on the main rank; on the others every call does nothing. Used as a context manager.

    index_hash: identity of the data; resume: interrupted stages go on in their MLflow runs; flush: seconds that the end
    of the run waits for MLflow at most; profile: what the data hold, for people. No call raises because of MLflow or a
    full disk.
    """

    def __init__(
        self,
        config: Config,
        is_main: bool,
        index_hash: str,
        world_size: int,
        resume: bool = False,
        flush: float = 30.0,
        profile: dict[str, Any] | None = None,
    ) -> None:
        self._config, self._active, self._resume, self._flush = config, is_main, resume, flush
        self._tags = {"data_index": index_hash, "world_size": str(world_size)}
        self._data = {"digest": index_hash, "source": config.data.root, "profile": profile or {}}
        self._run_dir = Path(config.run_dir)
        self._stage: str | None = None
        self._said: dict[tuple[str | None, str], float] = {}
        self._status = "FINISHED"  # of the last stage
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Tracker:
        if not self._active:
            return self
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._file = open(self._run_dir / JSONL, "ab+", opener=without_following)
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":  # a killed process left half a line
                self._file.write(b"\n")
        params = {key: str(value) for key, value in _flat(asdict(self._config))}
        tags = {**self._tags, **_versions(), **_git()}
        self._write(
            {"event": "run", "params": params, "tags": tags, "identity": fingerprint(self._config), "data": self._data}
        )
        if self._config.tracking.uri != "none":
            self._process = _start_follower(self._run_dir, self._config.tracking.uri, self._config.tracking.experiment)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._active:
            return
        self._write({"event": "end", "stage": None, "status": _status(error) if error else self._status})
        self._file.close()
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write(b"end\n")
            process.stdin.close()
        try:
            process.wait(self._flush)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # Ctrl-C: nobody wants to wait any longer
            process.kill()
            process.wait()
        if process.returncode:
            text = f"MLflow did not take everything of this run (see {self._run_dir / MLFLOW_LOG}); nothing is lost. "
            text += f"Send the rest when it answers again: esol replay {self._run_dir}"
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is noted inside belongs to this stage's child run."""
        self._stage = name
        self._write({"event": "begin", "stage": name, "resume": self._resume})
        self._status = "FINISHED"
        try:
            yield
        except BaseException as error:
            self._status = _status(error)
            raise
        finally:
            self._write({"event": "end", "stage": name, "status": self._status})
            self._stage = None

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Values of the running stage after optimizer step `step` (or at another whole-number position of a curve)."""
        self._write({"stage": self._stage, "step": step, "metrics": _finite(values)})

    def results(self, values: dict[str, Any]) -> None:
        """What the running stage came to. Words become tags, at the parent run as <stage>/<name> as well."""
        words = {name: value for name, value in values.items() if isinstance(value, str)}
        numbers = _finite({name: value for name, value in values.items() if name not in words})
        self._write({"event": "results", "stage": self._stage, "values": numbers, "words": words})

    def headline(self, values: dict[str, float], stage: str | None = None) -> None:
        """The few numbers by which runs are compared, or the stages of one; of them those that have changed."""
        new = {name: value for name, value in values.items() if self._said.get((stage, name)) != value}
        self._said |= {(stage, name): value for name, value in new.items()}
        if new:
            self._write({"event": "headline", "stage": stage, "values": _finite(new)})

    def model(self, path: Path, example: bytes) -> None:
        """A model file inside the run directory, and a photo as an example of what it takes."""
        if self._active:
            relative = str(Path(path).resolve().relative_to(self._run_dir.resolve()))
            photo = base64.b64encode(example).decode()
            self._write({"event": "model", "stage": None, "path": relative, "example": photo})

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file inside the run directory, put into `folder` of the running stage's artifacts."""
        if self._active:
            relative = str(Path(path).resolve().relative_to(self._run_dir.resolve()))
            self._write({"event": "artifact", "stage": self._stage, "path": relative, "folder": folder})

    def picture(self, path: Path) -> None:
        """A picture file inside the run directory; the parent run has it as well."""
        self.artifact(path, "pictures")

    def _write(self, record: dict[str, Any]) -> None:
        if not self._active:
            return
        try:
            self._file.write(json.dumps({"time": round(time.time(), 3), **record}).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            _LOG.warning("cannot write %s, this record is lost: %s", self._run_dir / JSONL, error)


def _start_follower(run_dir: Path, uri: str, experiment: str) -> subprocess.Popen[bytes] | None:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    try:
        with open(run_dir / MLFLOW_LOG, "ab", opener=without_following) as log:
            return subprocess.Popen(
                [sys.executable, "-m", "esol.tracking.follower", str(run_dir.resolve()), uri, experiment],
                stdin=subprocess.PIPE,
                stdout=2,  # its warnings are the user's to see; MLflow's chatter goes into the log
                stderr=log,
                start_new_session=True,  # a signal to the job must not cut it off
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
    except OSError as error:
        _LOG.warning("no MLflow tracking, %s has everything: %s", run_dir / JSONL, error)
        return None


def _status(error: BaseException) -> str:
    """MLflow's run status after leaving with an exception: KILLED where the user or a scheduler stopped the run."""
    return "KILLED" if type(error).__name__ in ("Stopped", "KeyboardInterrupt") else "FAILED"


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    found: dict[str, float | None] = finite({name: float(value) for name, value in values.items()})
    return found


def _flat(tree: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{where}.{key}" if where else key
        if isinstance(value, dict):
            yield from _flat(value, path)
        else:
            yield path, value


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("esol", "torch", "torchvision", "accelerate", "numpy", "webdataset", "mlflow"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return {f"version.{name}": value for name, value in found.items()}


def _git() -> dict[str, str]:
    """Commit of the source tree, "-dirty" where tracked files were changed; empty where esol does not run from one."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # else it is installed inside somebody else's repository
        return {"git_commit": git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")}
    except (OSError, subprocess.SubprocessError):
        return {}
