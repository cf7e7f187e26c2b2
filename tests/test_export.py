"""Export and create folder are inverses; damage is named and left out; no key leads out of the folder."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esol.base.palette import voc_palette
from esol.data.index import Index, write_index
from esol.data.reader import ShardReader
from esol.data.samples import encode_mask, encode_png, write_mirror_shard
from shards import cli
from shards.export import PARTS

CLASSES = ("big, cat", "dog")


def photo(kind: str, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (10, 20, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def levels(seed: int) -> np.ndarray:
    numbers = [0, 2, 255] if seed == 2 else [0, 1, 2, 255]  # that of photos which are labelled dog alone
    return np.random.default_rng(seed).choice(np.array(numbers, np.uint8), (10, 20))


def sample(key: str, seed: int, kind: str = "jpg", **members: bytes) -> dict:
    about = {"labels": [CLASSES[seed % 2]] if seed else list(CLASSES), "height": 10, "width": 20}
    image = photo({"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[kind], seed)
    return {"__key__": key, kind: image, "json": json.dumps(about).encode()} | members


def make(root: Path, samples: list[dict], splits: dict[str, list[int]] | None = None) -> Path:
    records = [
        write_mirror_shard(root, f"shard-{i:06d}.tar", samples[start : start + 3])
        for i, start in enumerate(range(0, len(samples), 3))
    ]
    write_index(root, CLASSES, {"train": range(len(samples))} if splits is None else splits, records)
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(root: Path, out: Path, *words: str) -> int:
    return cli.main(["export", str(root), "--out", str(out), *words])


def content(root: Path) -> dict[str, tuple]:
    index = Index.load(root)
    reader = ShardReader(index)
    found = {}
    for name, ordinals in index.splits.items():
        for i in map(int, ordinals):
            there = index.members["mask.png"][i, 0] >= 0
            mask = np.asarray(Image.open(io.BytesIO(reader.read(i, "mask.png")))).tolist() if there else None
            found[str(index.keys[i])] = (name, reader.image(i), reader.read(i, "json"), mask)
    return found


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two shards: three photo formats, masks as palette and as gray PNG or none, two splits, a further member."""
    gray = encode_png(Image.fromarray(levels(2)))
    samples = [
        sample("a", 0, **{"mask.png": encode_mask(levels(1)), "part.png": gray}),
        sample("b", 1, "png", **{"mask.png": gray}),
        sample("c", 2, "webp"),
        sample("d", 3, "jpg", **{"mask.png": gray}),
    ]
    return make(tmp_path / "set", samples, {"train": [0, 1, 3], "val": [2]})


def test_export_then_create_gives_the_same_set(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, again = tmp_path / "plain", tmp_path / "again"
    assert run(mixed, out) == 0
    said = capsys.readouterr().out
    assert "4 images, 3 masks" in said
    assert "members part.png" in said
    assert list(files(out)) == [
        *("classes.txt", "images/a.jpg", "images/b.png", "images/c.webp", "images/d.jpg", "labels.csv"),
        *("masks/a.png", "masks/b.png", "masks/d.png"),
    ]
    rows = list(csv.reader((out / "labels.csv").open()))
    assert rows[:2] == [["image", "labels", "split"], ["a.jpg", "big, cat;dog", "train"]]
    assert (out / "masks/a.png").read_bytes() == encode_mask(levels(1))
    with Image.open(out / "masks/b.png") as mask:  # gray in the shard
        assert mask.mode == "P"
        assert mask.getpalette() == voc_palette().ravel().tolist()
        assert (np.asarray(mask) == levels(2)).all()
    assert cli.main(["create", "folder", str(out), "--out", str(again)]) == 0
    assert content(again) == content(mixed)
    assert Index.load(again).classes == CLASSES


def test_a_created_set_comes_back_byte_for_byte(mixed: Path, tmp_path: Path) -> None:
    for name, source in (("one", mixed), ("two", tmp_path / "set1")):
        assert run(source, tmp_path / name) == 0
        out = tmp_path / ("set1" if name == "one" else "set2")
        assert cli.main(["create", "folder", str(tmp_path / name), "--out", str(out)]) == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert files(tmp_path / "set1") == files(tmp_path / "set2")


def test_pseudo_masks_of_a_run_give_masks_and_classes(tmp_path: Path) -> None:
    samples = [{"__key__": f"k{i}", "mask.png": encode_mask(levels(i)), "scores.npz": b"x"} for i in range(4)]
    root = make(tmp_path / "masks", samples, {"train": [0, 1, 2], "train_aug": [0, 1, 2, 3]})  # may overlap here
    assert run(root, tmp_path / "plain") == 0
    found = files(tmp_path / "plain")
    assert found == {f"masks/k{i}.png": encode_mask(levels(i)) for i in range(4)} | {"classes.txt": b"big, cat\ndog\n"}
    assert run(root, tmp_path / "train", "--split", "train") == 0
    assert len(files(tmp_path / "train")) == 4


def test_overlapping_splits_are_exported_one_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path / "set", [sample(k, i) for i, k in enumerate("abcd")], {"train": [0, 1], "val": [1, 2]})
    assert run(root, tmp_path / "plain") == 2
    assert "1 samples are in train and in val" in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()
    assert run(root, tmp_path / "plain", "--split", "val") == 0
    assert "1 samples of no split" in capsys.readouterr().out
    assert [row[0::2] for row in csv.reader((tmp_path / "plain/labels.csv").open())][1:] == [
        ["b.jpg", "val"],
        ["c.jpg", "val"],
    ]
    assert run(root, tmp_path / "other", "--split", "vla") == 2


