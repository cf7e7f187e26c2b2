"""`esol auto` on small folders: what it says before anything slow, what it writes, that it goes on."""

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tiny import BIN, esol

from esol.base import exits
from esol.base.errors import ConfigError
from esol.data.index import Index
from esol.pipeline import estimate
from esol.pipeline.auto import _make_shards, look, plan
from esol.pipeline.recipe import CHAIN, Initial, Machine, Photos, config_text, this_machine
from shards.synthetic import synthetic_source


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the small backbone's names, of random numbers: the real one is no part of the project."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    state = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    save_file(state, folder / "tf_efficientnet_lite0.safetensors")
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes in folders by class, four of them of none."""
    root = tmp_path_factory.mktemp("scenes") / "photos"
    source = synthetic_source(12, 0, 64, seed=0)
    for number, key in enumerate(source.splits["train"]):
        folder = root / ("cactus", "fish", "none")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{key}.jpg").write_bytes(source.read(key)["jpg"])
    (root / "fish/broken.jpg").write_bytes(b"no photo")
    return root


def test_without_weights_it_says_so_at_once(scenes: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    environment = {k: v for k, v in os.environ.items() if k != "ESOL_WEIGHTS"}
    environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "https://nowhere.invalid"}
    command = [BIN / "esol", "auto", scenes, "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert time.monotonic() - begun < 10  # two seconds on a machine that does nothing else
    assert done.returncode == 2
    assert "error: there are no initial weights: tf_efficientnet_lite0.safetensors is not in the folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        ({}, "holds no photo, neither in folders by class"),
        ({"cat": 3}, "3 photos to learn from are too few"),
        ({"cat": 6}, "every photo is labelled cat, so that nothing shows what is not"),
        ({"cat": 3, "cats": 3}, "'cat' and 'cats' look like one class"),
    ],
)
def test_photos_that_teach_nothing_are_refused(
    weights: Path, tmp_path: Path, folders: dict[str, int], words: str
) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for name, count in folders.items():
        (root / name).mkdir()
        for number in range(count):
            Image.new("RGB", (64, 48), (number * 20, 80, 10)).save(root / name / f"{number}.png")
    done = esol("auto", root, "--out", tmp_path / "run", ESOL_WEIGHTS=str(weights))
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_from_folders_to_masks_and_a_page_and_again(scenes: Path, weights: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    stages = [stage for stage in CHAIN if stage.startswith(("classify", "decide", "localize", "seed", "psa"))]
    photos, machine = Photos(12, 64, {"train": 12}, masks=False), Machine(False, 2)
    initial = Initial("timm:tf_efficientnet_lite0", str(weights / "tf_efficientnet_lite0.safetensors"))
    text = config_text(run, photos, machine, initial, stages, (1.0, 1.0), "why")
    text = re.sub(r"duration: [^,}\n]*(,[^}\n]*images\")?", "duration: 2 steps", text)  # as somebody's edits would be
    (run / "config.yaml").write_text(text)
    first = esol("auto", scenes, "--out", run, ESOL_WEIGHTS=str(weights))
    assert first.returncode == 0, first.stderr
    assert "photos labelled none show none of the classes" in first.stdout
    assert "fish/broken.jpg: unreadable image" in first.stdout
    assert "warning: 4 photos of cactus are few" in first.stdout
    assert f"goes on with {run / 'config.yaml'}" in first.stdout
    assert f"to look at: {run / 'report.html'}" in first.stdout
    assert f"masks: {run / 'psa_masks'}" in first.stdout or f"masks: {run / 'seed_masks'}" in first.stdout
    assert "esol auto" in first.stdout.split("next:")[1]
    assert (run / "report.html").stat().st_size > 50_000
    again = esol("auto", scenes, "--out", run, ESOL_WEIGHTS=str(weights))
    assert again.returncode == 0, again.stderr
    assert "made before of these photos, kept" in again.stdout
    assert again.stdout.count("settings, skipped") == len(stages)


def test_the_end_of_making_shards_is_not_the_end_of_the_run(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """launch/entrypoint.sh ends what has noted 0 and goes on with nothing."""
    monkeypatch.setenv(exits.NOTED, str(tmp_path / "code"))
    assert _make_shards(str(scenes), tmp_path, "", (), 64) == 0
    assert not (tmp_path / "code").exists()


def _once(work: Callable[..., Any]) -> Callable[..., Any]:
    """The work, of which later calls get the first one's answer."""
    found: list[Any] = []

    def answer(*arguments: Any) -> Any:
        if not found:
            found.append(work(*arguments))
        return found[0]

    return answer


def test_what_does_not_fit_the_time_is_left_out(
    shard_set: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "measure", _once(estimate.measure))  # one machine is measured once
    index, machine = Index.load(str(shard_set)), this_machine("cpu")
    photos = look(index)
    initial = Initial("timm:tf_efficientnet_lite0", str(weights / "tf_efficientnet_lite0.safetensors"))

    def planned(minutes: float | None) -> tuple[list[str], str]:
        text, lines = plan(tmp_path, index, photos, machine, initial, minutes)
        return yaml.safe_load(text)["stages"], "\n".join(lines)

    assert planned(None)[0] == list(CHAIN)
    stages, said = planned(0.1)
    assert "segment" not in stages
    assert "psa_masks" in stages
    assert "without shrink, irn, segment, for which 0.1 minutes are too short; training is 40% as long" in said
    assert "warning: this is more than --minutes 0.1, and nothing more can be left out" in said


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        assert this_machine("cuda").gpu
    else:
        with pytest.raises(ConfigError, match="--device cuda: this machine shows no NVIDIA GPU"):
            this_machine("cuda")


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("count", [5, 60, 20_000])
def test_every_recipe_is_a_config(gpu: bool, count: int, tmp_path: Path) -> None:
    from esol.pipeline.config_file import load

    photos = Photos(count, 1024, {"train": count, "val": 9}, masks=True)
    machine = Machine(gpu, 8)
    text = config_text(tmp_path / "run", photos, machine, Initial("resnet50", ""), CHAIN, (0.4, 0.25), "why")
    (tmp_path / "config.yaml").write_text(text)
    config = load(tmp_path / "config.yaml")
    assert config.stages == CHAIN
    assert config.data.eval_split == "val"
    assert config.named("classify").global_batch <= count
