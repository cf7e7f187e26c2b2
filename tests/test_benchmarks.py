"""The runner of benchmarks: its table, what differs by too much, what is missing, and how work is counted."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import runner, stages
from benchmarks.rows import HEADINGS, Comparison, Photos, Row, measure

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (9 + number, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96, 72)).save(tmp_path / f"{number}.jpg")
    return tmp_path


def test_every_row_has_both_times_their_ratio_and_how_far_apart_they_are(folder: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "walk", "thresholds", "cam", "--data", str(folder)]
    sizes = ["--rounds", "2", "--photos", "2", "--long-side", "64"]
    done = subprocess.run([*command, *sizes], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert not done.returncode, done.stdout + done.stderr
    table = done.stdout.split(" | ".join(HEADINGS))[1].splitlines()[2:]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("|")]
    assert [line[0] for line in lines] == ["walk", "cam", "cam", "thresholds"]
    assert [line[1].split(", ")[-1] for line in lines[1:3]] == ["bf16", "float32"]
    for _, _, ours, other, middle, spread, apart, allowed in lines:
        least, most = (float(side) for side in spread.split(" to "))
        assert float(ours) > 0
        assert float(other) > 0
        assert least <= 1.01 * float(middle) <= 1.02 * most  # of three digits
        assert float(apart) <= float(allowed)


def test_a_difference_that_is_too_large_stands_out_and_what_is_missing_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = Photos(folder, 2, 32, folder / "made")
    assert [max(Image.open(path).size) for path in photos.paths] == [32, 32]
    ours = {"near": lambda: 1.0, "far": lambda: 3.0}
    case = Comparison("", lambda: 1.5, ours, lambda mine, want: abs(mine - want), {"near": 0.6, "far": 0.6})
    near, far = measure("made up", Row("", "", lambda photos: iter([case])), photos, 1)
    assert near[-2:] == ["5.0e-01", "6e-01"]
    assert far[-2:] == ["**1.5e+00**", "6e-01"]

    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    (line,) = measure("crf", runner.ROWS["crf"], photos, 1)
    assert line[1] == "not run: pydensecrf2 is missing: pip install 'esol[crf-oracle]', which needs a compiler"
    assert len(line) == len(HEADINGS)


def test_all_rows_where_none_is_named_and_exit_1_where_two_ways_differ(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Comparison("", lambda: 1.0, {"": lambda: 3.0}, lambda mine, want: abs(mine - want), {"": 0.5})
    monkeypatch.setattr(runner, "ROWS", {"made up": Row("mine", "theirs", lambda photos: iter([case]))})
    monkeypatch.setattr(stages, "ceilings", lambda side, gibibytes: {"fp32": 1e12, "bf16": 2e12, "copy": 3e9})
    monkeypatch.setattr(stages, "lines", lambda photos, rounds, most: iter([["a stage"] * len(stages.HEADINGS)]))
    sizes = ["--data", str(folder), "--photos", "2", "--long-side", "32", "--rounds", "1"]
    with pytest.raises(SystemExit, match="differ by more than is allowed"):
        runner.main(sizes)
    said = capsys.readouterr().out
    assert "| made up | mine | theirs |" in said
    assert "1 TFLOP/s in float32 and 2 in bf16; a copy of" in said
    assert "| a stage | a stage |" in said
    with pytest.raises(SystemExit):
        runner.main(["walks", *sizes])
    assert "there is no row walks: the rows are made up, stages" in capsys.readouterr().err


def test_work_is_counted_with_its_gradient_and_views_are_free() -> None:
    a, b, out = torch.ones(4, 8), torch.ones(8, 16), torch.empty(4, 16)
    sizes = 4 * 8 + 8 * 16 + 4 * 16
    assert stages.counted(lambda: torch.mm(a, b)) == (2 * 4 * 8 * 16, 4 * sizes)
    assert stages.counted(lambda: (a.t()[2:].unsqueeze(0), torch.empty(9))) == (0, 0)
    assert stages.counted(lambda: out.add_(1)) == (0, 2 * out.nbytes)
    learning = b.clone().requires_grad_()
    assert stages.counted(lambda: torch.mm(a, learning).sum().backward())[0] == 2 * 2 * 4 * 8 * 16
    x, kernel = (torch.ones(2, 8, 10, 10, requires_grad=True), torch.ones(8, 1, 3, 3, requires_grad=True))
    forward = 2 * (2 * 8 * 10 * 10) * 9
    assert stages.counted(lambda: F.conv2d(x, kernel, padding=1, groups=8))[0] == forward
    assert stages.counted(lambda: F.conv2d(x, kernel, padding=1, groups=8).sum().backward())[0] == 3 * forward
