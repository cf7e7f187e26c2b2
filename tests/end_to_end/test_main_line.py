"""The main line as users start it: real processes, a tiny synthetic set, every launcher."""

import io
import json
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file
from tiny import ACCELERATE, MAIN_LINE, STAGES, TRAINING, TWO_RANKS, launch, train

from esol.base.errors import EsolError
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.samples import decode_mask, encode_mask
from esol.ops.metrics import confusion_matrix, score
from shards.synthetic import synthetic_source
from shards.writer import create


def test_a_run_directory_holds_what_the_readme_says(one: Path) -> None:
    results = json.loads((one / "results.json").read_text())
    assert list(results) == STAGES
    assert {"cam_miou", "expand_miou", "shrink_miou", "cam_at_cam_body_recall"} <= results["localize"].keys()
    assert 0 < results["localize"]["cam_miou"] < 100
    for stage in ("seed_masks", "psa_masks", "irn_masks"):
        assert {"threshold", "plain_miou", "crf_miou", "best_threshold"} <= results[stage].keys()
        assert 0 < results[stage]["plain_miou"] < 100
    for stage in ("psa_labels", "irn_labels"):
        assert 0 < results[stage]["labelled"] < 100
    assert results["evaluate"]["initial_weights"] == "random"
    assert results["evaluate"]["masks"] == "irn_masks"
    assert {"plain_miou", "crf_miou", "iou_background", "recall_fish"} <= results["evaluate"].keys()
    assert "kernel_channels: 16" in (one / "resolved.yaml").read_text()
    assert {p.stem for p in (one / "pictures").iterdir()} == set(STAGES) - {"psa", "irn", "irn_mean", "segment"}
    with Image.open(one / "pictures/localize.png") as picture:
        assert picture.width > 6 * 200  # photo, three maps, seeds, truth
    records = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    logged = [r for r in records if r.get("stage") == "classify" and "metrics" in r]
    assert [r["step"] for r in logged] == list(range(2, 13, 2))
    assert {"lr", "loss", "images_per_second", "data_wait_seconds", "peak_memory_mib"} <= logged[0]["metrics"].keys()


def test_mlflows_parent_run_has_the_few_numbers_the_pictures_the_model_and_the_data(one: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{one.parent.resolve() / 'mlflow.db'}")
    state, results = json.loads((one / "mlflow.json").read_text()), json.loads((one / "results.json").read_text())
    run = client.get_run(state["parent"])
    names = {"minutes", "photos", "classes", "cam_miou", "maps_miou", "masks_miou", "masks_judge", "masks_labels_lost"}
    assert set(run.data.metrics) == names | {"predictions_miou", "predictions_judge"}
    assert run.data.metrics["predictions_miou"] == pytest.approx(results["evaluate"]["crf_miou"])
    there = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"pictures", "resolved.yaml", "report.html"} <= there
    pictures = {Path(artifact.path).name for artifact in client.list_artifacts(run.info.run_id, "pictures")}
    assert pictures == {path.name for path in (one / "pictures").iterdir()}
    (data,) = run.inputs.dataset_inputs
    assert json.loads(data.dataset.profile)["split train"] == 48
    (model,) = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    files = {artifact.path for artifact in client.list_logged_model_artifacts(model.model_id)}
    assert {"MLmodel", "code", "data", "input_example.json"} <= files
    child = client.get_run(state["stages"]["seed_masks"]["run"])
    assert {"miou", "judge", "seconds", "miou over threshold in percent/plain"} <= child.data.metrics.keys()


def test_the_ui_opens_the_run_itself(one: Path, tmp_path: Path) -> None:
    from esol.tracking.ui import where

    parent = json.loads((one / "mlflow.json").read_text())["parent"]
    for place in (one, one.parent):
        uri, path = where(place)
        assert uri == f"sqlite:///{one.parent.resolve() / 'mlflow.db'}"
        assert re.fullmatch(rf"#/experiments/\d+/runs/{parent}\?workflowType=machine_learning", path)
    with pytest.raises(EsolError, match="holds no run that MLflow knows"):
        where(tmp_path)


