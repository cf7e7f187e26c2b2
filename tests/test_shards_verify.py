"""verify finds every kind of damage, names shard and key, and never stumbles; index takes any sound webdataset set."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset import ShardWriter, TarWriter

from esol.data.index import Index, write_index
from esol.data.samples import encode_mask, write_mirror_shard
from shards import cli
from shards.synthetic import CLASSES
from shards.verify import verify

SHARD = "shard-000003.tar"


def place(root: Path, ext: str, position: int = 2) -> tuple[str, int, int]:
    """Key, offset and size of a member in the damaged shard."""
    index = Index.load(str(root))
    ordinal = int(index.first[3]) + position
    offset, size, _ = index.members[ext][ordinal].tolist()
    return str(index.keys[ordinal]), offset, size


def rewrite(root: Path, change: Callable[[bytearray], bytes]) -> None:
    (root / SHARD).write_bytes(change(bytearray((root / SHARD).read_bytes())))


def flip(data: bytearray, at: int) -> bytes:
    data[at] ^= 16
    return bytes(data)


def test_a_whole_set_has_no_problem(shard_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(shard_set)]) == 0
    assert "56 images" in capsys.readouterr().out


def test_flipped_bytes_are_found_in_every_member_and_between_them(own_shard_set: Path) -> None:
    whole = (own_shard_set / SHARD).read_bytes()
    for ext in ("jpg", "json", "mask.png", "part.png"):
        key, offset, size = place(own_shard_set, ext)
        (own_shard_set / SHARD).write_bytes(flip(bytearray(whole), offset + size // 2))
        found = verify(str(own_shard_set))
        assert any(SHARD in line and key in line and f"member {ext}" in line for line in found), found
        assert len(found) == 1
    key, offset, _ = place(own_shard_set, "jpg")
    for at in (offset - 512, offset - 300, len(whole) - 1):  # name, checksum, end marker
        (own_shard_set / SHARD).write_bytes(flip(bytearray(whole), at))
        assert any(SHARD in line for line in verify(str(own_shard_set)))


def test_truncated_shards_name_every_lost_key_even_at_a_member_boundary(own_shard_set: Path) -> None:
    whole = (own_shard_set / SHARD).read_bytes()
    index = Index.load(str(own_shard_set))
    keys = index.keys[index.first[3] : index.first[3] + 7].tolist()
    _, offset, size = place(own_shard_set, "mask.png")
    for end in (offset + size // 2, offset - 512, offset, 700):
        (own_shard_set / SHARD).write_bytes(whole[:end])
        found = verify(str(own_shard_set))
        assert any(f"{SHARD} is truncated" in line for line in found)
        for key in keys[3:] if end > 700 else keys:
            assert any(SHARD in line and key in line for line in found), (end, key)
    (own_shard_set / SHARD).write_bytes(whole[:-1024])  # only the end marker is cut
    assert any("is truncated" in line for line in verify(str(own_shard_set)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: b"", "is empty"),
        (lambda d: bytes(len(d)), "bytes are zero"),
        (lambda d: bytes(d) + b"\0" * 512, "is too long"),
        (lambda d: np.random.default_rng(0).bytes(len(d)), "is not a whole tar file"),
    ],
)
def test_empty_zero_long_and_garbage_shards(own_shard_set: Path, change: Callable, words: str) -> None:
    rewrite(own_shard_set, change)
    found = verify(str(own_shard_set))
    assert any(SHARD in line and words in line for line in found), found
    assert all(SHARD in line for line in found)


def test_missing_and_surplus_shards(own_shard_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_shard_set / SHARD).rename(own_shard_set / "other.tar")
    assert cli.main(["verify", str(own_shard_set)]) == 1
    out = capsys.readouterr().out
    assert f"{SHARD}" in out
    assert "is missing" in out
    assert "other.tar is not in index.json" in out


def edit_index(root: Path, edit: Callable[[dict], object]) -> None:
    tree = json.loads((root / "index.json").read_text())
    edit(tree["shards"][3])
    (root / "index.json").write_text(json.dumps(tree))


def test_index_that_does_not_match_names_shard_and_key(own_shard_set: Path) -> None:
    key, _, _ = place(own_shard_set, "jpg", 0)
    original = (own_shard_set / "index.json").read_text()
    for edit, words in (
        (lambda s: s["keys"].__setitem__(0, "stranger"), f"sample {key} is in the shard, but not in the index"),
        (
            lambda s: s["members"]["mask.png"].__setitem__(0, None),
            f"sample {key}: member mask.png is in the shard, but not",
        ),
        (
            lambda s: s["members"].setdefault("cam.npy", [[512, 9, 0]] + [None] * 6),
            "member cam.npy is in the index, but not",
        ),
        (
            lambda s: s["members"]["jpg"][0].__setitem__(0, 1024),
            f"sample {key}: member jpg is not where the index says",
        ),
        (lambda s: s["members"]["jpg"][0].__setitem__(2, 5), f"sample {key}, member jpg: its bytes are not"),
        (lambda s: s.update(sha256="0" * 64), "sha256"),
        (lambda s: s.update(bytes=s["bytes"] + 512), "truncated"),
    ):
        edit_index(own_shard_set, edit)
        found = verify(str(own_shard_set))
        assert any(SHARD in line and words in line for line in found), (words, found)
        (own_shard_set / "index.json").write_text(original)


def photo(size: tuple[int, int] = (20, 10)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (90, 120, 30)).save(out, "JPEG")
    return out.getvalue()


def about(labels: object = ("fish",), height: object = 10, width: object = 20) -> bytes:
    return json.dumps({"labels": labels, "height": height, "width": width}).encode()


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"jpg": photo()[:-100]}, "member jpg: unreadable image"),
        ({"json": about(["fsh"])}, "label 'fsh' is not in the class list; did you mean 'fish'?"),
        ({"json": about(height=11)}, "json says 20x11 pixels, the photo is 20x10"),
        ({"json": b"{"}, "member json: must hold labels"),
        ({"json": b"[" * 100_000}, "member json: must hold labels"),
        ({"json": b"[3]"}, "member json: must hold labels"),
        ({"json": about([["fish"]])}, "member json: must hold labels"),
        ({"mask.png": encode_mask(np.zeros((10, 21), np.uint8))}, "member mask.png is 21x10 pixels"),
        ({"mask.png": encode_mask(np.full((10, 20), 6, np.uint8))}, "value 6 is no class"),
        ({"mask.png": b"PNG"}, "member mask.png: the PNG cannot be decoded"),
        ({"jpg": None}, "has no photo"),
        ({"json": None}, "has no json"),
    ],
)
def test_bad_contents_that_the_index_blesses_are_found(tmp_path: Path, members: dict, words: str) -> None:
    whole = {"jpg": photo(), "json": about(), "mask.png": encode_mask(np.zeros((10, 20), np.uint8))}
    bad = {ext: data for ext, data in (whole | members).items() if data is not None}
    samples = [{"__key__": "good", **whole}, {"__key__": "bad", **bad}]
    record = write_mirror_shard(tmp_path, "shard-000000.tar", samples)
    write_index(tmp_path, CLASSES, {"train": [0, 1]}, [record])
    found = verify(str(tmp_path))
    assert len(found) == 1
    assert "shard-000000.tar: sample bad" in found[0]
    assert words in found[0]
    (tmp_path / "index.json").unlink()
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    assert cli.main(["index", str(tmp_path), "--classes", str(tmp_path / "classes.txt")]) == 2
    assert not (tmp_path / "index.json").exists()


def test_verify_survives_any_garbage(own_shard_set: Path) -> None:
    rng = np.random.default_rng(0)
    whole, text = (own_shard_set / SHARD).read_bytes(), (own_shard_set / "index.json").read_bytes()
    for _ in range(25):
        data = bytearray(whole)
        start = int(rng.integers(0, len(data)))
        data[start : start + int(rng.integers(1, 3000))] = rng.bytes(int(rng.integers(0, 3000)))
        (own_shard_set / SHARD).write_bytes(data)
        assert verify(str(own_shard_set))
    (own_shard_set / SHARD).write_bytes(whole)
    for _ in range(25):
        data = bytearray(text)
        data[int(rng.integers(0, len(data)))] = int(rng.integers(0, 256))
        (own_shard_set / "index.json").write_bytes(data)
        verify(str(own_shard_set))


def test_webdatasets_own_shards_are_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # opened here: once esol.data.stream has locked webdataset, it opens no local file by itself
    with ShardWriter("theirs-%02d.tar", maxcount=4, verbose=0, opener=lambda name: open(name, "wb")) as writer:
        for i in range(10):
            writer.write({"__key__": f"sub/k{i}", "JPG": photo(), "json": about(["kiwi", "apple"]), "txt": "hello"})
    (tmp_path / "classes.txt").write_text("apple\nkiwi\n")
    (tmp_path / "val.txt").write_text("sub/k7\nsub/k2\n")
    (tmp_path / "train.txt").write_text("\n".join(f"sub/k{i}" for i in (0, 1, 3, 9)))
    words = ["index", ".", "--classes", "classes.txt"]
    assert cli.main([*words, "--split", "val=val.txt", "--split", "train=train.txt"]) == 0
    index = Index.load(".")
    assert {n: index.keys[o].tolist() for n, o in index.splits.items()} == {
        "val": ["sub/k2", "sub/k7"],
        "train": ["sub/k0", "sub/k1", "sub/k3", "sub/k9"],
    }
    assert [s.samples for s in index.shards] == [4, 4, 2]
    assert verify(".") == []
    assert cli.main(words) == 2  # not over an index unasked
    assert cli.main([*words, "--overwrite"]) == 0
    assert Index.load(".").split("train").tolist() == list(range(10))


def test_index_names_keys_that_repeat_or_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes.txt").write_text("fish\n")
    (tmp_path / "val.txt").write_text("nobody\n")
    words = ["index", str(tmp_path), "--classes", f"{tmp_path}/classes.txt"]
    assert cli.main(words) == 2
    assert "holds no *.tar" in capsys.readouterr().err
    for name in ("a.tar", "b.tar"):
        write_mirror_shard(tmp_path, name, [{"__key__": "same", "jpg": photo(), "json": about()}])
    assert cli.main([*words, "--split", f"val={tmp_path}/val.txt"]) == 2
    error = capsys.readouterr().err
    assert "key same appears 2 times" in error
    assert "no shard has key nobody" in error
    with open(tmp_path / "b.tar", "wb") as file, TarWriter(file, encoder=False) as tar:
        for key in ("x", "y", "x"):
            tar.write({"__key__": key, "jpg": photo(), "json": about()})
    assert cli.main(words) == 2
    assert "b.tar holds these keys twice: x" in capsys.readouterr().err
