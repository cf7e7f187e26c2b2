"""When a stage counts as done: everything that it came from still stands, up to the photos."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from esol.base.errors import CheckpointError, EsolError
from esol.config import Config, DataConfig, SaliencyConfig
from esol.pipeline import records
from esol.pipeline.config_file import from_tree
from esol.pipeline.registry import Stage, config_type
from esol.pipeline.scores import Results
from esol.pipeline.store import Store
from esol.report.tables import results_table

CHAIN = ("classify", "expand", "localize", "seed_masks")  # each reads the one before it


def table(**versions: int) -> dict[str, type[Stage]]:
    def stage(number: int, name: str) -> type[Stage]:
        row = {
            "name": name,
            "section": object,
            "needs": CHAIN[max(0, number - 1) : number],
            "shaped_by": ("saliency",) if name == "seed_masks" else (),
            "makes": {"localize": "maps", "seed_masks": "masks"}.get(name, "weights"),
            "produces": ("*.tar", "index.json"),
            "version": versions.get(name, 1),
        }
        return type(name, (Stage,), row)

    return {name: stage(number, name) for number, name in enumerate(CHAIN)}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return config_type()(run_dir=str(tmp_path / "run"), data=DataConfig(root="shards"), stages=CHAIN)


def make(config: Config, *names: str, content: str = "", **versions: int) -> Store:
    """Finishes stages as their code would."""
    made = Store(config, table(**versions), "photos")
    for name in names or CHAIN:
        folder = made.run_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("shard-0.tar", "shard-1.tar", "index.json"):
            (folder / file).write_text(f"{name} {file} {content}")
        made.finish(name, Results(others={"miou": 50.0, "threshold": float("nan")}), 1)
    return made


def test_a_finished_chain_is_current_and_its_manifests_are_all_that_a_reader_needs(config: Config) -> None:
    made = make(config)
    assert made.plan(CHAIN) == []
    assert records.ran_with(made.run_dir, "segment", "localize") == config
    assert records.outdated(made.run_dir) == []
    strict = json.loads((made.run_dir / "results.json").read_text(), parse_constant=pytest.fail)
    assert strict == records.results(made.run_dir)
    assert list(strict) == list(CHAIN)
    assert strict["localize"] == {"miou": 50.0, "threshold": None}
    assert "| localize" not in results_table(made.run_dir)  # of what was not scored nothing is shown, and nothing fails


@pytest.mark.parametrize("file", ["shard-1.tar", "index.json"])
@pytest.mark.parametrize("how", ["missing", "not what was written"])
def test_a_lost_or_damaged_file_is_noticed_by_the_stage_and_by_all_that_read_it(
    config: Config, file: str, how: str
) -> None:
    made = make(config)
    path = made.run_dir / "localize" / file
    text = path.read_text()
    path.unlink() if how == "missing" else path.write_text("x" + text[1:])  # of the same size
    assert how in made.state("localize").why
    assert f"its input localize is out of date (its {file} is {how})" in made.state("seed_masks").why
    assert made.plan(CHAIN) == ["localize", "seed_masks"]
    with pytest.raises(CheckpointError, match=rf"seed_masks needs localize .* its {file} is {how}: add localize to"):
        made.plan(["seed_masks"])
    path.write_text(text)  # the same bytes again: nothing behind it has to run
    assert made.plan(CHAIN) == []


def test_a_stage_is_current_only_if_everything_it_came_from_is(config: Config) -> None:
    make(config)
    other = replace(config, expand=replace(config.expand, bound=3.0))
    made = make(other, "expand")
    assert made.state("expand").why == ""
    assert made.state("localize").why == "its input expand changed"
    assert made.state("seed_masks").why == "its input localize is out of date (its input expand changed)"
    with pytest.raises(CheckpointError, match=r"seed_masks needs localize .*: add localize to --stages"):
        made.plan(["seed_masks"])
    back = Store(config, table(), "photos")
    with pytest.raises(CheckpointError, match=r"its input expand is out of date|expand, localize to --stages"):
        back.plan(["seed_masks"])
    assert records.outdated(made.run_dir) == [
        "localize was made from an earlier expand",
        "seed_masks was made from a localize that is itself out of date",
    ]
    assert "out of date: localize was made from an earlier expand" in results_table(made.run_dir)
    make(config)
    with pytest.raises(
        CheckpointError, match=r"needs expand .* its input classify is out of date .*: add expand, localize to"
    ):
        Store(replace(config, classify=replace(config.classify, lr=0.3)), table(), "photos").plan(
            ["classify", "seed_masks"]
        )


def test_other_photos_other_code_and_other_saliency_maps_are_reasons_to_run_again(
    config: Config, tmp_path: Path
) -> None:
    make(config)
    assert Store(config, table(), "other photos").plan(CHAIN) == list(CHAIN)
    newer = Store(config, table(localize=2), "photos")
    assert newer.state("localize").why == "its code changed (version 1 -> 2)"
    assert newer.plan(CHAIN) == ["localize", "seed_masks"]
    maps = tmp_path / "maps"
    maps.mkdir()
    (maps / "a.png").write_bytes(b"1")
    salient = replace(config, saliency=SaliencyConfig(source="folder", folder=str(maps)))
    make(salient, "seed_masks")
    assert Store(salient, table(), "photos").plan(CHAIN) == []
    (maps / "a.png").write_bytes(b"2")
    assert Store(salient, table(), "photos").state("seed_masks").why == "its input saliency changed"


def test_damaged_and_foreign_manifests(config: Config) -> None:
    made = make(config)
    path = made.run_dir / "expand" / records.MANIFEST
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"format": "esol-stage 1"}))
    assert made.state("expand").why == "another version of esol made it"
    assert "expand" not in records.results(made.run_dir)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged .*: delete .*expand to run the stage again"):
        made.plan(CHAIN)
    with pytest.raises(EsolError, match="has no finished stage: is it the folder of a run"):
        records.results(made.run_dir / "expand")
    (made.run_dir / "localize" / "shard-0.tar").unlink()
    with pytest.raises(CheckpointError, match=r"localize is damaged, its shard-0.tar is missing: run localize again"):
        records.need(made.run_dir, "localize")


def test_the_config_in_a_manifest_reads_back_equal(config: Config) -> None:
    assert from_tree(json.loads(json.dumps(make(config, "classify").state("classify").manifest.config))) == config
