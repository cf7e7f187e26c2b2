"""The index of a large set: what a small one says, in pages that processes share; what is wrong with it is said."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from esol.base.errors import DataError
from esol.base.files import sha256
from esol.data import index as index_module
from esol.data.index import Index, scan_shard, write_index
from esol.data.reader import ShardReader
from shards import cli
from shards.synthetic import synthetic_source
from shards.writer import create


@pytest.fixture
def large(shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shards of shard_set with the index that a set of 100,000 samples has."""
    root, index = Path(shutil.copytree(shard_set, tmp_path / "large")), Index.load(shard_set)
    monkeypatch.setattr(index_module, "LARGE", 56)
    write_index(root, index.classes, index.splits, [scan_shard(root, shard.name) for shard in index.shards])
    return root


def same(one: Index, other: Index) -> None:
    assert (one.classes, one.shards, one.hash) == (other.classes, other.shards, other.hash)
    assert one.members.keys() == other.members.keys()
    assert one.splits.keys() == other.splits.keys()
    arrays = [(one.members[ext], other.members[ext]) for ext in one.members]
    arrays += [(one.splits[name], other.splits[name]) for name in one.splits]
    for a, b in [*arrays, (one.keys, other.keys), (one.labels, other.labels), (one.shard_of, other.shard_of)]:
        assert a is not None
        assert b is not None
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


def test_it_says_what_the_other_form_says(large: Path, shard_set: Path) -> None:
    small, found = Index.load(shard_set), Index.load(large)
    same(found, small)
    assert ShardReader(found).image_and_labels(5)[0] == ShardReader(small).image(5)
    assert not Path(small.mapped).name
    assert cli.main(["verify", str(large)]) == 0


def test_it_is_mapped_and_stays_so_in_another_process(large: Path, shard_set: Path) -> None:
    found = Index.load(large)
    pickled = pickle.dumps(found)
    again = pickle.loads(pickled)
    same(again, Index.load(shard_set))
    for index in (found, again):
        base: Any = index.keys
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap)
    assert found.keys.tobytes() not in pickled
    with pytest.raises(ValueError, match="read-only"):
        found.members["jpg"][0, 0] = 1


def test_without_labels_or_with_a_single_split(large: Path, shard_set: Path) -> None:
    index = Index.load(shard_set)
    records = [scan_shard(large, shard.name) for shard in index.shards]
    for record in records:
        del record["labels"]
    write_index(large, index.classes, {"train": [3, 7]}, records)
    assert Index.load(large).labels is None
    assert Index.load(large).split("train").tolist() == [3, 7]


def test_a_set_behind_a_url_has_its_arrays_in_the_cache(large: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{large}/", "/far/", recursive=True)
    found = Index.load("memory://far", str(tmp_path / "cache"))
    same(found, Index.load(large))
    assert Path(found.mapped).is_relative_to(tmp_path / "cache")
    Path(found.mapped).write_bytes(b"damaged")
    same(Index.load("memory://far", str(tmp_path / "cache")), Index.load(large))
    memory.rm_file("/far/index.npy")
    with pytest.raises(DataError, match=r"memory://far/index\.npy is missing"):
        Index.load("memory://far", str(tmp_path / "other"))
    memory.rm("/far", recursive=True)


def test_another_set_in_its_place_leaves_nothing_of_it(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create(synthetic_source(56, 0, 32), str(large), 14, overwrite=True)
    assert Index.load(large).mapped
    create(synthetic_source(4, 0, 32), str(large), overwrite=True)
    assert sorted(path.name for path in large.iterdir()) == ["index.json", "shard-000000.tar"]


def vouched(root: Path) -> None:
    """Makes index.json vouch for what index.npy is now."""
    tree, file = json.loads((root / "index.json").read_text()), root / "index.npy"
    tree["samples"] |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (root / "index.json").write_text(json.dumps(tree))


def with_fields(table: np.ndarray, **kinds: Any) -> np.ndarray:
    """The same number of rows with fields of other kinds, or without those whose kind is None."""
    fields = [(name, *kinds.get(name, rest)) for name, *rest in table.dtype.descr if kinds.get(name, rest) is not None]
    return np.zeros(len(table), fields)


def changed(name: str, place: Any, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(table: np.ndarray) -> np.ndarray:
        table[name][place] = value
        return table

    return change


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t[:-1], "55 rows, the shards hold 56 samples"),
        (lambda t: np.zeros((56, 2)), "its rows are float64"),
        (lambda t: t.reshape(8, 7), "not members, key, 2 splits and labels"),
        (lambda t: with_fields(t, key=None), "not members, key"),
        (lambda t: with_fields(t, key=("S12",)), "not members, key"),
        (lambda t: with_fields(t, key=(">U12",)), "not members, key"),
        (lambda t: with_fields(t, splits=None), "not members, key"),
        (lambda t: with_fields(t, splits=("?", (3,))), "not members, key"),
        (lambda t: with_fields(t, labels=("?",)), "not members, key"),
        (lambda t: with_fields(t, labels=("?", (3,))), "3 labels a row for 5 classes"),
        (lambda t: with_fields(t, **{".jpg": ("<i8", (2,))}), "not members, key"),
        (lambda t: with_fields(t, **{".jpg": ("<i4", (3,))}), "not members, key"),
        (changed(".jpg", (20, 0), 10**9), "jpg members outside their shards"),
        (changed(".jpg", (20, 1), 2**63 - 1), "jpg members outside their shards"),
        (changed(".jpg", (20, 2), -1), "jpg members outside their shards"),
        (changed(".jpg", (20, 0), -5), "jpg members outside their shards"),
        (changed("key", [20, 21], "val_000001"), "key val_000001 appears twice"),
    ],
)
def test_rows_that_cannot_be_are_an_error_that_names_the_file(large: Path, edit: Callable, words: str) -> None:
    np.save(large / "index.npy", edit(np.load(large / "index.npy")))
    vouched(large)
    with pytest.raises(DataError, match=rf"large/index\.npy is damaged: .*{words}.*esol-shards index"):
        Index.load(large)


