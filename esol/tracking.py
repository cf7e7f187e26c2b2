"""Tracking: metrics.jsonl in the run directory, and a second process that carries it into MLflow.

The training process only appends lines to a file. `python -m esol.tracking` follows the file and makes every MLflow
call; so MLflow (seconds of import and migrations, servers that die or never answer) can neither stop nor slow training,
memory stays bounded, a server that comes back gets what it missed, and what is left is sent by `esol replay`.

Records, one JSON object a line, all with "time" (seconds since the epoch):
{"stage", "step", "metrics": {name: value}}; {"event": "run", "params", "tags", "identity"}; {"event": "begin", "stage",
"resume"}; {"event": "end", "stage" (null: the run), "status"}; {"event": "results", "stage", "values", "words"};
{"event": "artifact", "stage", "path", "folder"} with a path relative to the run directory. After a resume, steps past
the checkpoint stand there twice; the later line counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import re
import select
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import yaml

from esol.config import Config
from esol.errors import EsolError
from esol.files import atomic_write, hold
from esol.schema import fingerprint, finite

_LOG = logging.getLogger(__name__)
_JSONL, _STATE, _MLFLOW_LOG = "metrics.jsonl", "mlflow.json", "mlflow.log"
_PERIOD = 5.0  # seconds between two looks at the file
_BESIDE = "beside the runs"  # the default store, wherever the runs are moved
_NAME, _PARAM, _TAG = 250, 6000, 8000  # MLflow's limits, in characters
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "MALFORMED_REQUEST")


class Tracker:
    """Notes what a run does, on the main rank; on the others every call does nothing. Used as a context manager.

    index_hash: identity of the data; resume: interrupted stages go on in their MLflow runs; flush: seconds that the end
    of the run waits for MLflow at most. No call raises because of MLflow or a full disk.
    """

    def __init__(
        self,
        config: Config,
        is_main: bool,
        index_hash: str,
        world_size: int,
        resume: bool = False,
        flush: float = 30.0,
    ) -> None:
        self._config, self._active, self._resume, self._flush = config, is_main, resume, flush
        self._tags = {"data_index": index_hash, "world_size": str(world_size)}
        self._run_dir = Path(config.run_dir)
        self._stage: str | None = None
        self._status = "FINISHED"  # of the last stage
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Tracker:
        if not self._active:
            return self
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._file = open(self._run_dir / _JSONL, "ab+")
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":  # a killed process left half a line
                self._file.write(b"\n")
        params = {key: str(value) for key, value in _flat(asdict(self._config))}
        tags = {**self._tags, **_versions(), **_git()}
        self._write({"event": "run", "params": params, "tags": tags, "identity": fingerprint(self._config)})
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
        except (
            subprocess.TimeoutExpired,
            KeyboardInterrupt,
        ):  # Ctrl-C: nobody wants to wait any longer
            process.kill()
            process.wait()
        if process.returncode:
            text = f"MLflow did not take everything of this run (see {self._run_dir / _MLFLOW_LOG}); nothing is lost. "
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
        """What the running stage came to; shown at the parent run as <stage>/<name> as well. Words become tags."""
        words = {name: value for name, value in values.items() if isinstance(value, str)}
        numbers = _finite({name: value for name, value in values.items() if name not in words})
        self._write({"event": "results", "stage": self._stage, "values": numbers, "words": words})

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file inside the run directory, put into `folder` of the running stage's artifacts."""
        if self._active:
            relative = str(Path(path).resolve().relative_to(self._run_dir.resolve()))
            self._write({"event": "artifact", "stage": self._stage, "path": relative, "folder": folder})

    def picture(self, path: Path) -> None:
        """A picture file inside the run directory."""
        self.artifact(path, "pictures")

    def _write(self, record: dict[str, Any]) -> None:
        if not self._active:
            return
        try:
            self._file.write(json.dumps({"time": round(time.time(), 3), **record}).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            _LOG.warning("cannot write %s, this record is lost: %s", self._run_dir / _JSONL, error)


def replay(run_dir: Path, uri: str = "") -> int:
    """Sends what MLflow has not got yet of a run directory; uri "" is the run's own. Returns what it refused.

    EsolError where MLflow cannot be reached; what has been sent by then is not sent again.
    """
    if not (run_dir / _JSONL).is_file():
        raise EsolError(f"{run_dir} holds no {_JSONL}: give the run_dir of a run")
    experiment = "esol"
    with contextlib.suppress(OSError, KeyError, TypeError, yaml.YAMLError):
        settings = yaml.safe_load((run_dir / "resolved.yaml").read_text())["tracking"]
        experiment, uri = settings["experiment"], uri or settings["uri"]
    follower = _Follower(run_dir, "" if uri == "none" else uri, experiment)
    try:
        sent = follower.send()
    except Exception as error:
        raise EsolError(f"MLflow at {follower.uri} failed, try again: {_first_line(error)}") from error
    print(f"sent {sent} records of {run_dir} to {follower.uri}")
    if follower.refused:
        print(f"MLflow refused {follower.refused} more for good; {run_dir / _JSONL} has them", file=sys.stderr)
    return follower.refused


def save_mlflow_model(folder: Path, weights: Path) -> None:
    """Writes a python_function model that `mlflow models serve` serves without this project being installed.

    weights: a file that segmenter.load_model reads. The code goes along, requirements are what is installed here.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import AnyType

    root = Path(__file__).resolve().parents[1]
    needed = ("mlflow", "numpy", "pandas", "pillow", "pyyaml", "rich", "safetensors", "timm", "torch", "torchvision")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has no example of an input
        mlflow.pyfunc.save_model(
            folder,
            loader_module="esol.serving",
            data_path=str(weights),
            code_paths=[str(root / "esol"), str(root / "shards")],
            signature=ModelSignature(
                inputs=Schema([ColSpec(AnyType(), "image")]),  # bytes, or base64 that esol.serving decodes
                outputs=Schema([ColSpec("string", "mask"), ColSpec("string", "shares")]),
            ),
            pip_requirements=[f"{name}=={version(name)}" for name in needed],
        )


def _start_follower(run_dir: Path, uri: str, experiment: str) -> subprocess.Popen[bytes] | None:
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    try:
        with open(run_dir / _MLFLOW_LOG, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "esol.tracking", str(run_dir.resolve()), uri, experiment],
                stdin=subprocess.PIPE,
                stdout=2,  # its warnings are the user's to see; MLflow's chatter goes into the log
                stderr=log,
                start_new_session=True,  # a signal to the job must not cut it off
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
    except OSError as error:
        _LOG.warning("no MLflow tracking, %s has everything: %s", run_dir / _JSONL, error)
        return None


class _Follower:
    """Sends the records of a run directory to MLflow in order, and remembers in mlflow.json how far it came."""

    def __init__(self, run_dir: Path, uri: str, experiment: str) -> None:
        self._run_dir, self._experiment = run_dir.resolve(), experiment
        self._runs = self._run_dir.parent
        self._artifacts = None if uri else (self._runs / "mlartifacts").as_uri()
        self.uri = uri or f"sqlite:///{self._runs / 'mlflow.db'}"
        self._store = uri or _BESIDE
        self.refused = 0  # records that MLflow will never take
        self._client: Any = None
        self._state: dict[str, Any] = {}
        self._renamed: set[tuple[str, str]] = set()  # (run, name) whose tag is set

    def send(self) -> int:
        """Sends all whole lines that are new; returns how many. Raises where MLflow may answer later: call again then.

        What it will never take is counted in `refused` and passed over: it must not block what comes behind it.
        """
        if self._client is None:
            self._connect()
        with open(self._run_dir / _JSONL, "rb") as file:
            file.seek(self._state["offset"])
            data = file.read()
        sent = 0
        records = map(_parse, data[: data.rfind(b"\n") + 1].splitlines(keepends=True))
        try:  # consecutive metrics of one stage become one call
            for (stage, metrics), group in groupby(records, key=lambda r: (r.get("stage"), "metrics" in r)):
                for batch in [list(group)] if metrics else [[record] for record in group]:
                    self._send_batch(stage, batch, metrics)
                    self._state["offset"] += sum(record["bytes"] for record in batch)
                    sent += len(batch)
        finally:
            self._save_state()
        return sent

    def _send_batch(self, stage: str | None, batch: list[dict[str, Any]], metrics: bool) -> None:
        try:
            if metrics:
                self._log_metrics(self._run_of(stage), batch)
            else:
                self._send_event(batch[0])
        except Exception as error:
            if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST" and stage in self._state["stages"]:
                del self._state["stages"][stage]  # somebody has deleted it for good: a new one takes the rest
                self._send_batch(stage, batch, metrics)
                return
            if not _for_good(error):
                raise
            if len(batch) > 1:  # one of them is to blame, the others are not
                for record in batch:
                    self._send_batch(stage, [record], metrics)
                return
            self.refused += 1
            _LOG.warning("MLflow does not take a record of %s: %s", stage or "the run", _first_line(error))
            if self.refused == 1:
                text = f"MLflow does not take a record ({_first_line(error)}); it goes on with the next one"
                print(text, flush=True)

    def _save_state(self) -> None:
        atomic_write(self._run_dir / _STATE, json.dumps(self._state))

    def _connect(self) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # read when MLflow is imported
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        client = MlflowClient(self.uri)
        try:
            state = json.loads((self._run_dir / _STATE).read_text())
            if not isinstance(state, dict) or not {"uri", "offset", "identity", "parent", "stages"} <= state.keys():
                state = {}
        except (OSError, ValueError):
            state = {}
        if self._store == _BESIDE:
            _follow_the_move(self._runs / "mlflow.db", self._artifacts or "")
            if str(state.get("uri", "")).startswith("sqlite:///") and str(state["uri"]).endswith("/mlflow.db"):
                state["uri"] = _BESIDE  # as earlier versions wrote it
        if state.get("uri") == self._store and state["parent"]:
            try:
                client.get_run(state["parent"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                state = {}  # another store under the same address: everything again
        if state.get("uri") != self._store:
            state = {"uri": self._store, "offset": 0, "identity": "", "parent": "", "stages": {}}
        experiment = client.get_experiment_by_name(self._experiment)
        self._experiment_id = (
            experiment.experiment_id if experiment else client.create_experiment(self._experiment, self._artifacts)
        )
        self._client, self._state = client, state

    def _log_metrics(self, run: str, records: list[dict[str, Any]], prefix: str = "") -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(self._name(run, prefix + name), value, int(record["time"] * 1000), record.get("step", 0))
            for record in records
            for name, value in record["metrics"].items()
            if value is not None
        ]
        for first in range(0, len(metrics), 1000):  # MLflow's limit for one call
            self._client.log_batch(run, metrics=metrics[first : first + 1000])

    def _name(self, run: str, name: str) -> str:
        """A name that MLflow takes; where that is another one, a tag of the run has the name itself."""
        allowed = mlflow_name(name)
        if allowed != name and (run, name) not in self._renamed:
            self._renamed.add((run, name))
            self._client.set_tag(run, mlflow_name(f"name.{allowed}"), name[:_TAG])
        return allowed

    def _run_of(self, stage: str | None) -> str:
        """The MLflow run of a stage, or of the whole; made now where the record that should have made it is lost."""
        if stage is None:
            if not self._state["parent"]:
                self._run({"time": time.time(), "params": {}, "tags": {}, "identity": ""})
            return str(self._state["parent"])
        if stage not in self._state["stages"]:
            self._begin({"stage": stage, "time": time.time(), "resume": False})
        return str(self._state["stages"][stage]["run"])

    def _send_event(self, record: dict[str, Any]) -> None:
        event, stage = record.get("event"), record.get("stage")
        if event == "run":
            self._run(record)
        elif event == "begin":
            self._begin(record)
        elif event == "end":
            self._client.set_terminated(self._run_of(stage), record["status"], int(record["time"] * 1000))
            if stage:
                self._state["stages"][stage]["open"] = record["status"] != "FINISHED"
        elif event == "results":
            values = [{**record, "metrics": record["values"]}]
            run, parent = self._run_of(stage), self._run_of(None)
            self._log_metrics(run, values, "result/")
            self._log_metrics(parent, values, f"{stage}/")
            for name, word in record.get("words", {}).items():
                self._client.set_tag(run, mlflow_name(name), word[:_TAG])
                self._client.set_tag(parent, mlflow_name(f"{stage}/{name}"), word[:_TAG])
        elif event == "artifact":
            path = self._run_dir / record["path"]
            if not path.resolve().is_relative_to(self._run_dir):
                raise ValueError(f"the path {record['path']} leads out of the run directory")
            if path.is_file():
                self._client.log_artifact(self._run_of(stage), str(path), record["folder"] or None)
            else:
                _LOG.warning("%s is gone, MLflow does not get it", path)

    def _run(self, record: dict[str, Any]) -> None:
        """The parent run: one per run directory as long as the configuration means the same."""
        from mlflow.entities import Param, RunTag

        if not self._state["parent"] or self._state["identity"] != record["identity"]:
            run = self._client.create_run(self._experiment_id, int(record["time"] * 1000), run_name=self._run_dir.name)
            self._state |= {"parent": run.info.run_id, "identity": record["identity"], "stages": {}}
            self._save_state()
            params = [Param(mlflow_name(key), value[:_PARAM]) for key, value in record["params"].items()]
            for first in range(0, len(params), 100):  # MLflow's limit for one call
                self._client.log_batch(run.info.run_id, params=params[first : first + 100])
        parent = self._state["parent"]
        self._client.update_run(parent, "RUNNING")
        self._client.log_batch(
            parent, tags=[RunTag(mlflow_name(key), value[:_TAG]) for key, value in record["tags"].items()]
        )
        if (self._run_dir / "resolved.yaml").is_file():
            self._client.log_artifact(parent, str(self._run_dir / "resolved.yaml"))

    def _begin(self, record: dict[str, Any]) -> None:
        """A stage's child run: a new one, or the interrupted one where the run resumes."""
        former = self._state["stages"].get(record["stage"])
        if former and former["open"] and record["resume"]:
            self._client.update_run(former["run"], "RUNNING")
            return
        run = self._client.create_run(
            self._experiment_id,
            int(record["time"] * 1000),
            {"mlflow.parentRunId": self._run_of(None), "stage": record["stage"]},
            f"{self._run_dir.name} {record['stage']}",
        )
        self._state["stages"][record["stage"]] = {"run": run.info.run_id, "open": True}
        self._save_state()


def _parse(line: bytes) -> dict[str, Any]:
    """A record with its length in bytes; half a line that a killed process left is an empty one."""
    try:
        record = json.loads(line)
    except ValueError:
        record = {}
    return {**(record if isinstance(record, dict) else {}), "bytes": len(line)}


def mlflow_name(name: str) -> str:
    """A metric's, parameter's or tag's name as MLflow takes it, different for different names.

    Letters, digits, and _ - . / and spaces stay; other signs become _, as do parts that a path would swallow, and a
    hash tells such names apart from those that were so from the start. At most 250 characters.
    """
    parts = re.sub(r"[^\w.\- /]", "_", name).split("/")
    allowed = "/".join("_" if part in ("", ".") or part.startswith("..") else part for part in parts)
    if allowed == name and len(name) <= _NAME:
        return name
    return f"{allowed[: _NAME - 9]}_{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _for_good(error: Exception) -> bool:
    """Whether MLflow will refuse this record however often it is sent: the record is at fault, not the server."""
    if isinstance(error, json.JSONDecodeError):  # a garbled answer of the server's
        return False
    code = getattr(error, "error_code", "")
    return isinstance(error, (KeyError, TypeError, ValueError, AttributeError, PermissionError)) or code in _REFUSALS


def _follow_the_move(database: Path, artifacts: str) -> None:
    """Where the runs were moved, their database still names the old place of the pictures: puts the new one in.

    MLflow stores absolute addresses and has no call to change them. Only the database that esol keeps beside its runs
    is changed; of earlier runs only those whose artifacts have come along.
    """
    if not database.is_file():
        return
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=30)) as store, store:
            for (old,) in store.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall():
                if (
                    isinstance(old, str)
                    and old.startswith("file:")
                    and old.endswith("/mlartifacts")
                    and old != artifacts
                ):
                    moved = "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?"
                    store.execute(moved, (artifacts, old))
            for run, uri in store.execute("SELECT run_uuid, artifact_uri FROM runs").fetchall():
                place, found, inside = str(uri).rpartition("/mlartifacts/")
                if not found or not place.startswith("file:") or f"{place}/mlartifacts" == artifacts:
                    continue
                gone = not Path(url2pathname(urlsplit(uri).path)).exists()  # a run without a picture yet has no folder
                if gone or (database.parent / "mlartifacts" / inside).exists():
                    store.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (f"{artifacts}/{inside}", run))
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):  # MLflow makes its tables on first use
            _LOG.warning("%s still names the old place of the pictures: %s", database, error)
            print(
                f"{database} still names the old place of the pictures ({error}); try again when it is free", flush=True
            )


def _follow(run_dir: Path, uri: str, experiment: str) -> int:
    """Sends until the training process says "end" or is gone, then once more; 1 where something stays unsent."""
    os.nice(5)
    with hold(run_dir / f".{_STATE}.lock", math.inf):  # the follower of a killed run may still be sending
        follower, warned, ended = _Follower(run_dir, uri, experiment), False, False
        while True:
            try:
                follower.send()
                if ended:
                    return 0
            except Exception as error:
                _LOG.exception("MLflow at %s failed", follower.uri)
                if not warned:
                    warned = True
                    print(
                        f"MLflow at {follower.uri} fails ({_first_line(error)}); training goes on, {run_dir / _JSONL} "
                        "has everything",
                        flush=True,
                    )
                if ended:
                    return 1
            ended = bool(select.select([sys.stdin], [], [], _PERIOD)[0])
            if ended:
                signal.alarm(60)  # nobody may be left to end a call that never returns


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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    sys.exit(_follow(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
