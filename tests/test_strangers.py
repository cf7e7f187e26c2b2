"""Files that a stranger sent: they stay data, what is written stays in its folder, what is shown is text."""

import io
import json
import os
import re
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from benchmarks.fuzz_kinds import make_set
from benchmarks.fuzz_runs import MARKUP, SECRET, use, whole
from esol import train
from esol.base import exits
from esol.base.errors import CheckpointError, ConfigError, DataError, EsolError
from esol.base.files import atomic_write, hold
from esol.base.progress import progress
from esol.base.strangers import content, json_tree, refuse_links
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.transforms import decode
from esol.deploy.export import copy_picture
from esol.deploy.mask_formats import Png
from esol.deploy.model import load_network
from esol.pipeline import records
from esol.pipeline.config_file import load
from esol.pipeline.made import read_arrays
from esol.pipeline.model_file import read_info
from esol.report.page.page import write_page
from esol.report.tables import aligned, results_table
from esol.tracking import ui
from esol.tracking.mlflow_store import for_good
from esol.training.checkpoint import verify


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield whole(tmp_path_factory.mktemp("sent"))
    whole.cache_clear()


@pytest.fixture
def run(sent: Path, tmp_path: Path) -> Path:
    """A copy of the run, beside its photos and a folder with a secret."""
    root = Path(shutil.copytree(sent, tmp_path / "sent"))
    for path in root.glob("run/*/manifest.json"):
        path.write_text(path.read_text().replace(str(sent), str(root)))
    return root / "run"


def edit(path: Path, change: Callable[[Any], object]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def page(run: Path) -> str:
    config = records.ran_with(run, "evaluate")
    index = Index.load(config.data.root)
    return write_page(run, config, index, ShardReader(index), lambda doing: None).read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 10**6, "nested"),
        ("1e999", "inf is no number"),
        ("NaN", "nan is no number"),
        ("9" * 400, "64 bits"),
        ("9" * 5000, "digits"),
        (r'"\ud800"', "surrogates"),
    ],
)
def test_json_is_what_every_reader_can_deal_with(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        json_tree(text)
    assert json_tree('{"a": [1, 2.5, null, "\\u00e9"]}') == {"a": [1, 2.5, None, "é"]}


def test_pipes_devices_and_huge_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)
    for path, words in ((tmp_path / "pipe", "no file"), (Path("/dev/zero"), "no file"), (tmp_path / "huge", "bytes")):
        with pytest.raises(ValueError, match=words):
            content(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(stage="../../outside"),
        lambda m: m.update(stage=MARKUP),
        lambda m: m["outputs"].update({"../../outside/secret": {"bytes": 1, "sha256": ""}}),
        lambda m: m["outputs"].update({"/dev/zero": {"bytes": 0, "sha256": ""}}),
        lambda m: m["results"].update(judge="high"),
        lambda m: m["results"].update(seconds=10**400),
        lambda m: m["results"].update(masks=[["x"]]),
        lambda m: m.update(scored={}),
        lambda m: m.update(consumed={"data": 5}),
        lambda m: m.update(config=[]),
    ],
)
def test_a_manifest_that_no_stage_has_written_is_refused(run: Path, change: Callable[[Any], object]) -> None:
    edit(run / "seed_masks/manifest.json", change)
    with pytest.raises(CheckpointError, match=r"seed_masks/manifest\.json is damaged"):
        results_table(run)


def test_an_output_without_end_is_not_waited_for(run: Path) -> None:
    for target in ("/dev/zero", "/dev/null"):
        (run / "segment/model.safetensors").unlink()
        (run / "segment/model.safetensors").symlink_to(target)
        edit(run / "segment/manifest.json", lambda m: m["outputs"]["model.safetensors"].update(bytes=0))
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read \(it is no file\)"):
            load_network(run)


@pytest.mark.parametrize("plugin", ["strange_plugin", "antigravity", "http.server", "pip.__main__"])
def test_a_run_brings_no_code(run: Path, plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "strange_plugin.py").write_text("open('it_ran', 'w')\n")
    edit(run / "evaluate/manifest.json", lambda m: m["config"].update(plugins=[plugin]))
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])  # as in the esol command
    with pytest.raises(CheckpointError, match=rf"the config in the manifest of evaluate .* plugin {plugin}"):
        load_network(run)
    assert not (run / "it_ran").exists()


