"""Tables, verdicts and pictures of a run, and what localize says about its shards."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from esol.base.errors import EsolError
from esol.base.palette import voc_palette
from esol.base.schema import finite
from esol.pipeline import records
from esol.pipeline.inference import advice_on_shards
from esol.pipeline.registry import table
from esol.pipeline.scores import Results, Scores
from esol.report.pictures import heat, paint, sheet
from esol.report.tables import aligned, results_table, short_report, verdicts

SEEDS = {
    "cam": Scores("val", 40.0, 0.5, 0.5, 0.5),
    "cam_at_cam": Scores("val", 40.0, 60.0, 50.0, 0.5),
    "expand": Scores("val", 38.0, 0.5, 0.5, 0.5),
    "expand_at_cam": Scores("val", 38.0, 45.0, 60.5, 0.5),
    "shrink": Scores("val", 42.0, 0.5, float("nan"), 0.5),
    "shrink_at_cam": Scores("val", 42.0, 44.0, 55.0, 0.5),
}


def test_verdicts_say_what_happened_whichever_way_it_went() -> None:
    expand, shrink = verdicts(SEEDS)
    assert "recall up at the CAM's threshold (50.0 -> 60.5); mIoU down" in expand
    assert "precision down at the CAM's threshold (45.0 -> 44.0); mIoU up" in shrink
    assert verdicts({"cam": SEEDS["cam"]}) == []


def write(run_dir: Path, name: str, makes: str, own: Results) -> None:
    """A stage of a run of which only the results matter."""
    (run_dir / name).mkdir(exist_ok=True)
    place = list(table()).index(name)
    results, scored = finite(own.flat()), finite(own.tree())
    manifest = records.Manifest(name, place, makes, 1, "", {}, {}, {}, results, scored, {}, 1, {}, "")
    text = json.dumps({"format": records.FORMAT, **asdict(manifest)})
    (run_dir / name / records.MANIFEST).write_text(text)


def test_table_of_a_run_and_of_a_folder_that_is_none(tmp_path: Path) -> None:
    write(tmp_path, "classify", "weights", Results(others={"loss": 0.12345}))
    write(tmp_path, "localize", "maps", Results(SEEDS))
    said = results_table(tmp_path)
    assert "| classify | loss | 0.1235 |" in said
    assert "| miou | 40 | 38 | 42 |" in said
    assert "| recall | 0.5 | 0.5 | - |" in said  # what could not be measured
    assert "| seeds of cam, best threshold 0.50 | val | 40.00 |" in said
    both = {"plain": Scores("val", 50.0, 70.0, 70.0, 0.5), "crf": Scores("val", 55.0, 70.0, 70.0, 0.5)}
    write(tmp_path, "seed_masks", "masks", Results(both))
    write(tmp_path, "irn_masks", "masks", Results({"plain": Scores("val", 60.0, 70.0, 70.0, "auto")}))
    classes = {"cat": {"iou": 61.0, "recall": 70.0}}
    last = {"plain": Scores("val", 65.432, 80.0, 75.0, classes=classes)}
    about = {"masks": "irn_masks", "initial_weights": "ImageNet (resnet101, x.pth)"}
    write(tmp_path, "evaluate", "predictions", Results(last, about, "plain"))
    said = results_table(tmp_path)
    assert "| pseudo masks | seed_masks | irn_masks |" in said
    assert "| plain_miou | 50 | 60 |" in said
    assert "| crf_miou | 55 |  |" in said
    deeplab = "| DeepLab, learned from irn_masks | val | 65.43 | 80.00 | 75.00 | ImageNet (resnet101, x.pth) |"
    assert deeplab in said.splitlines()
    assert "| seed_masks at threshold 0.5 + CRF | " in said
    assert "| cat | 61.00 | - | 70.00 |" in said
    with pytest.raises(EsolError, match=r"nowhere has no finished stage: is it the folder of a run\?"):
        results_table(tmp_path / "nowhere")


def test_a_short_report_has_a_line_for_each_stage_and_says_what_the_judge_takes(tmp_path: Path) -> None:
    write(tmp_path, "classify", "weights", Results(others={"loss": 0.12345, "seconds": 90.0}))
    write(tmp_path, "localize", "maps", Results(others={"write": "expand", "expand_judge": 2.5, "seconds": 30.0}))
    write(tmp_path, "seed_masks", "masks", Results(others={"judge": 2.0, "lost": 0.0}))
    scores = {"crf": Scores("val", 55.126, 70.0, 70.0)}
    write(tmp_path, "psa_masks", "masks", Results(scores, {"judge": 3.0, "lost": 12.4}, "crf"))
    assert aligned(short_report(tmp_path)).splitlines() == [
        "stage       seconds  judge   mIoU",
        "classify         90                loss 0.123",
        "localize         30   2.50         hands on the maps of expand",
        "seed_masks        0   2.00",
        "psa_masks         0   3.00  55.13  the judge's choice; 12 % of the labels lost",
        "",
        "2.0 minutes in all",
        f"the judge, which needs no drawn masks, takes psa_masks before seed_masks: {tmp_path / 'psa_masks'}",
    ]


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
