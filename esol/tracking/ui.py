"""`esol ui`: MLflow's pages of a run, opened at the run and not at a list of experiments."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from esol.base.errors import EsolError
from esol.base.strangers import content, json_tree, lines, plain
from esol.tracking.mlflow_store import BESIDE, STATE, follow_the_move, own_store


def ui(place: Path, port: int = 5000) -> int:
    """Prints the run's address and becomes MLflow's server on 127.0.0.1; with a server of its own it only prints.

    place: a run directory, or a folder of them, of which the newest is shown. EsolError where none was sent to MLflow.
    """
    uri, path = where(place)
    if uri.startswith(("http://", "https://")):
        print(lines(f"{uri.rstrip('/')}/{path}"))
        return 0
    print(f"http://127.0.0.1:{port}/{path}     (Ctrl-C ends it)", flush=True)
    server = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [*server, "--backend-store-uri", uri])


def where(place: Path) -> tuple[str, str]:
    """MLflow's address of a run, and the run's place in its pages."""
    states = [place / STATE] if (place / STATE).exists() else sorted(place.glob(f"*/{STATE}"), key=_time)
    if not states:
        raise EsolError(f"{place} holds no run that MLflow knows: give a run directory, or esol replay RUN_DIR first")
    run_dir = states[-1].parent.resolve()
    try:
        state = json_tree(content(states[-1]))
        uri, run = state["uri"], state["parent"]
        if not (isinstance(uri, str) and isinstance(run, str) and plain(run)):
            raise ValueError("it names no run")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EsolError(f"{states[-1]} is damaged ({error}): delete it, then esol replay {run_dir}") from error
    if uri == BESIDE:
        uri, artifacts = own_store(run_dir.parent)
        follow_the_move(run_dir.parent / "mlflow.db", artifacts)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    try:
        experiment = MlflowClient(uri).get_run(run).info.experiment_id
    except Exception as error:  # every store has its own
        raise EsolError(
            f"MLflow at {uri} does not show {run_dir}: {(str(error) or 'no answer').splitlines()[0]}"
        ) from error
    # without the last part its pages offer traces and prompts instead of metrics and models
    return uri, f"#/experiments/{experiment}/runs/{run}?workflowType=machine_learning"


def _time(path: Path) -> float:
    return path.stat().st_mtime
