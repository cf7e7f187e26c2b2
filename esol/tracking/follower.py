"""The process that carries metrics.jsonl into MLflow: `python -m esol.tracking.follower RUN_DIR URI EXPERIMENT`.

It reads what esol.tracking.tracker writes, as long as "end" has not come over its standard input, and remembers how far
it came. `esol replay` sends what is left when it could not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import signal
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from esol.base.errors import EsolError
from esol.base.files import atomic_write, hold
from esol.base.strangers import content, json_tree, printable
from esol.tracking.mlflow_store import (
    BESIDE,
    DATASET,
    DIGEST,
    PARAM,
    STATE,
    TAG,
    follow_the_move,
    for_good,
    mlflow_name,
    own_store,
)
from esol.tracking.tracker import JSONL

_LOG = logging.getLogger(__name__)
KIND = {"mlflow.experimentKind": "custom_model_development"}  # by which MLflow's pages choose what they offer
_PERIOD = 5.0  # seconds between two looks at the file


def replay(run_dir: Path, uri: str = "") -> int:
    """Sends what MLflow has not got yet of a run directory; uri "" is the run's own. Returns what it refused.

    EsolError where MLflow cannot be reached; what has been sent by then is not sent again.
    """
    if not (run_dir / JSONL).is_file():
        raise EsolError(f"{run_dir} holds no {JSONL}: give the run_dir of a run")
    experiment = "esol"
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError, RecursionError, yaml.YAMLError):
        settings = yaml.safe_load(content(run_dir / "resolved.yaml"))["tracking"]
        experiment, uri = str(settings["experiment"]), uri or str(settings["uri"])
    follower = _Follower(run_dir, "" if uri == "none" else uri, experiment)
    try:
        sent = follower.send()
    except Exception as error:
        raise EsolError(f"MLflow at {follower.uri} failed, try again: {_first_line(error)}") from error
    print(f"sent {sent} records of {run_dir} to {printable(follower.uri)}")
    if follower.refused:
        print(f"MLflow refused {follower.refused} more for good; {run_dir / JSONL} has them", file=sys.stderr)
    return follower.refused


class _Follower:
    """Sends the records of a run directory to MLflow in order, and remembers in mlflow.json how far it came."""

    def __init__(self, run_dir: Path, uri: str, experiment: str) -> None:
        self._run_dir, self._experiment = run_dir.resolve(), experiment
        self._runs = self._run_dir.parent
        own = own_store(self._runs)
        self.uri, self._artifacts = uri or own[0], None if uri else own[1]
        self._store = uri or BESIDE
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
        with open(self._run_dir / JSONL, "rb") as file:
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
            if not for_good(error):
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
        atomic_write(self._run_dir / STATE, json.dumps(self._state))

    def _connect(self) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # read when MLflow is imported
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        client = MlflowClient(self.uri)
        try:
            state = json_tree(content(self._run_dir / STATE))
            if not _is_state(state):
                state = {}
        except (OSError, ValueError):
            state = {}
        if self._store == BESIDE:
            follow_the_move(self._runs / "mlflow.db", self._artifacts or "")
            if str(state.get("uri", "")).startswith("sqlite:///") and str(state["uri"]).endswith("/mlflow.db"):
                state["uri"] = BESIDE  # as earlier versions wrote it
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
            experiment.experiment_id
            if experiment
            else client.create_experiment(self._experiment, self._artifacts, KIND)
        )
        self._client, self._state = client, state

    def _log_metrics(self, run: str, records: list[dict[str, Any]], prefix: str = "") -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(self._name(run, prefix + name), value, _milliseconds(record), record.get("step", 0))
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
            self._client.set_tag(run, mlflow_name(f"name.{allowed}"), name[:TAG])
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
            self._client.set_terminated(self._run_of(stage), record["status"], _milliseconds(record))
            if stage:
                self._state["stages"][stage]["open"] = record["status"] != "FINISHED"
        elif event == "results":
            values = [{**record, "metrics": record["values"]}]
            run, parent = self._run_of(stage), self._run_of(None)
            self._log_metrics(run, values, "result/")
            for name, word in record.get("words", {}).items():
                self._client.set_tag(run, mlflow_name(name), word[:TAG])
                self._client.set_tag(parent, mlflow_name(f"{stage}/{name}"), word[:TAG])
        elif event == "headline":
            self._log_metrics(self._run_of(stage), [{**record, "metrics": record["values"]}])
        elif event in ("artifact", "model"):
            path = self._run_dir / record["path"]
            if not path.resolve().is_relative_to(self._run_dir):
                raise ValueError(f"the path {record['path']} leads out of the run directory")
            if not path.is_file():
                _LOG.warning("%s is gone, MLflow does not get it", path)
            elif event == "model":
                from esol.tracking.mlflow_model import log_mlflow_model

                log_mlflow_model(self.uri, self._run_of(None), path, record["example"])
                self._client.update_run(self._run_of(None), "RUNNING")  # logging a model ends it
            else:
                for run in dict.fromkeys((self._run_of(stage), self._run_of(None if record["folder"] else stage))):
                    self._client.log_artifact(run, str(path), record["folder"] or None)

    def _run(self, record: dict[str, Any]) -> None:
        """The parent run: one per run directory as long as the configuration means the same."""
        from mlflow.entities import Dataset, DatasetInput, Param, RunTag

        if not self._state["parent"] or self._state["identity"] != record["identity"]:
            run = self._client.create_run(self._experiment_id, _milliseconds(record), run_name=self._run_dir.name)
            self._state |= {"parent": run.info.run_id, "identity": record["identity"], "stages": {}}
            self._save_state()
            params = [Param(mlflow_name(key), value[:PARAM]) for key, value in record["params"].items()]
            for first in range(0, len(params), 100):  # MLflow's limit for one call
                self._client.log_batch(run.info.run_id, params=params[first : first + 100])
            if data := record.get("data"):
                about = {"source_type": "local", "source": json.dumps({"uri": data["source"]})}
                about |= {"digest": data["digest"][:DIGEST], "profile": json.dumps(data["profile"], ensure_ascii=False)}
                name = Path(data["source"]).name[:DATASET] or "data"
                self._client.log_inputs(run.info.run_id, [DatasetInput(Dataset(name=name, **about))])
        parent = self._state["parent"]
        self._client.update_run(parent, "RUNNING")
        self._client.log_batch(
            parent, tags=[RunTag(mlflow_name(key), value[:TAG]) for key, value in record["tags"].items()]
        )
        resolved = self._run_dir / "resolved.yaml"
        if resolved.is_file() and not resolved.is_symlink():
            self._client.log_artifact(parent, str(self._run_dir / "resolved.yaml"))

    def _begin(self, record: dict[str, Any]) -> None:
        """A stage's child run: a new one, or the interrupted one where the run resumes."""
        former = self._state["stages"].get(record["stage"])
        if former and former["open"] and record["resume"]:
            self._client.update_run(former["run"], "RUNNING")
            return
        run = self._client.create_run(
            self._experiment_id,
            _milliseconds(record),
            {"mlflow.parentRunId": self._run_of(None), "stage": record["stage"]},
            f"{self._run_dir.name} {record['stage']}",
        )
        self._state["stages"][record["stage"]] = {"run": run.info.run_id, "open": True}
        self._save_state()