def test_mlflow_has_a_parent_and_a_child_per_stage(one: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{one.parent / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("esol").experiment_id])
    children = {r.data.tags["stage"]: r for r in runs if "mlflow.parentRunId" in r.data.tags}
    parent = next(r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    assert set(children) == set(STAGES)
    assert {r.data.tags["mlflow.parentRunId"] for r in children.values()} == {parent.info.run_id}
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert parent.data.params["model.kernel_channels"] == "16"
    assert parent.data.tags["data_index"]
    assert children["evaluate"].data.tags["initial_weights"] == "random"
    assert [p.path for p in client.list_artifacts(children["expand"].info.run_id, "pictures")] == [
        "pictures/expand.png"
    ]


def test_localized_shards_mirror_the_input(one: Path, shard_set: Path) -> None:
    made, given = Index.load(str(one / "localize")), Index.load(str(shard_set))
    assert made.keys.tolist() == given.keys.tolist()  # train, whose masks are wanted, and val, which is scored
    assert made.keys[made.split("val")].tolist() == given.keys[given.split("val")].tolist()
    reader = ShardReader(made)
    source = ShardReader(given)
    peaks = []
    for ordinal in range(len(made)):
        original = int(np.flatnonzero(given.keys == made.keys[ordinal])[0])
        with np.load(io.BytesIO(reader.read(ordinal, "maps.npz")), allow_pickle=False) as maps:
            assert maps["classes"].tolist() == np.flatnonzero(source.labels(original)).tolist()
            assert maps["full"].shape == (len(maps["classes"]), 64, 64)
            assert maps["stride4"].shape == (len(maps["classes"]), 16, 16)
            peaks.append(int(maps["full"].max(initial=0)))
    assert max(peaks) == 255  # the best class of an image reaches its maximum, unless relu left nothing of it


def test_pseudo_masks_are_palette_pngs_of_the_photos_size(one: Path, shard_set: Path) -> None:
    source = Index.load(str(shard_set))
    for stage in ("seed_masks", "psa_masks", "irn_masks", "vote_masks"):
        made = Index.load(str(one / stage))
        assert made.classes == source.classes
        for ordinal in range(len(made)):
            with Image.open(io.BytesIO(ShardReader(made).read(ordinal, "mask.png"))) as mask:
                assert (mask.mode, mask.size) == ("P", (64, 64))
                assert mask.getpalette()[3:6] == [128, 0, 0]
                present = np.flatnonzero(ShardReader(source).labels(ordinal)) + 1
                assert set(np.unique(np.asarray(mask)).tolist()) <= {0, *present.tolist()}


def test_evaluate_predicts_its_split_and_says_what_the_score_stands_on(
    config: Path, one: Path, shard_set: Path
) -> None:
    made, source = Index.load(str(one / "evaluate")), Index.load(str(shard_set))
    assert made.keys.tolist() == source.keys[source.split("val")].tolist()
    truths = source.split("val").tolist()
    confusion = sum(
        confusion_matrix(*(_mask(s, o) for s, o in ((source, truth), (made, own))), 6)
        for own, truth in enumerate(truths)
    )
    results = json.loads((one / "results.json").read_text())["evaluate"]
    assert results["crf_miou"] == pytest.approx(100 * score(confusion).miou)
    again = train(config, "--set", "tracking.uri=none")
    assert re.search(rf"DeepLab, learned from irn_masks \+ CRF +val +{results['crf_miou']:.2f} ", again.stdout)
    assert len(re.findall(r" random$", again.stdout, re.MULTILINE)) == 15  # every mIoU
    assert "seeds of decide, best threshold" in again.stdout


def _mask(index: Index, ordinal: int) -> np.ndarray:
    return decode_mask(ShardReader(index).read(ordinal, "mask.png"), "mask")


def test_the_same_on_true_masks(config: Path, one: Path) -> None:
    options = ("--set", "run_dir=runs/truth", "--set", "stages=[segment, evaluate]", "--set", "segment.masks=truth")
    done = train(config, *options, "--set", "tracking.uri=none")
    assert done.returncode == 0, done.stderr
    assert "segment: learns from truth, starts from random" in done.stdout
    assert re.search("DeepLab, learned from truth +val ", done.stdout)
    same = train(config, *options, "--set", "tracking.uri=none", "--set", "data.eval_split=none")
    assert same.returncode == 2
    assert "error: data.eval_split = none, which stage evaluate needs, but " in same.stderr
    assert "has: train, val. Set data.eval_split" in same.stderr
    assert "segment" not in same.stdout  # said before any work


def test_a_round_adds_what_deeplab_says_of_its_photos_to_the_masks(config: Path, one: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(one, tmp_path / "run"))
    options = ("--set", f"run_dir={run}", "--set", "tracking.uri=none", "--set", "segment.rounds=2")
    done = train(config, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done before with these settings, skipped") == len(STAGES) - 2  # but segment and evaluate
    results = json.loads((run / "results.json").read_text())
    assert list(results)[-4:] == ["round_1", "round_1_masks", "segment", "evaluate"]
    assert results["round_1"]["masks"] == "irn_masks"
    candidates = ("irn_masks", "round_1_masks")
    assert results["segment"]["masks"] == max(candidates, key=lambda name: results[name]["judge"])
    assert results["round_1_masks"]["crf_miou"] > 0
    made, learned = Index.load(run / "round_1_masks"), Index.load(run / "irn_masks")
    photos = Index.load(_root(run))
    place = {str(key): i for i, key in enumerate(photos.keys)}
    for ordinal, key in enumerate(made.keys):
        labels = {0, *(np.flatnonzero(ShardReader(photos).labels(place[str(key)])) + 1).tolist()}
        found, taught = set(np.unique(_mask(made, ordinal)).tolist()), set(np.unique(_mask(learned, ordinal)).tolist())
        assert found <= labels
        assert found >= (taught & labels) - {0}  # what it loses stands in from what it learned
    again = train(config, *options)
    assert again.stdout.count("done before with these settings, skipped") == len(STAGES) + 2


def _root(run: Path) -> str:
    return str(yaml.safe_load((run / "resolved.yaml").read_text())["data"]["root"])


def test_saliency_from_a_folder_decides_the_background(
    config: Path, one: Path, shard_set: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(one, tmp_path / "run"))
    source = Index.load(str(shard_set))
    maps = tmp_path / "saliency"
    maps.mkdir()
    for key in source.keys[1:]:
        Image.new("L", (64, 64), 0).save(maps / f"{key}.png")
    options = ("--set", f"run_dir={run}", "--set", "tracking.uri=none", "--stages", "seed_masks")
    options += ("--set", "saliency.source=folder", "--set", f"saliency.folder={maps}")
    lacking = train(config, *options)
    assert lacking.returncode == 2
    absent = maps / f"{source.keys[0]}.png"
    assert f"saliency.folder = {maps} lacks 1 of 56 maps, the first is {absent.name}" in lacking.stderr
    Image.new("L", (64, 64), 0).save(absent)
    assert train(config, *options).returncode == 0
    made = Index.load(str(run / "seed_masks"))
    for ordinal in range(len(made)):  # a background of 1 beats every class, or three channels make void
        with Image.open(io.BytesIO(ShardReader(made).read(ordinal, "mask.png"))) as mask:
            assert set(np.unique(np.asarray(mask)).tolist()) <= {0, 255}


def test_truth_that_is_all_void_is_not_scored(config: Path, tmp_path: Path) -> None:
    void = synthetic_source(8, 4, 64, seed=0)
    png = encode_mask(np.full((64, 64), 255, np.uint8))
    create(replace(void, read=lambda key: {**void.read(key), "mask.png": png}), str(tmp_path / "void"))
    stages = ["classify", "localize", "seed_masks", "psa_labels", "segment", "evaluate"]
    options = ["--set", f"stages=[{', '.join(stages)}]", "--set", "segment.masks=seed_masks"]
    options += ["--set", f"data.root={tmp_path / 'void'}", "--set", "tracking.uri=none"]
    done = train(config, *options, "--set", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert list(results) == stages
    assert not {"plain_miou", "cam_miou"} & {key for own in results.values() for key in own}


def test_expand_starts_from_decide_where_the_run_has_it(config: Path, one: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(one, tmp_path / "run"))
    classified, decided, expanded = (load_file(run / s / "model.safetensors") for s in ("classify", "decide", "expand"))
    for name in ("kernel", "classifier"):
        assert np.array_equal(expanded[name], decided[name])
        assert not np.array_equal(decided[name], classified[name])
    assert "decide_miou" in json.loads((run / "results.json").read_text())["localize"]
    stages = [stage for stage in MAIN_LINE if stage not in ("decide", "seed_masks")]
    options = ["--set", f"run_dir={run}", "--set", "tracking.uri=none", "--set", f"stages=[{', '.join(stages)}]"]
    done = train(config, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("settings, skipped") == 1  # classify
    assert "expand: runs again, its input decide changed" in done.stdout
    assert np.array_equal(load_file(run / "expand/model.safetensors")["kernel"], classified["kernel"])
    results = json.loads((run / "results.json").read_text())["localize"]
    assert "decide_miou" not in results
    assert {"cam_miou", "expand_miou", "shrink_miou"} <= results.keys()


def test_data_workers_that_are_not_forked_change_no_bit(config: Path) -> None:
    """macOS spawns them, Python 3.14 has a forkserver: what they are given, label maps too, goes through pickle."""
    code = "import multiprocessing, runpy, sys; multiprocessing.set_start_method(sys.argv[1]); del sys.argv[:2]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    learned = {}
    for method in ("fork", "spawn", "forkserver"):
        overrides = (f"run_dir=runs/{method}", "tracking.uri=none", "stages=[segment]", "segment.masks=truth")
        options = [part for text in overrides for part in ("--set", text)]
        done = launch([sys.executable, "-c", code, method], config, *options)
        assert done.returncode == 0, done.stderr
        learned[method] = (config.parent / "runs" / method / "segment/model.safetensors").read_bytes()
    assert learned["spawn"] == learned["forkserver"] == learned["fork"]


@pytest.mark.parametrize(
    ("launcher", "stages"),
    [([*ACCELERATE, "1"], MAIN_LINE[:2]), ([*ACCELERATE, "2"], STAGES)],
    ids=["one", "two"],
)
def test_every_launcher_gives_the_same_numbers(config: Path, one: Path, launcher: list[str], stages: list[str]) -> None:
    run_dir = f"runs/{abs(hash(tuple(launcher)))}"
    options = ("--set", f"run_dir={run_dir}", "--set", "tracking.uri=none", "--stages", ",".join(stages))
    done = launch(launcher, config, *options)
    assert done.returncode == 0, done.stderr
    other = config.parent / run_dir
    for stage in set(TRAINING) & set(stages):
        ours, theirs = (load_file(d / stage / "model.safetensors") for d in (one, other))
        worst = max(float(np.abs(ours[key] - theirs[key]).max()) for key in ours)
        # psa and irn start from classify's backbone, 2e-6 apart by AdamW, and from labels of which a pixel may differ
        # for it; the gradient of IRN's displacement loss is made of signs
        assert worst < {"psa": 1e-4, "irn": 3e-3}.get(stage, 1e-5), f"{stage}: {worst}"
    a, b = (json.loads((d / "results.json").read_text()) for d in (one, other))
    if "localize" in stages:
        assert a["localize"]["cam_miou"] == pytest.approx(b["localize"]["cam_miou"], abs=0.2)
    for stage in {"seed_masks", "psa_masks", "irn_masks", "evaluate"} & set(stages):
        assert a[stage]["crf_miou"] == pytest.approx(b[stage]["crf_miou"], abs=0.2)
        assert Index.load(str(one / stage)).keys.tolist() == Index.load(str(other / stage)).keys.tolist()


def test_one_class_and_photos_without_it_go_through_every_stage(config: Path, tmp_path: Path) -> None:
    """Photos without the class have no label and no mask: they are learned from, and all background."""
    scenes = synthetic_source(40, 8, 64, seed=0)

    def read(key: str) -> dict[str, bytes]:
        sample = scenes.read(key)
        levels = np.asarray(Image.open(io.BytesIO(sample["mask.png"]))) == 2
        about = json.loads(sample["json"]) | {"labels": ["fish"] if levels.any() else []}
        sample |= {"json": json.dumps(about).encode(), "mask.png": encode_mask(levels.astype(np.uint8))}
        return sample if levels.any() else {k: v for k, v in sample.items() if k != "mask.png"}

    create(replace(scenes, classes=("fish",), read=read), str(tmp_path / "fish"))
    index, run = Index.load(tmp_path / "fish"), tmp_path / "run"
    assert index.labels is not None
    options = ["--set", f"data.root={tmp_path / 'fish'}", "--set", f"run_dir={run}", "--set", "localize.write=auto"]
    options += ["--set", "segment.masks=auto", "--set", "psa_labels={}", "--set", "irn_labels={}"]
    done = train(config, *options, "--set", "tracking.uri=none", "--set", "classify.duration=2 steps")
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "results.json").read_text())
    assert results["localize"]["write"] in ("cam", "decide", "expand", "shrink")
    assert "localize: writes the maps of " in done.stdout
    judged = {name: results[name]["judge"] for name in ("seed_masks", "psa_masks", "irn_masks")}
    assert results["segment"]["masks"] == results["evaluate"]["masks"] == max(judged, key=judged.__getitem__)
    empty = ~index.labels[:, 0]
    assert 0 < empty.sum() < len(index)
    for name in judged:
        made = Index.load(run / name)
        place = {str(key): i for i, key in enumerate(made.keys)}
        masks = [ShardReader(made).read(place[str(key)], "mask.png") for key in index.keys[empty]]
        assert not any(np.asarray(Image.open(io.BytesIO(mask))).any() for mask in masks)
    # truth of the photos without a label is background: there is more of it than in the drawn masks
    assert {"iou_background", "iou_fish"} <= results["psa_masks"].keys()


def test_two_processes_choose_the_maps_that_one_chooses(config: Path, one: Path, tmp_path: Path) -> None:
    found = []
    for name, start in (("plain", train), ("two", partial(launch, TWO_RANKS))):
        run = Path(shutil.copytree(one, tmp_path / name))
        options = ("--set", f"run_dir={run}", "--set", "tracking.uri=none", "--set", "localize.write=auto")
        done = start(config, *options, "--stages", "localize")
        assert done.returncode == 0, done.stderr
        results = json.loads((run / "results.json").read_text())["localize"]
        found.append({key: value for key, value in results.items() if key == "write" or key.endswith("_judge")})
    assert found[0] == found[1]
    assert len(found[0]) == 5
