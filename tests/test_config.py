"""Configs: what is read, what is refused and how the message reads, and that the shipped files load."""

import dataclasses
from pathlib import Path

import pytest
from config_page import page

from esol.base.errors import ConfigError
from esol.base.schema import fingerprint
from esol.config import Config, Duration
from esol.pipeline import config_file

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return config_file.load(path, ["run_dir=r", "data.root=d", *overrides])


def test_values_ranges_and_numbers(tmp_path: Path) -> None:
    made = load(tmp_path, "classify: {lr: 1e-4}\ndata: {long_side: [320, 640]}", "expand.bound=2", "seed=7")
    assert made.classify.lr == 1e-4  # YAML 1.1 alone reads this as text
    assert made.expand.bound == 2.0
    assert isinstance(made.expand.bound, float)
    assert (made.seed, made.data.long_side, made.model.weights) == (7, (320, 640), "")
    assert load(tmp_path, "", "model.weights=none").model.weights == "none"


def test_resolved_yaml_reads_back_equal(tmp_path: Path) -> None:
    made = load(tmp_path, "expand: {duration: 30 steps}", "localize.scales=[1.0, 1.5]", "tracking.uri=none")
    path = tmp_path / "resolved.yaml"
    path.write_text(config_file.to_yaml(made))
    assert config_file.load(path) == made


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("clasify: {}", [], "unknown key clasify: did you mean classify?"),
        ("expand: {bond: 1}", [], "unknown key expand.bond: did you mean expand.bound?"),
        ("", ["expand.zzzz=1"], "unknown key expand.zzzz: known: duration"),
        ("expand: {alpha: many}", [], "expand.alpha = 'many': must be a number"),
        ("data: {crop: 5.5}", [], "data.crop = 5.5: must be a whole number"),
        ("data: {crop: true}", [], "data.crop = True: must be a whole number"),
        ("data: {crop: 8}", [], r"data.crop = 8: must lie between 16 and 4096 \(pixels\)"),
        ("classify: {lr: .nan}", [], "classify.lr = nan: must lie between"),
        ("data: {long_side: [640, 320]}", [], r"data.long_side = \[640, 320\]: the first must not exceed"),
        ("data: {long_side: 320}", [], "data.long_side = 320: must be a list"),
        ("localize: {scales: []}", [], "localize.scales is empty"),
        ("engine: {precision: fp61}", [], "engine.precision = 'fp61': must be one of .*; did you mean fp16?"),
        ("classify: {duration: 5 weeks}", [], "classify.duration = '5 weeks': write it as '5 epochs', '6000 images'"),
        ("classify: {duration: '5 epochs, 9 to 8 images'}", [], "classify.duration = '5 epochs, 9 to 8 images': write"),
        (
            "model: {kernel_channels: 0}",
            [],
            "model.kernel_channels = 0 is the plain CAM network, which decide cannot use",
        ),
        ("data: 3", [], "--set data.root: data is a value"),
        ("a: [", [], "is not valid YAML"),
        ("seed: 1\nseed: 2", [], r"is not valid YAML: the key seed is given twice \(line 2, column 1\)"),
        ("expand: {lr: 1, lr: 1}", [], "the key lr is given twice"),
        ("", ["expand={lr: 1, lr: 2}"], "--set expand: .* the key lr is given twice"),
        (
            "stages: [classify, localize]\nlocalize: {write: shrink}",
            [],
            "localize.write = shrink, but stages has no shr",
        ),
        ("- a", [], "expected keys and values at the top level, got list"),
        ("", ["seed"], "--set 'seed': write it as a.b=value"),
        ("", ["run_dir=s3://bucket/run"], r"run_dir = 's3://bucket/run': it must be a local folder"),
        ("data: {cache: $ESOL_NOWHERE/x}", [], r"data.cache = .*: environment variable ESOL_NOWHERE is not set"),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text, *overrides)


def test_missing_file_and_missing_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config .*nowhere.yaml"):
        config_file.load(tmp_path / "nowhere.yaml")
    (tmp_path / "old.yaml").write_bytes("run_dir: r\n# café\n".encode("cp1252"))
    with pytest.raises(ConfigError, match=r"old.yaml is not UTF-8 text \(line 2: .*\): save it as UTF-8"):
        config_file.load(tmp_path / "old.yaml")
    (tmp_path / "c.yaml").write_text("run_dir: r")
    with pytest.raises(ConfigError, match=r"data.root is missing: .* --set data.root="):
        config_file.load(tmp_path / "c.yaml")


def test_one_section_with_other_defaults_in_two_places(tmp_path: Path) -> None:
    loaded = load(tmp_path, "psa_labels: {crf: {iterations: 3}}")
    assert (loaded.psa_labels.crf.iterations, loaded.psa_labels.crf.bilateral_sxy) == (3, 80)
    assert (loaded.psa_masks.crf.iterations, loaded.psa_masks.crf.bilateral_sxy) == (10, 50)
    assert loaded.irn_labels.crf.bilateral_sxy == 50


def test_variables_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESOL_PLACE", "/there")
    assert load(tmp_path, "", "data.root=${ESOL_PLACE}/x").data.root == "/there/x"
    assert load(tmp_path, "", "data.root=${ESOL_NOWHERE:-here}/x").data.root == "here/x"


def test_fingerprint_ignores_what_does_not_change_results(tmp_path: Path) -> None:
    base = load(tmp_path, "")
    other = dataclasses.replace(base, data=dataclasses.replace(base.data, workers=7, root="elsewhere"))
    assert fingerprint(base.data) == fingerprint(other.data)
    assert fingerprint(base.data) != fingerprint(dataclasses.replace(base.data, crop=64))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_load_and_begin_with_their_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESOL_WEIGHTS", "w")
    config_file.load(path)
    first = path.read_text().splitlines()[0]
    assert first.startswith("# accelerate launch ")
    assert f"configs/{path.name}" in first


def test_durations_are_epochs_images_or_steps_within_bounds() -> None:
    def steps(text: str, photos: int, batch: int = 16) -> int:
        return Duration.parse(text, "x").steps(batch, photos // batch)

    assert [steps("5 epochs", 160), steps("6000 images", 160), steps("400 steps", 160)] == [50, 375, 400]
    bounds = "5 epochs, 6000 to 200000 images"
    assert [steps(bounds, photos) for photos in (60, 3200, 80_000)] == [375, 1000, 12_500]
    # half the batch: twice the steps, so that as many images are seen
    assert [steps(bounds, photos, 8) for photos in (60, 3200, 80_000)] == [750, 2000, 25_000]
    assert steps("5 epochs, 1 to 160 images", 3200) == 10


def test_the_page_of_all_keys_is_what_the_sections_say_and_every_key_says_what_it_is() -> None:
    made = page()
    shown = (CONFIGS[0].parents[1] / "docs/config.md").read_text()
    assert shown == made, "python tests/config_page.py > docs/config.md"
    assert [line for line in made.splitlines() if line.endswith("|  |")] == []
