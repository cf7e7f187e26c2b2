"""Tracking into a real sqlite store, and with servers that are dead or never answer."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esol.base.errors import EsolError
from esol.config import DataConfig, TrackingConfig
from esol.pipeline.registry import config_type
from esol.stages.classify import ClassifyConfig
from esol.tracking.follower import replay
from esol.tracking.mlflow_store import mlflow_name
from esol.tracking.tracker import Tracker
from esol.training.loop import Stopped


def make(
    runs: Path, name: str = "run", uri: str = "", resume: bool = False, flush: float = 60, lr: float = 0.1
) -> Tracker:
    config = config_type()(
        run_dir=str(runs / name),
        data=DataConfig(root="x" * 7000),  # longer than any MLflow takes for a parameter
        classify=ClassifyConfig(lr=lr),
        tracking=TrackingConfig(uri=uri),
    )
    return Tracker(config, True, "data-hash", 2, resume, flush, {"photos": 3})


def note(tracker: Tracker, steps: int = 3) -> None:
    """What a stage notes: metrics, results and a picture."""
    with tracker.stage("classify"):
        for step in range(1, steps + 1):
            tracker.metrics(step, {"loss": 1 / step, "area": float("nan")})
        picture = Path(tracker._config.run_dir) / "pictures" / "classify.png"
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(b"a picture")
        tracker.picture(picture)
        tracker.results({"miou": 47.5})
    tracker.headline({"photos": 3, "maps_miou": float("nan")})
    tracker.headline({"maps_miou": 50.0})
    tracker.headline({"judge": 0.5}, "classify")


def records(runs: Path, name: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]


def runs_in(store: Path) -> tuple[Any, list[Any], list[Any]]:
    """A client, the parent runs and their children in the sqlite store of a runs folder, oldest first."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("esol")
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    return client, [run for run in found if run not in children], children


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder after one run through the follower process into the default store."""
    runs = tmp_path_factory.mktemp("runs")
    with make(runs) as tracker:
        (runs / "run" / "resolved.yaml").write_text("seed: 0\n")
        note(tracker)
        (runs / "run/weights").write_bytes(b"weights")
        tracker.model(runs / "run/weights", b"a photo")
    return runs


@pytest.fixture
def store(tracked: Path, tmp_path: Path) -> Path:
    """A runs folder with an empty experiment in an MLflow database that is already migrated."""
    source = (tracked / "mlflow.db").read_bytes()
    (tmp_path / "mlflow.db").write_bytes(source)
    client, parents, children = runs_in(tmp_path)
    for run in [*parents, *children]:
        client.delete_run(run.info.run_id)
    return tmp_path


def test_run_arrives_in_mlflow(tracked: Path, capfd: pytest.CaptureFixture) -> None:
    client, (parent,), (child,) = runs_in(tracked)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert parent.data.params["classify.lr"] == "0.1"
    assert parent.data.params["data.root"].startswith("xxx")
    assert {"data_index", "world_size", "version.torch", "git_commit"} <= parent.data.tags.keys()
    assert parent.data.metrics == {"photos": 3, "maps_miou": 50.0}  # the last of what was said
    (data,) = parent.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("x" * 500, "data-hash")
    assert json.loads(data.dataset.profile) == {"photos": 3}
    history = client.get_metric_history(child.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert (child.data.metrics["result/miou"], child.data.metrics["judge"]) == (47.5, 0.5)
    assert "area" not in child.data.metrics  # not a number
    assert [a.path for a in client.list_artifacts(child.info.run_id, "pictures")] == ["pictures/classify.png"]
    assert [a.path for a in client.list_artifacts(parent.info.run_id)] == ["pictures", "resolved.yaml"]
    assert records(tracked)[2]["metrics"] == {"loss": 1.0, "area": None}


def test_interrupted_stage_goes_on_in_its_run_and_a_repeated_one_gets_its_own(store: Path) -> None:
    def be_stopped() -> None:
        with make(store, uri="none") as tracker, tracker.stage("classify"):
            tracker.metrics(1, {"loss": 1.0})
            raise Stopped

    with pytest.raises(Stopped):
        be_stopped()
    replay(store / "run")
    _, (parent,), (child,) = runs_in(store)
    assert (parent.info.status, child.info.status) == ("KILLED", "KILLED")
    with make(store, uri="none", resume=True) as tracker:
        note(tracker)
    with make(store, uri="none") as tracker:
        note(tracker, steps=1)
    with make(store, uri="none", lr=0.2) as tracker:  # another configuration is another pipeline
        note(tracker)
    replay(store / "run")
    client, parents, children = runs_in(store)
    assert [run.data.params["classify.lr"] for run in parents] == ["0.1", "0.2"]
    assert [run.data.tags["mlflow.parentRunId"] for run in children] == [parents[i].info.run_id for i in (0, 0, 1)]
    assert {run.info.status for run in [*parents, *children]} == {"FINISHED"}
    assert children[0].info.run_id == child.info.run_id
    assert [m.step for m in client.get_metric_history(child.info.run_id, "loss")] == [1, 1, 2, 3]


def test_replay_sends_what_is_missing_and_passes_half_a_line(store: Path, capsys: pytest.CaptureFixture) -> None:
    with make(store, uri="none") as tracker:
        note(tracker)
    with open(store / "run" / "metrics.jsonl", "a") as file:
        file.write('{"stage": "classify", "st')  # killed while writing
    replay(store / "run")
    replay(store / "run")
    with make(store, uri="none") as tracker:
        note(tracker, steps=1)
    replay(store / "run")
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["12", "0", "11"]
    _, _, children = runs_in(store)
    assert [child.data.metrics["loss"] for child in children] == [1 / 3, 1.0]
    with pytest.raises(EsolError, match=r"holds no metrics\.jsonl"):
        replay(store)


@pytest.fixture(params=["closed port", "never answers"])
def broken_uri(request: pytest.FixtureRequest) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "never answers":
            listener.listen(100)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.timeout(60)
def test_broken_server_neither_stops_nor_loses_anything(
    store: Path, broken_uri: str, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with make(store, uri=broken_uri, flush=1) as tracker:
        note(tracker, steps=2000)
    assert [r["step"] for r in records(store) if "step" in r] == list(range(1, 2001))
    assert f"esol replay {store / 'run'}" in capfd.readouterr().err
    with pytest.raises(EsolError, match=broken_uri):
        replay(store / "run", broken_uri)
    replay(store / "run", f"sqlite:///{store / 'mlflow.db'}")
    client, _, (child,) = runs_in(store)
    assert len(client.get_metric_history(child.info.run_id, "loss")) == 2000


def test_other_ranks_do_nothing(tmp_path: Path) -> None:
    tracker = make(tmp_path)
    tracker._active = False
    with tracker:
        with tracker.stage("classify"):
            tracker.metrics(1, {"loss": 1.0})
        tracker.results({})
        tracker.picture(tmp_path / "nothing.png")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with make(tmp_path, uri="none") as tracker, open("/dev/full", "ab", buffering=0) as full:
        file, tracker._file = tracker._file, full
        tracker.metrics(1, {"loss": 1.0})
        tracker._file = file
        tracker.metrics(2, {"loss": 1.0})
    assert "No space left on device" in caplog.text
    assert [record["step"] for record in records(tmp_path) if "step" in record] == [2]


def test_training_process_never_imports_mlflow() -> None:
    code = "import sys, esol.tracking.follower; assert not {'mlflow', 'torch'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


ODD = (
    "..a",
    "R&B",
    "dog (puppy)",
    "it's",
    "../x",
    "/y",
    "a//b",
    "dog [puppy]",
    "caf\u00e9",
    "",
    "n" * 400,
    "a/b",
    "x:y",
)


def test_names_that_mlflow_refuses_become_others_that_stay_apart(store: Path) -> None:
    assert len({mlflow_name(f"iou_{name}") for name in ODD}) == len(ODD)
    assert mlflow_name("localize/cam_iou_a b-c.d") == "localize/cam_iou_a b-c.d"
    with make(store) as tracker, tracker.stage("classify"):
        tracker.metrics(1, {f"iou_{name}": 1.0 for name in ODD} | {"loss": 2.0})
        tracker.results({f"iou_{name}": 50.0 for name in ODD} | {"weights (initial)": "none"})
    _, _, (child,) = runs_in(store)
    for name in ODD:
        assert child.data.metrics[mlflow_name(f"iou_{name}")] == 1.0
        assert child.data.metrics[mlflow_name(f"result/iou_{name}")] == 50.0
    called = mlflow_name("iou_dog (puppy)")
    assert called.startswith("iou_dog _puppy__")
    assert child.data.tags[mlflow_name(f"name.{called}")] == "iou_dog (puppy)"


def test_lost_and_damaged_records_block_nothing_behind_them(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with make(store, uri="none") as tracker:
        note(tracker)
        with tracker.stage("expand"):
            tracker.metrics(1, {"loss": 3.0})
    path = store / "run" / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if '"begin"' not in line and '"run"' not in line]
    lines.insert(1, '{"time": 1, "stage": "classify", "step": 2, "metr')
    lines.insert(2, '{"time": 1, "stage": "classify", "step": "two", "metrics": {"loss": "much"}}')
    lines.insert(3, "[1]")
    lines.insert(3, '{"time": 1e300, "stage": "classify", "step": 3, "metrics": {"loss": 1}}')
    lines.insert(3, "[" * 10**5)
    lines.insert(4, '{"time": 1, "event": "artifact", "stage": "classify", "path": "../../x", "folder": ""}')
    path.write_text("\n".join(lines) + "\n")
    (store / "run/pictures/classify.png").unlink()
    (store / "secret").touch()
    (store / "run/resolved.yaml").unlink(missing_ok=True)
    (store / "run/resolved.yaml").symlink_to(store / "secret")
    assert replay(store / "run", f"sqlite:///{store / 'mlflow.db'}") == 3
    assert "MLflow refused 3 more for good" in capsys.readouterr().err
    client, (parent,), children = runs_in(store)
    assert not [file.path for file in client.list_artifacts(parent.info.run_id) if file.path == "resolved.yaml"]
    assert {run.data.tags["stage"]: run.data.metrics["loss"] for run in children} == {"classify": 1 / 3, "expand": 3.0}
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert replay(store / "run", f"sqlite:///{store / 'mlflow.db'}") == 0  # nothing is sent or refused twice


def test_runs_that_were_moved_keep_their_pictures_and_put_new_ones_beside_them(tracked: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tracked, tmp_path / "first"))
    _, _, (child,) = runs_in(moved)
    here = Path(shutil.move(moved, tmp_path / "second"))
    shutil.move(tracked / "mlartifacts", tmp_path / "hidden")  # only what came along may be found
    try:
        with make(here, name="other") as tracker:
            note(tracker)
        client, parents, children = runs_in(here)
        assert len(parents) == 2
        state = here / "run/mlflow.json"
        old = json.loads(state.read_text())
        assert old["uri"] == "beside the runs"
        state.write_text(json.dumps(old | {"uri": f"sqlite:///{tmp_path}/first/mlflow.db"}))  # of an earlier version
        for run in children:
            assert run.info.artifact_uri.startswith((here / "mlartifacts").as_uri())
            picture = client.download_artifacts(run.info.run_id, "pictures/classify.png", str(tmp_path))
            assert Path(picture).read_bytes() == b"a picture"
        assert child.info.run_id in {run.info.run_id for run in children}
        (model,) = client.search_logged_models([child.info.experiment_id])
        assert model.artifact_location.startswith((here / "mlartifacts").as_uri())
        assert "MLmodel" in {file.path for file in client.list_logged_model_artifacts(model.model_id)}
        replay(here / "run")  # the same run, not another
        assert len(runs_in(here)[1]) == 2
    finally:
        shutil.move(tmp_path / "hidden", tracked / "mlartifacts")