def test_no_variable_of_the_reader_goes_into_an_address(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", SECRET)
    root = "http://127.0.0.1:9/${A_TOKEN}/~"
    edit(run / "evaluate/manifest.json", lambda m: m["config"]["data"].update(root=root))
    assert records.ran_with(run, "evaluate").data.root == root


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (secret := tmp_path / "secret").write_text(SECRET)
    (tmp_path / "lock").symlink_to(secret)
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(secret)
    with pytest.raises(OSError, match="symbolic links"):
        hold(tmp_path / "lock", 0)
    with pytest.raises(OSError, match="symbolic links"):
        atomic_write(tmp_path / "file", b"x")
    (tmp_path / "run/features").mkdir(parents=True)
    refuse_links(tmp_path / "run", tmp_path / "nowhere")
    os.mkfifo(tmp_path / "run/pipe")
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        refuse_links(tmp_path / "run")
    assert secret.read_text() == SECRET


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "report_files", "classify"])
def test_a_run_that_goes_on_neither_writes_nor_deletes_outside(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = run.parent / "outside"
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside if name in ("report_files", "classify") else outside / "secret")
    config = run.parent / "again.yaml"
    tree = json.loads((run / "evaluate/manifest.json").read_text())["config"]
    small = {"model": {"backbone": "small", "weights": "none", "output_stride": 8, "freeze": "none"}}
    small |= {"classify": {"global_batch": 2, "lr_batch": 2}}
    config.write_text(yaml.safe_dump({"run_dir": str(run), "stages": ["classify"], "data": tree["data"], **small}))
    monkeypatch.setattr(sys, "argv", ["train", "--config", str(config), "--set", "tracking.uri=none"])
    assert train.main() == exits.MEND
    assert f"{run / name} is a link to" in capsys.readouterr().err
    assert [path.read_text() for path in outside.iterdir()] == [SECRET]


def test_the_page_runs_no_script_of_a_strangers(run: Path) -> None:
    clean = page(run)
    assert str(run.parent) not in clean
    (run / "report_files/seed_masks-0000.js").write_text(f"ESOL.add(...[]);</script>{MARKUP}")
    edit(run / "report_files/photos.json", lambda n: n.update(thumbs=[f"</script>{MARKUP}"]))
    (run / "metrics.jsonl").write_text(
        json.dumps({"stage": MARKUP, "step": 1, "metrics": {"loss": 1.0}}) + "\n"
        + json.dumps({"stage": MARKUP, "step": 2, "metrics": {"loss": 2.0}}) + '\n{"loss"' + "[" * 10**5 + "\n"
        + json.dumps({"stage": {}, "step": "x", "metrics": {"loss": "y"}})
    )  # fmt: skip
    again = page(run)
    assert MARKUP not in again
    assert "Loss of &lt;img" in again
    assert "\\u003c/script>" in again
    (run / "report_files/photos-0000.js").unlink()
    (run / "report_files/photos-0000.js").symlink_to(run.parent / "outside/secret")
    with pytest.raises(CheckpointError, match=r"photos-0000\.js is a link"):
        page(run)


def test_exports_name_no_folder_of_the_machine_and_tables_and_cards_hold_text(run: Path, tmp_path: Path) -> None:
    for path in (run / "evaluate/manifest.json", run / "seed_masks/manifest.json"):
        edit(path, lambda m: m["results"].update({"initial_weights": f"{MARKUP}|\x1b[31m", f"lost_{MARKUP}": 1.0}))
    said, refused = use(run, run.parent / "photos", tmp_path / "out")
    assert refused == []
    assert "\\<img src=x onerror=alert(1)\\>\\|\\\\x1b\\[31m" in said
    card = (tmp_path / "out/card/README.md").read_text()
    assert "\\<img src=x onerror=alert(1)\\>\\|" in card
    for path in [path for path in (tmp_path / "out").rglob("*") if path.is_file()]:
        assert str(run.parent).encode() not in path.read_bytes()


def test_tables_stay_tables_whatever_the_names_are() -> None:
    table = aligned("| class | IoU |\n|---|---|\n| a\\|b\\<c | 1 |\n| d | 22 |")
    assert table.splitlines()[1:] == ["a|b<c    1", "d       22"]


def test_a_link_in_the_place_of_the_picture_is_not_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_picture(run, tmp_path)
    assert Image.open(tmp_path / "evaluate.png").size == (64, 48)
    (tmp_path / "evaluate.png").unlink()
    picture = run / "pictures/evaluate.png"
    shutil.copy(picture, run.parent / "outside/private.png")
    for target in ("secret", "private.png"):
        picture.unlink()
        picture.symlink_to(run.parent / "outside" / target)
        copy_picture(run, tmp_path)
        assert "a link that leads out of the run" in capsys.readouterr().out
        assert not (tmp_path / "evaluate.png").exists()


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise EsolError("class \x1b[31mred\x07\n  second line \u202e")

    assert exits.entry(fail) == exits.MEND
    with progress("a", 1, "photos", visible=True) as advance:
        advance(1, "key\x1b]0;owned\x07")
    said = capsys.readouterr().err
    assert "error: class \\x1b[31mred\\x07\n  second line \\u202e\n" in said
    assert "key\\x1b]0;owned\\x07\n" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i: i["classes"].__setitem__(0, "red\x1b[31m"), "characters that are no text"),
        (lambda i: i["splits"].update({"../../x": [0]}), "is no plain name"),
        (lambda i: i["shards"][0]["keys"].__setitem__(0, "../../x"), "is no plain path"),
        (lambda i: i["shards"][0]["keys"].__setitem__(0, "/etc/passwd"), "is no plain path"),
        (lambda i: i["shards"][0].update(name="../x.tar"), "is not a plain file name"),
    ],
)
def test_names_in_a_shard_set_stay_in_their_folder(tmp_path: Path, change: Callable[[Any], object], words: str) -> None:
    root = make_set(tmp_path / "set")
    edit(root / "index.json", change)
    with pytest.raises(DataError, match=rf"index\.json is damaged: .*{words}"):
        Index.load(root)
    with pytest.raises(DataError, match="no place below"):
        Png(tmp_path / "out", ("a",)).save("masks/../../x.png", b"")


