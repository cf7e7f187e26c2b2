"""Tables, verdicts and pictures of a run, and what localize says about its shards."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esol.base.errors import EsolError
from esol.base.palette import voc_palette
from esol.pipeline import store
from esol.pipeline.inference import advice_on_shards
from esol.report.pictures import heat, paint, sheet
from esol.report.tables import results_table, verdicts

SEEDS = {
    **{f"{s}_{m}": 0.5 for s in ("cam", "expand", "shrink") for m in ("threshold", "precision", "recall")},
    "cam_miou": 40.0, "expand_miou": 38.0, "shrink_miou": 42.0,
    "cam_at_cam_recall": 50.0, "expand_at_cam_recall": 60.5, "shrink_at_cam_recall": 55.0,
    "cam_at_cam_precision": 60.0, "expand_at_cam_precision": 45.0, "shrink_at_cam_precision": 44.0,
}  # fmt: skip


def test_verdicts_say_what_happened_whichever_way_it_went() -> None:
    expand, shrink = verdicts(SEEDS)
    assert "recall up at the CAM's threshold (50.0 -> 60.5); mIoU down" in expand
    assert expand.endswith("It does what it is for here.")
    assert "precision down at the CAM's threshold (45.0 -> 44.0); mIoU up" in shrink
    assert shrink.endswith("It does not do what it is for here.")
    assert verdicts({"cam_miou": 40.0}) == []


def write(run_dir: Path, results: dict[str, Any]) -> None:
    """A run of which only the results matter."""
    for name, own in results.items():
        (run_dir / name).mkdir(exist_ok=True)
        manifest = store.Manifest(name, 1, "", {}, {}, {}, own, {}, 1, {}, "")
        text = json.dumps({"format": store.FORMAT, **asdict(manifest)})
        (run_dir / name / store.MANIFEST).write_text(text)


def test_table_of_a_run_and_of_a_folder_that_is_none(tmp_path: Path) -> None:
    write(tmp_path, {"classify": {"loss": 0.12345}, "localize": SEEDS | {"shrink_recall": None}})
    table = results_table(tmp_path)
    assert "| classify | loss | 0.1235 |" in table
    assert "| miou | 40 | 38 | 42 |" in table
    assert "| recall | 0.5 | 0.5 | - |" in table  # what could not be measured
    masks: dict[str, Any] = {
        "seed_masks": {"threshold": 0.5, "plain_miou": 50.0, "crf_miou": 55.0},
        "irn_masks": {"threshold": 0.25, "plain_miou": 60.0},
    }
    for own in masks.values():
        own |= {f"{kind}_{name}": 70.0 for kind in ("plain", "crf") for name in ("precision", "recall")}
    evaluate = {
        "plain_miou": 65.432,
        "plain_precision": 80.0,
        "plain_recall": 75.0,
        "iou_cat": 61.0,
        "recall_cat": 70.0,
    }
    evaluate |= {"masks": "irn_masks", "split": "val", "initial_weights": "ImageNet (resnet101, x.pth)"}
    write(tmp_path, {**masks, "evaluate": evaluate})
    table = results_table(tmp_path)
    assert "| pseudo masks | seed_masks | irn_masks |" in table
    assert "| plain_miou | 50 | 60 |\n| crf_miou | 55 |  |" in table
    said = "| DeepLab, learned from irn_masks | val | 65.43 | 80.00 | 75.00 | ImageNet (resnet101, x.pth) |"
    assert said in table.splitlines()
    assert "| seed_masks at threshold 0.5 + CRF | " in table
    assert "| cat | 61.00 | - | 70.00 |" in table
    with pytest.raises(EsolError, match=r"nowhere has no finished stage: is it the folder of a run\?"):
        results_table(tmp_path / "nowhere")


def test_pictures() -> None:
    assert voc_palette()[[0, 1, 15, 255]].tolist() == [[0, 0, 0], [128, 0, 0], [192, 128, 128], [224, 224, 192]]
    photo = np.full((10, 20, 3), 100, np.uint8)
    shown = heat(photo, np.linspace(0, 1, 200).reshape(10, 20))
    assert shown.shape == photo.shape
    assert shown.astype(int).sum(2)[0, 0] < shown.astype(int).sum(2)[-1, -1]  # brighter where the map is higher
    mask = np.zeros((10, 20), np.uint8)
    mask[:, 10:] = 1
    painted = paint(photo, mask).astype(int)
    assert (painted[:, 10:, 0] > painted[:, 10:, 1]).all()  # class 1 is red
    assert (painted[:, :10, 0] == painted[:, :10, 1]).all()
    picture = sheet([("one", [photo, shown]), ("two", [photo, shown])], ["a", "b"])
    assert picture.width > 2 * 200
    assert picture.height > 2 * 100


def test_more_processes_than_shards_names_the_size_to_re_shard_to() -> None:
    assert advice_on_shards("localize", 4, 100, 4) == ""
    assert "lies in 3 shards, fewer than 8 processes" in advice_on_shards("localize", 3, 100, 8)
    assert "--samples-per-shard 12 or fewer" in advice_on_shards("localize", 3, 100, 8)