@pytest.mark.parametrize(("field", "byte", "words"), [("key", 0xFF, "no text"), ("labels", 2, "neither 0 nor 1")])
def test_bytes_that_are_no_text_and_no_truth(large: Path, field: str, byte: int, words: str) -> None:
    table = np.load(large / "index.npy")
    kind, offset = table.dtype.fields[field]
    raw = bytearray((large / "index.npy").read_bytes())
    begin = len(raw) - table.nbytes + 20 * table.itemsize + offset
    raw[begin : begin + kind.itemsize] = bytes([byte]) * kind.itemsize
    (large / "index.npy").write_bytes(raw)
    vouched(large)
    with pytest.raises(DataError, match=rf"index\.npy is damaged: .*{words}"):
        Index.load(large)


def objects(path: Path) -> bytes:
    np.save(path, np.array([{"a": 1}] * 56, dtype=object), allow_pickle=True)
    return path.read_bytes()


def test_files_that_are_no_arrays_are_named_and_nothing_in_them_runs(large: Path, tmp_path: Path) -> None:
    whole = (large / "index.npy").read_bytes()
    huge = whole.replace(b"(56,)", b"(9" + b"9" * 18 + b",)", 1)
    for data in (b"", b"\x93NUMPY", b"PK\3\4" + whole, whole[:-1], whole[:90], huge, objects(tmp_path / "o.npy")):
        (large / "index.npy").write_bytes(data)
        with pytest.raises(DataError, match=r"index\.npy is damaged: it is not the file that index\.json was written"):
            Index.load(large)
        vouched(large)
        with pytest.raises(DataError, match=r"index\.npy is damaged: it is no whole array file"):
            Index.load(large)
    (large / "index.npy").unlink()
    with pytest.raises(DataError, match=r"large/index\.npy is missing; rebuild both with: esol-shards index"):
        Index.load(large)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop("samples"), "'samples' is missing"),
        (lambda t: t["samples"].update(name="../index.npy"), "those of index.npy"),
        (lambda t: t["samples"].pop("sha256"), "'sha256' is missing"),
        (lambda t: t["samples"].update(sha256="../" * 5 + "x"), "index.npy has sha256 '../../"),
        (lambda t: t.update(splits={"train": [1]}), "a list of names"),
        (lambda t: t["splits"].pop(), "1 splits"),
        (lambda t: t["splits"].__setitem__(0, "val"), "names twice"),
        (lambda t: t["splits"].__setitem__(0, "../val"), "split '../val' is no plain name"),
        (lambda t: t["shards"][1].update(samples=10**12), "the shards hold 1000000000049 samples"),
        (lambda t: t["shards"][1].update(samples=-7), "holds -7 samples"),
        (lambda t: t["shards"][1].update(bytes=2**70), "damaged"),
    ],
)
def test_damaged_index_json_is_named(large: Path, edit: Callable, words: str) -> None:
    tree = json.loads((large / "index.json").read_text())
    edit(tree)
    (large / "index.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match=words):
        Index.load(large)