def test_sizes_that_files_only_claim_take_no_memory(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG")
    data = out.getvalue()
    at = data.index(b"\xff\xc0") + 5
    bomb = data[:at] + struct.pack(">HH", 65000, 65000) + data[at + 4 :]
    for one in (bomb, bomb[:2] + b"\0\xff\0" + bomb[2:]):  # bytes between markers, which decoders pass over
        with pytest.raises(DataError, match="x: the "):
            decode(one, "x")
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as file:
        for name in "abcde":
            file.writestr(f"{name}.npy", b"")
    packed = bytearray((tmp_path / "bomb.npz").read_bytes())
    for entry in re.finditer(b"PK\x01\x02", bytes(packed)):
        packed[entry.start() + 24 : entry.start() + 28] = struct.pack("<I", 2**31)  # its size when it is unpacked
    with pytest.raises(ValueError, match="unpacks to 10,737,418,240 bytes"):
        read_arrays(io.BytesIO(packed))
    root = make_set(tmp_path / "set")

    def claim(tree: Any) -> None:
        tree["shards"][0]["bytes"] = 1 << 50
        tree["shards"][0]["members"]["json"][0][1] = 1 << 45

    edit(root / "index.json", claim)
    with pytest.raises(DataError, match="the shard ends before it"):
        ShardReader(Index.load(root)).labels(0)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(classes=["a"] * 10**6),
        lambda h: h.update(classes=["\x1b[31m"]),
        lambda h: h.update(rates=[10**9]),
        lambda h: h.update(photo_side=0),
        lambda h: h.update(photo_side="x"),
        lambda h: h.update(masks={}),
        lambda h: h.update(evaluate={"scales": [1e9]}),
        lambda h: h.update(classes={"a": [[[]]]}, more=1),
    ],
)
def test_the_header_of_a_model_is_checked_before_a_network_is_built(run: Path, change: Callable[[Any], object]) -> None:
    path = run / "segment/model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    about = json.loads(header["__metadata__"]["esol"])
    change(about)
    header["__metadata__"]["esol"] = json.dumps(about)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    with pytest.raises(CheckpointError, match="is no DeepLab that esol wrote"):
        read_info(path)


def test_a_header_that_claims_a_gigabyte_and_a_pipe_are_no_models(run: Path) -> None:
    path = run / "segment/model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 30) + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_info(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="is no file"):
        read_info(path)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{BOMB}seed: *a9", "aliases"),
        ("seed: &a [*a]", "nested too deeply"),
        ("seed: " + "[" * 5000, "nested too deeply"),
        ("seed: " + "9" * 5000, "digits"),
        ("seed: 2001-99-99", "month"),
        ("seed: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("plugins: 5", "must be a list of modules"),
    ],
)
def test_yaml_has_an_end_and_no_objects(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load(path)


def test_a_checkpoint_names_its_own_files_alone(tmp_path: Path) -> None:
    (tmp_path / "step-3").mkdir()
    (tmp_path / "secret").write_text(SECRET)
    good = {"format": "esol-checkpoint 1", "step": 3, "notes": {}, "files": {}}
    changes: tuple[dict[str, Any], ...] = (
        {"files": {"../secret": {"bytes": len(SECRET), "sha256": ""}}},
        {"files": {"/dev/zero": {"bytes": 0, "sha256": ""}}},
        {"files": []},
        {"step": 4},
        {"notes": 5},
    )
    for change in changes:
        (tmp_path / "step-3/manifest.json").write_text(json.dumps(good | change))
        with pytest.raises(CheckpointError, match="step-3 is damaged"):
            verify(tmp_path / "step-3")
    (tmp_path / "step-3/manifest.json").write_text("[" * 10**6)
    with pytest.raises(CheckpointError, match="step-3 is damaged"):
        verify(tmp_path / "step-3")


@pytest.mark.parametrize(
    "state", ["[]", "{}", "[" * 10**5, '{"uri": 5, "parent": "x"}', '{"uri": "x", "parent": "../x"}']
)
def test_notes_for_mlflow_are_checked_before_a_server_is_asked(tmp_path: Path, state: str) -> None:
    (tmp_path / "mlflow.json").write_text(state)
    with pytest.raises(EsolError, match=r"mlflow\.json is damaged"):
        ui.where(tmp_path)
    assert for_good(OverflowError("a time without end"))


def test_the_page_of_threats_names_tests_that_exist() -> None:
    root = Path(__file__).parents[1]
    rows = [line for line in (root / "docs/security.md").read_text().splitlines() if "::" in line]
    assert len(rows) > 25
    for row in rows:
        _, threat, happens, test, _ = (cell.strip() for cell in row.split("|"))
        assert threat, row
        assert happens, row
        file, _, name = test.partition("::")
        assert f"\ndef {name}(" in (root / file).read_text(), test
