"""The page of a run, without a browser: what it holds, what it escapes, what it makes again."""

import json
import re
import sys
from pathlib import Path

import pytest

from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.report.page.charts import bars, confusion, lines
from esol.report.page.page import FIRST, PAGE, least_trusted, write_page

sys.path.insert(0, str(Path(__file__).parent / "page"))
from fake_run import fake_run


def written(run_dir: Path, config: object) -> str:
    index = Index.load(config.data.root)  # type: ignore[attr-defined]
    return write_page(run_dir, config, index, ShardReader(index), lambda doing: None).read_text()  # type: ignore[arg-type]


def test_a_small_run_is_one_file_that_needs_nothing_else(tmp_path: Path) -> None:
    run, config = fake_run(tmp_path, 12)
    page = written(run, config)
    assert not re.search(r"(src|href)=(?!\"?(data:|#))", page.replace("${", ""))
    assert "<b>cow</b>" not in page.replace("\\u003cb>cow\\u003c/b>", "")
    about = json.loads(re.search(r"const ABOUT=(.*);\n", page)[1])  # type: ignore[index]
    assert [layer["name"] for layer in about["layers"]] == ["photos", "localize", "seed_masks", "psa_masks", "truth"]
    assert about["layers"][1]["sources"] == ["cam", "expand"]
    assert about["best"] == "psa_masks"
    assert [photo["labels"] for photo in about["photos"][:3]] == [[], [1], [0]]
    assert about["photos"][7]["iou"] == 100.0 > about["photos"][6]["iou"]
    assert "1 photos without any object" in page or "2 photos without any object" in page
    assert "12 photos, 2 classes" in page
    assert (run / FIRST).read_text().splitlines()[0] == "photo,judge,classes that its mask lacks"


def test_only_what_changed_is_made_again_and_without_truth_nothing_is_scored(tmp_path: Path) -> None:
    run, config = fake_run(tmp_path, 6, masks=False)
    page = written(run, config)
    assert '"truth"' not in page
    assert "worst IoU first" not in page
    times = {path: path.stat().st_mtime_ns for path in (run / "report_files").iterdir()}
    (run / PAGE).unlink()
    manifest = json.loads((run / "psa_masks/manifest.json").read_text())
    (run / "psa_masks/manifest.json").write_text(json.dumps(manifest | {"fingerprint": "another"}))
    written(run, config)
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {"psa_masks.json", "psa_masks-0000.js"}


def test_photos_that_lack_a_class_are_drawn_first_then_those_of_low_judge() -> None:
    assert least_trusted([3.0, None, 1.0, 2.0], [[], None, [], [1]]) == [3, 2, 0]


@pytest.mark.parametrize("chart", ["lines", "bars", "confusion"])
def test_charts_escape_and_pass_over_what_is_not_a_number(chart: str) -> None:
    nan = float("nan")
    drawn = {
        "lines": lambda: lines("<t>", {"<s>": [(0, 1), (1, nan), (2, 3)], "one": [(0, 1)]}, "x", "y"),
        "bars": lambda: bars("<t>", {"<s>": 2.0, "none": nan}, "%"),
        "confusion": lambda: confusion("<t>", [[1, 1], [0, 0]], ["<s>", "b"]),
    }[chart]()
    assert "&lt;s&gt;" in drawn
    assert "&lt;t&gt;" in drawn
    assert "<s>" not in drawn
    assert "nan" not in drawn
    assert lines("t", {"one": [(0, 1)]}, "x", "y") == bars("t", {"none": nan}, "%") == ""
