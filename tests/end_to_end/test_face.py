"""esol from Python: the pages' code runs as it stands, mistakes are named, and the import is light and typed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import ROOT

import esol
from esol.base.errors import CheckpointError, DataError, EsolError

PAGE = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
TOUR = json.loads((ROOT / "docs/tour.ipynb").read_text())
CELLS = ["".join(cell["source"]) for cell in TOUR["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("code", [PAGE, CELLS], ids=["python.md", "tour.ipynb"])
def test_the_pages_code_runs(code: list[str], one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(one)
    names: dict[str, object] = {}
    for block in code:
        exec(block, names)
    assert names["prediction"].mask.shape == (64, 64)  # type: ignore[attr-defined]
    assert abs(sum(names["prediction"].shares.values()) - 1) < 1e-4  # type: ignore[attr-defined]


def test_a_run_reads_what_its_stages_wrote(one: Path) -> None:
    run = esol.open_run(one)
    assert run.results == json.loads((one / "results.json").read_text())
    assert run.scores["evaluate"]["crf"].miou == pytest.approx(run.results["evaluate"]["crf_miou"])
    key = run.photos("val")[0]
    maps = run.maps(key)
    assert list(maps) == ["cam", "decide", "expand", "shrink"]
    assert set(maps["cam"]) == set(run.labels(key))
    assert all(values.shape == (64, 64) and 0 <= values.min() <= values.max() <= 1 for values in maps["cam"].values())
    assert run.mask("irn_labels", key).shape == (64, 64)
    assert run.plot(key).width > run.plot(key).height
    assert "classify, decide" in repr(run)
    with pytest.raises(CheckpointError, match=r"has no masks of 'psa', but of: seed_masks, affinity_masks, psa_labels"):
        run.mask("psa", key)
    with pytest.raises(DataError, match="has made no mask of"):
        run.mask("evaluate", run.photos("train")[0])
    with pytest.raises(DataError, match="has no split vall, but train, val"):
        run.photos("vall")
    with pytest.raises(EsolError, match="has no finished stage"):
        esol.open_run(one / "classify")


def test_a_model_takes_files_pictures_and_arrays(one: Path, tmp_path: Path) -> None:
    run, model = esol.open_run(one), esol.load_model(one, fast=True)
    pixels = run.photo(run.photos("val")[0])
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    masks = [model.predict(photo).mask for photo in (pixels, Image.fromarray(pixels), tmp_path / "photo.png")]
    assert all(np.array_equal(masks[0], other) for other in masks[1:])
    with pytest.raises(DataError, match=r"nowhere.jpg: cannot be read"):
        model.predict("nowhere.jpg")
    with pytest.raises(DataError, match=r"a photo must be uint8 \(H, W, 3\), not float64"):
        model.predict(np.zeros((4, 4, 3)))  # type: ignore[arg-type]


def test_import_is_light_and_a_users_file_is_typed(tmp_path: Path) -> None:
    code = (
        "import sys, esol; print('torch' in sys.modules, sorted(n for n in dir(esol) if n in esol.__all__))\n"
        "import esol.deploy.model, esol.report.run; print({'mlflow', 'deepspeed', 'accelerate'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    first, second = done.stdout.splitlines()
    assert first == "False ['__version__', 'load_config', 'load_model', 'open_run', 'run']"
    assert second == "set()"
    theirs = tmp_path / "theirs.py"
    theirs.write_text(
        "import esol\n\nrun = esol.open_run('runs/demo')\nwidth: int = run.photo(run.photos('val')[0]).shape[1]\n"
        "shares: dict[str, float] = esol.load_model('runs/demo').predict('photo.jpg').shares\n"
        "wrong: int = run.plot('a')\n"
    )
    ours = tmp_path / "mypy.ini"  # what others' libraries say of themselves is not asked, which takes a minute
    ours.write_text("[mypy]\nfollow_imports = silent\n[mypy-torch.*,torchvision.*]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ours), str(theirs)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    assert "theirs.py:6: error: Incompatible types in assignment" in said
    assert "Found 1 error" in said