def _parse(line: bytes) -> dict[str, Any]:
    """A record with its length in bytes; half a line that a killed process left is an empty one."""
    try:
        record = json_tree(line)
    except ValueError:
        record = {}
    return {**(record if isinstance(record, dict) else {}), "bytes": len(line)}


def _milliseconds(record: dict[str, Any]) -> int:
    """When it was written, since the epoch; ValueError for a time that no clock shows, which a database cannot hold."""
    if not 0 <= record["time"] < 1e11:
        raise ValueError(f"time = {record['time']!r:.80}")
    return int(record["time"] * 1000)


def _is_state(tree: Any) -> bool:
    """Whether this is what a follower notes of how far it came."""
    kinds = {"uri": str, "offset": int, "identity": str, "parent": str, "stages": dict}
    if not isinstance(tree, dict) or not all(isinstance(tree.get(name), kind) for name, kind in kinds.items()):
        return False
    stages = [stage if isinstance(stage, dict) else {} for stage in tree["stages"].values()]
    return tree["offset"] >= 0 and all(isinstance(s.get("run"), str) and "open" in s for s in stages)


def _follow(run_dir: Path, uri: str, experiment: str) -> int:
    """Sends until the training process says "end" or is gone, then once more; 1 where something stays unsent."""
    os.nice(5)
    with hold(run_dir / f".{STATE}.lock", math.inf):  # the follower of a killed run may still be sending
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
                        f"MLflow at {follower.uri} fails ({_first_line(error)}); training goes on, {run_dir / JSONL} "
                        "has everything",
                        flush=True,
                    )
                if ended:
                    return 1
            ended = bool(select.select([sys.stdin], [], [], _PERIOD)[0])
            if ended:
                signal.alarm(60)  # nobody may be left to end a call that never returns


def _first_line(error: BaseException) -> str:
    return printable((str(error).strip() or type(error).__name__).splitlines()[0][:300])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    sys.exit(_follow(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