def test_damaged_samples_are_all_named_and_the_rest_exported(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = Index.load(mixed)
    for key, ext in (("a", "mask.png"), ("c", "webp")):
        ordinal = index.keys.tolist().index(key)
        shard = mixed / index.shards[index.shard_of[ordinal]].name
        data = bytearray(shard.read_bytes())
        data[index.members[ext][ordinal, 0] + 30] ^= 1
        shard.write_bytes(data)
    assert run(mixed, tmp_path / "plain") == 1
    said = capsys.readouterr()
    for key, ext in (("a", "mask.png"), ("c", "webp")):
        assert f"shard-000000.tar, sample {key}: the shard holds other bytes than were indexed (.{ext})" in said.out
    assert "2 damaged samples were left out" in said.err
    assert {name for name in files(tmp_path / "plain") if "/" in name} == {
        *("images/b.png", "images/d.jpg", "masks/b.png", "masks/d.png")
    }
    assert cli.main(["create", "folder", str(tmp_path / "plain"), "--out", str(tmp_path / "again")]) == 0


@pytest.mark.parametrize(
    "members",
    [
        {"json": b"{"},
        {"json": b'{"labels": ["cow"]}'},
        {"mask.png": b"PNG"},
        {"mask.png": encode_mask(np.full((10, 20), 3, np.uint8))},
        {"mask.png": encode_png(Image.new("RGB", (20, 10)))},
    ],
)
def test_bad_contents_that_the_index_blesses_are_named(
    tmp_path: Path, members: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make(tmp_path / "set", [sample("good", 1), sample("bad", 2) | members])
    assert run(root, tmp_path / "plain") == 1
    assert "sample bad" in capsys.readouterr().out
    assert set(files(tmp_path / "plain")) == {"images/good.jpg", "labels.csv", "classes.txt"}


STRANGE = ["../out", "a/../../out", "..", "/tmp/out", "a\\out", "C:out", "a\0b", "a\nb", "./x", ""]


@pytest.mark.parametrize("key", STRANGE)
def test_no_key_leads_out_of_the_folder(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path / "set", [sample("good", 1), sample("evil", 2)])
    tree = json.loads((root / "index.json").read_text())
    tree["shards"][0]["keys"][1] = key  # whatever a tar file or an index may say
    (root / "index.json").write_text(json.dumps(tree))
    before = files(tmp_path)
    assert run(root, tmp_path / "plain") == 2
    error = capsys.readouterr().err
    assert f"shard-000000.tar: key {key!r}" in error
    assert files(tmp_path) == before


def test_folders_in_keys_become_underscores_unless_two_keys_meet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make(tmp_path / "set", [sample("sub/k.1/x", 1), sample("sub/my k", 2)])
    assert run(root, tmp_path / "plain") == 0
    assert sorted(p.name for p in (tmp_path / "plain/images").iterdir()) == ["sub_k_1_x.jpg", "sub_my_k.jpg"]
    twins = make(tmp_path / "twins", [sample("sub/x", 1), sample("sub_x", 2)])
    assert run(twins, tmp_path / "other") == 2
    assert "key 'sub_x' would overwrite 'sub/x'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t["classes"].__setitem__(1, "dog;cat"),
        lambda t: t["classes"].__setitem__(1, " dog"),
        lambda t: t["classes"].__setitem__(1, "d\u2028og"),
        lambda t: t["splits"].update({"": t["splits"].pop("train")}),
        lambda t: t["splits"].update(train=[]),
    ],
)
def test_names_that_would_come_back_as_others_are_refused(tmp_path: Path, edit: Callable) -> None:
    root = make(tmp_path / "set", [sample("a", 2)])
    tree = json.loads((root / "index.json").read_text())
    edit(tree)
    (root / "index.json").write_text(json.dumps(tree))
    assert run(root, tmp_path / "plain") == 2
    assert not (tmp_path / "plain").exists()


