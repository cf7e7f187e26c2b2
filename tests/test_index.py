"""The index: what it says is what the tar files hold, and what is wrong with it is said."""

import json
import shutil
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest

from esol.base.errors import DataError
from esol.data.index import Index, scan_shard, write_index
from esol.data.reader import ShardReader
from shards.synthetic import CLASSES


def change(root: Path, edit) -> None:
    tree = json.loads((root / "index.json").read_text())
    edit(tree)
    (root / "index.json").write_text(json.dumps(tree))


def test_index_points_at_the_bytes_of_every_member(shard_set: Path) -> None:
    index = Index.load(str(shard_set))
    assert (len(index), index.classes, len(index.shards)) == (56, CLASSES, 8)
    assert {s.samples for s in index.shards} == {7}
    for ordinal, key in enumerate(index.keys):
        shard = index.shards[index.shard_of[ordinal]]
        data = (shard_set / shard.name).read_bytes()
        assert 0 <= ordinal - index.first[index.shard_of[ordinal]] < shard.samples
        for ext in ("jpg", "json", "mask.png", "part.png"):
            offset, size, crc = index.members[ext][ordinal]
            assert zlib.crc32(data[offset : offset + size]) == crc
            assert f"{key}.{ext}".encode() in data[offset - 512 : offset]  # the tar header before it
        assert index.image_ext(ordinal) == "jpg"
    assert index.members["jpg"].dtype == np.int64
    assert index.shard_of.dtype == np.int32


def test_splits_hold_ascending_ordinals_of_their_keys(shard_set: Path) -> None:
    index = Index.load(str(shard_set))
    for name, size in (("train", 48), ("val", 8)):
        ordinals = index.split(name)
        assert len(ordinals) == size
        assert (np.diff(ordinals) > 0).all()
        assert all(key.startswith(name) for key in index.keys[ordinals])
    with pytest.raises(DataError, match=r"no split 'trian'; it has: train, val"):
        index.split("trian")


def test_hash_is_of_the_content_and_not_of_the_place(own_shard_set: Path, shard_set: Path) -> None:
    here = Index.load(str(shard_set)).hash
    assert Index.load(str(own_shard_set)).hash == here
    change(own_shard_set, lambda tree: tree["splits"]["val"].pop())
    assert Index.load(str(own_shard_set)).hash != here


def test_a_url_reads_like_a_folder(shard_set: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{shard_set}/", "/indexed/", recursive=True)
    index = Index.load("memory://indexed")
    assert index.hash == Index.load(str(shard_set)).hash
    index.check_files()
    memory.rm_file("/indexed/shard-000002.tar")
    with pytest.raises(DataError, match=r"shard-000002\.tar is missing"):
        index.check_files()
    memory.rm("/indexed", recursive=True)


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "simplecache::s3://bucket/set", "shell://x"])
def test_other_schemes_are_not_opened(url: str) -> None:
    with pytest.raises(DataError):
        Index.load(url)


def test_check_files_names_every_shard_of_another_size(own_shard_set: Path) -> None:
    index = Index.load(str(own_shard_set))
    index.check_files()
    (own_shard_set / "shard-000001.tar").unlink()
    (own_shard_set / "shard-000002.tar").write_bytes(b"")
    whole = (own_shard_set / "shard-000003.tar").read_bytes()
    (own_shard_set / "shard-000003.tar").write_bytes(whole[:-512])
    (own_shard_set / "shard-000004.tar").write_bytes(whole * 2)
    with pytest.raises(DataError) as caught:
        index.check_files()
    for words in (
        "1.tar is missing",
        "2.tar is empty",
        "3.tar is truncated",
        "4.tar is too long",
        "esol-shards verify",
    ):
        assert words in str(caught.value)


def test_missing_index_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"index\.json is missing; run: esol-shards index"):
        Index.load(str(tmp_path))
    with pytest.raises(DataError, match="there is no such folder"):
        Index.load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\0\0\0", "[]", "3", '{"format": "esol-shards 99"}'])
def test_what_is_no_index_is_named(own_shard_set: Path, text: str) -> None:
    (own_shard_set / "index.json").write_text(text)
    with pytest.raises(DataError, match=r"index\.json (is not valid JSON|has format)"):
        Index.load(str(own_shard_set))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop("classes"), "'classes' is missing"),
        (lambda t: t.update(classes=["a", "a"]), "different names"),
        (lambda t: t.update(shards=[]), "no shard"),
        (lambda t: t["shards"][1].update(name="../x.tar"), "not a plain file name"),
        (
            lambda t: t["shards"][1].update(sha256="../" * 4 + "home"),
            "sha256 '../../../../home'",
        ),
        (lambda t: t["shards"][1].update(samples=10**12), "as many keys as samples"),
        (lambda t: t["shards"][1]["keys"].pop(), "as many keys as samples"),
        (lambda t: t["shards"][1]["members"]["jpg"].pop(), "as many jpg as samples"),
        (lambda t: t["shards"][1]["keys"].__setitem__(0, t["shards"][0]["keys"][0]), "appears twice"),
        (lambda t: t["shards"][1]["members"]["jpg"].__setitem__(0, [10**9, 5, 0]), "outside its"),
        (lambda t: t["shards"][1]["members"]["jpg"].__setitem__(0, [1, 2]), "damaged"),
        (lambda t: t["shards"][1]["members"]["jpg"].__setitem__(0, "x"), "damaged"),
        (lambda t: t["splits"].update(val=[5, 3]), "split val must hold ascending"),
        (lambda t: t["splits"].update(val=[56]), "below 56"),
        (lambda t: t.update(splits=3), "damaged"),
        (lambda t: t.update(shards=[1, 2]), "damaged"),
    ],
)
def test_damaged_index_is_an_error_that_says_where(own_shard_set: Path, edit, words: str) -> None:
    change(own_shard_set, edit)
    with pytest.raises(DataError, match=words) as caught:
        Index.load(str(own_shard_set))
    assert "esol-shards index" in str(caught.value)


def test_write_index_of_scanned_shards_gives_the_same_index(shard_set: Path, tmp_path: Path) -> None:
    index = Index.load(str(shard_set))
    shutil.copytree(shard_set, tmp_path / "copy")
    (tmp_path / "copy" / "index.json").unlink()
    records = [scan_shard(tmp_path / "copy", shard.name) for shard in index.shards]
    write_index(tmp_path / "copy", index.classes, index.splits, records)
    assert (tmp_path / "copy" / "index.json").read_bytes() == (shard_set / "index.json").read_bytes()


def test_the_index_knows_every_samples_labels(shard_set: Path, tmp_path: Path) -> None:
    index = Index.load(shard_set)
    reader = ShardReader(index)
    assert index.labels is not None
    want = np.stack([reader.labels(i) for i in range(len(index))])
    assert np.array_equal(index.labels, want > 0)
    some = np.arange(0, len(index), 3)
    assert np.array_equal(reader.occurrence(some), want[some].sum(0))

    tree = json.loads((shard_set / "index.json").read_text())
    for shard in tree["shards"]:
        del shard["labels"]  # what an earlier version wrote
    shutil.copytree(shard_set, tmp_path / "old")
    (tmp_path / "old/index.json").write_text(json.dumps(tree))
    old = Index.load(tmp_path / "old")
    assert old.labels is None
    assert old.hash == index.hash
    assert np.array_equal(ShardReader(old).occurrence(some), want[some].sum(0))
