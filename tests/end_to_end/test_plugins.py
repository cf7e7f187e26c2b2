"""What docs/extending.md shows, taken out of the page and installed outside the tree, runs under two processes."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from tiny import BIN, ROOT, TWO_RANKS, esol, launch, train

PAGE = (ROOT / "docs/extending.md").read_text()
FILES = dict(re.findall(r"```python\n# (my_esol/\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
CONFIG = """
data: {train_split: train, mask_split: train, score_split: train, long_side: [64, 64], crop: 48, workers: 0}
model: {backbone: stripes-net, weights: none, output_stride: 8, freeze: none, kernel_channels: 16}
stages: [classify, expand, shrink, localize, seed_masks, areas, power_masks, vote_masks]
classify: {duration: 20 steps, global_batch: 8, lr_batch: 8, optimizer: adamw, lr: 0.001, head_lr: 1}
expand: {duration: 2 steps, global_batch: 8, lr_batch: 8}
shrink: {duration: 2 steps, global_batch: 8, lr_batch: 8, area_term: square}
localize: {scales: [1.0]}
areas: {small: 0.1}
power_masks: {power: 1.5}
engine: {threads: 1}
tracking: {uri: none, pictures: 2}
"""


def install(folder: Path) -> Path:
    """The package as pip leaves it: its modules, and what it says of itself."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "my_esol/__init__.py").write_text("".join(f"import my_esol.{Path(n).stem}\n" for n in FILES))
    about = folder / "my_esol-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-esol\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[esol.plugins]\nmy_esol = my_esol\n")
    return folder


def shards(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(site)))}
    command = [str(BIN / "esol-shards"), "create", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=site, timeout=120)


def test_each_is_one_file_of_at_most_forty_lines() -> None:
    assert len(FILES) == 6
    assert {name: len(text.splitlines()) for name, text in FILES.items() if len(text.splitlines()) >= 40} == {}


def test_an_installed_package_adds_one_of_each(tmp_path: Path) -> None:
    site = install(tmp_path)
    made = shards(site, "stripes", "--count", "40", "--samples-per-shard", "10", "--out", str(tmp_path / "data"))
    assert made.returncode == 0, made.stderr
    config = tmp_path / "config.yaml"
    config.write_text(f"run_dir: {tmp_path}/run\n" + CONFIG.replace("data: {", f"data: {{root: {tmp_path}/data, "))
    done = launch(TWO_RANKS, config, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert list(results) == re.findall(r"\w+", re.search(r"stages: \[(.*)\]", CONFIG)[1])  # type: ignore[index]
    assert 0 <= results["areas"]["small"] <= 100
    assert 0 < results["areas"]["covered"] < 100
    for stage in ("seed_masks", "power_masks", "vote_masks"):
        assert 0 < results[stage]["crf_right"] <= 100
        assert "judge" in results[stage]
    report = esol("report", "--full", "--markdown", tmp_path / "run")
    assert "| pseudo masks | seed_masks | power_masks | vote_masks |" in report.stdout  # without the package
    more = train(config, "--set", "areas.small=0.2", PYTHONPATH=str(site))
    assert "areas: runs again, areas.small: 0.1 -> 0.2" in more.stdout
    assert more.stdout.count("done before with these settings, skipped") == 7


@pytest.mark.parametrize("plugins", ["[my_esol.areas]", "[nowhere]", "nowhere"])
def test_a_config_names_modules_of_the_folder_that_it_is_started_in(tmp_path: Path, plugins: str) -> None:
    install(tmp_path)
    (tmp_path / "my_esol-1.0.dist-info/entry_points.txt").unlink()
    (tmp_path / "my_esol/__init__.py").write_text("")
    config = tmp_path / "config.yaml"
    config.write_text(f"run_dir: run\nplugins: {plugins}\nareas: {{smal: 1}}\ndata: {{root: nowhere}}\n")
    done = train(config)
    assert done.returncode == 2
    wanted = {
        "[my_esol.areas]": "unknown key areas.smal: did you mean areas.small?",
        "[nowhere]": "plugin nowhere cannot be imported (ModuleNotFoundError: No module named 'nowhere')",
        "nowhere": "plugins = 'nowhere': must be a list of modules",
    }
    assert wanted[plugins] in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_stage_that_stands_behind_its_reader_is_refused(tmp_path: Path) -> None:
    install(tmp_path)
    power = tmp_path / "my_esol/power.py"
    power.write_text(power.read_text().replace('after = "seed_masks"', 'after = "vote_masks"'))
    config = tmp_path / "config.yaml"
    config.write_text("run_dir: run\ndata: {root: nowhere}\n" + re.search(r"stages: .*", CONFIG)[0])  # type: ignore[index]
    done = train(config, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "stages: vote_masks reads power_masks, which stands behind it: give it another `after`" in done.stderr