def test_overwrite_removes_only_what_export_writes(mixed: Path, tmp_path: Path) -> None:
    out, outside = tmp_path / "plain", tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("mine")
    assert run(mixed, out) == 0
    (out / "notes.md").write_text("mine")
    (out / "images/old.jpg").write_text("old")
    (out / "masks").rename(tmp_path / "moved")
    (out / "masks").symlink_to(outside)
    before = files(out)
    assert run(mixed, out) == 2
    assert files(out) == before
    assert run(mixed, out, "--split", "val", "--overwrite") == 0
    assert set(files(out)) == {"notes.md", "images/c.webp", "labels.csv", "classes.txt"}
    assert (outside / "keep").read_text() == "mine"
    assert {p.name for p in out.iterdir()} <= {*PARTS, "notes.md"}


def test_where_nothing_can_be_written_is_said(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run(mixed, tmp_path / "file") == 2
    assert run(mixed, tmp_path / "file" / "below") == 2
    assert cli.main(["export", str(mixed), "--out", "s3://bucket/x"]) == 2
    assert capsys.readouterr().err.count("error: ") == 3


def masks_of(root: Path, classes: tuple[str, ...], *masks: np.ndarray) -> Path:
    samples = [{"__key__": f"2008_{i:06d}", "mask.png": encode_mask(mask)} for i, mask in enumerate(masks)]
    write_index(root, classes, {"test": range(len(masks))}, [write_mirror_shard(root, "shard-000000.tar", samples)])
    return root


def test_what_vocs_server_takes(tmp_path: Path) -> None:
    mask = levels(1) % 255
    root = masks_of(tmp_path / "set", ("dog", "aeroplane"), mask, mask.T)
    out = tmp_path / "out"
    assert run(root, out, "--voc-results", "comp6") == 0
    place = "results/VOC2012/Segmentation/comp6_test_cls"
    assert set(files(out)) == {"results.tgz", f"{place}/2008_000000.png", f"{place}/2008_000001.png"}
    with Image.open(out / place / "2008_000000.png") as png:
        assert (png.mode, png.getpalette()) == ("P", voc_palette().flatten().tolist())
        assert np.array_equal(np.asarray(png), np.array([0, 12, 1], np.uint8)[mask])  # VOC's dog and aeroplane
    with tarfile.open(out / "results.tgz") as tar:
        assert {m.name for m in tar if m.isfile()} == {name for name in files(out) if name != "results.tgz"}
        assert tar.extractfile(f"{place}/2008_000001.png").read() == files(out)[f"{place}/2008_000001.png"]  # type: ignore[union-attr]
    assert run(root, out, "--voc-results", "comp6") == 2


@pytest.mark.parametrize(
    ("classes", "value", "message"),
    [
        (("dog", "cactus"), 0, "cactus is no class of VOC"),
        (("dog",), 255, "shard-000000.tar, sample 2008_000000: mask.png holds void (255)"),
    ],
)
def test_what_vocs_server_would_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], classes: tuple[str, ...], value: int, message: str
) -> None:
    root = masks_of(tmp_path / "set", classes, np.full((4, 4), value, np.uint8))
    assert run(root, tmp_path / "out", "--voc-results", "comp5") == 2
    assert message in capsys.readouterr().err
