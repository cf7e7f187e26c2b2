"""What a run will need is missed before its first step, and all of it at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.pipeline import needs
from esol.pipeline.config_file import from_tree
from esol.pipeline.registry import table
from esol.stages.classify import odd_classes

SMALL = {"backbone": "small", "weights": "none", "output_stride": 8, "freeze": "none"}
Lacking = Callable[..., list[str]]


@pytest.fixture(scope="module")
def index(shard_set: Path) -> Index:
    return Index.load(str(shard_set))


@pytest.fixture
def lacking(index: Index, tmp_path: Path) -> Lacking:
    """What all stages lack under a config with these sections."""

    def look(ranks: int = 1, stages: tuple[str, ...] = tuple(table()), **sections: Any) -> list[str]:
        tree: dict[str, Any] = {"run_dir": str(tmp_path / "run"), "data": {"root": index.root}, "model": SMALL}
        tree["segment"] = {"model": {"backbone": "small", "weights": "none"}}
        config = from_tree(tree | {"irn": {"global_batch": 8}} | sections)
        return [str(error) for error in needs.missing(config, index, stages, ranks)]

    return look


def test_nothing_is_missing_and_nothing_is_written_or_drawn(lacking: Lacking, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    assert lacking() == []
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(before, torch.get_rng_state())  # the other ranks do not look


def test_labels_that_nothing_can_be_learned_of(index: Index, lacking: Lacking) -> None:
    assert index.labels is not None
    train, labels = index.split("train"), index.labels.copy()
    labels[train] = False
    object.__setattr__(index, "labels", labels)
    try:
        (none,) = lacking()
        assert none.startswith("data.train_split = train: none of its 48 photos in ")
        assert lacking(stages=("psa_labels",)) == []
        labels[train, 2] = True
        reader = ShardReader(index)
        assert odd_classes(reader, "train") == [
            "warning: no photo of train is labelled cactus, fish, rocket, snail: nothing is learned of 4 classes",
            "warning: every photo of train is labelled mushroom, so that nothing shows what is not; "
            "add photos without it, with an empty label",
        ]
        labels[train[:9]] = [1, 1, 0, 1, 1]
        assert odd_classes(reader, "train") == []
    finally:
        object.__setattr__(index, "labels", Index.load(index.root).labels)


def test_weights_of_a_later_stage(lacking: Lacking, tmp_path: Path) -> None:
    later = {"model": {"backbone": "resnet50", "weights": "/nope.pth"}}
    (absent,) = lacking(segment=later)
    assert absent.startswith("segment.model.weights = /nope.pth: no such file; put torchvision's resnet50-")
    small = {"model": {"backbone": "timm:tf_efficientnet_lite0", "weights": "/nope.safetensors"}}
    (file,) = lacking(segment=small)  # the file has the name of a key's section
    assert file.startswith("segment.model.weights = /nope.safetensors: no such file; put model.safetensors of timm/")
    assert lacking(segment=later, stages=("classify", "psa")) == []  # stages that are done need none
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    (other,) = lacking(model={"backbone": "resnet50", "weights": str(tmp_path / "w.safetensors")})
    assert f"model.weights: {tmp_path}/w.safetensors does not fit model.backbone = resnet50: lacks " in other


def test_batches_that_cannot_be_shared_or_filled(lacking: Lacking) -> None:
    found = lacking(ranks=9)
    assert [text.split(":")[0] for text in found] == ["psa", "irn"]  # segment's 10 images are shared
    assert found[0].startswith("psa: global_batch = 8 is too small for 9 processes")
    assert "psa: the training split has 48 samples, fewer than one" in lacking(psa={"global_batch": 100})[0]


def test_saliency_maps_and_true_masks(lacking: Lacking, index: Index, tmp_path: Path) -> None:
    (none,) = lacking(saliency={"source": "shards"})
    assert "saliency.source = shards, but 48 of 48 photos" in none
    maps = tmp_path / "maps"
    (gone,) = lacking(saliency={"source": "folder", "folder": str(maps)})
    assert gone == f"saliency.folder = {maps}: there is no such folder"
    maps.mkdir()
    for key in index.keys[index.split("train")][1:]:
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(maps / f"{key}.png")
    (one,) = lacking(saliency={"source": "folder", "folder": str(maps)})
    assert one == f"saliency.folder = {maps} lacks 1 of 48 maps, the first is {index.keys[index.split('train')][0]}.png"
    truth = {"masks": "truth", "model": {"backbone": "small", "weights": "none"}}
    assert lacking(segment=truth) == []


def test_a_disk_that_is_too_small(lacking: Lacking, monkeypatch: pytest.MonkeyPatch) -> None:
    full = type("usage", (), {"free": 10_000})
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda place: full)
    (text,) = lacking()
    assert "has 0.0 GiB of disk left" in text
    assert "classify, decide, expand, shrink, localize" in text
    assert lacking(stages=("seed_masks",)) == []  # 48 small masks fit into that
