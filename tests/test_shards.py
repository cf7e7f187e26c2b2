"""Shard creation: what goes in comes out, the same bytes each time, and nothing half-made is taken for whole."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from webdataset import WebDataset

from esol.base.errors import DataError
from esol.data.index import Index, write_index
from esol.data.samples import encode_mask, write_mirror_shard
from shards import cli
from shards.samples import Source, pack
from shards.synthetic import CLASSES, MORE_CLASSES, draw_scene, synthetic_source
from shards.writer import create


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.iterdir())}


def test_webdatasets_own_reader_finds_what_was_written(shard_set: Path) -> None:
    source = synthetic_source(48, 8, 64, seed=0)
    seen = {}
    for sample in WebDataset(sorted(map(str, shard_set.glob("*.tar"))), shardshuffle=False):
        seen[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    assert seen.keys() == {key for keys in source.splits.values() for key in keys}
    for key, members in seen.items():
        assert members == {k: v for k, v in source.read(key).items() if k != "__key__"}


def test_same_source_and_seed_give_the_same_bytes(tmp_path: Path, shard_set: Path) -> None:
    for name, seed, workers in (("one", 0, 1), ("two", 0, 3), ("other", 1, 1)):
        create(synthetic_source(48, 8, 64, seed=0), str(tmp_path / name), 7, seed, workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(shard_set)
    other = Index.load(str(tmp_path / "other"))
    assert other.keys.tolist() != Index.load(str(tmp_path / "one")).keys.tolist()
    assert sorted(other.keys) == sorted(Index.load(str(tmp_path / "one")).keys)


@pytest.mark.parametrize(
    ("total", "most", "shards"), [(10, 4, [4, 3, 3]), (8, 4, [4, 4]), (3, 128, [3]), (9, 1, [1] * 9)]
)
def test_shards_are_balanced(tmp_path: Path, total: int, most: int, shards: list[int]) -> None:
    create(synthetic_source(total, 0, 32), str(tmp_path), most)
    assert [s.samples for s in Index.load(str(tmp_path)).shards] == shards


def test_a_url_gets_the_same_files_as_a_folder(shard_set: Path) -> None:
    create(synthetic_source(48, 8, 64, seed=0), "memory://written", 7)
    memory = fsspec.filesystem("memory")
    names = {Path(n).name for n in memory.ls("/written", detail=False)}
    assert {n: memory.cat_file(f"/written/{n}") for n in names} == contents(shard_set)
    memory.rm("/written", recursive=True)


def test_one_process_creates_at_a_time_and_once_it_is_killed_a_rerun_just_works(
    tmp_path: Path, shard_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, source = tmp_path / "set", synthetic_source(48, 8, 64, seed=0)
    command = [sys.executable, "-m", "shards", "create", "synthetic", "--size", "64", "--samples-per-shard", "7"]
    command += ["--out", str(out), "--train", "1000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        while len(list(out.glob("*.tar"))) <= 5:
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGSTOP)  # those that it makes shards by too
        before = contents(out)
        busy = rf"being (written|created) by process {process.pid} on {os.uname().nodename} since 20..-..-.. ..:"
        for overwrite in (False, True):
            with pytest.raises(DataError, match=busy):
                create(source, str(out), 7, overwrite=overwrite)
        assert cli.main(["verify", str(out)]) == 1
        assert re.search(busy, capsys.readouterr().out)
        (tmp_path / "classes.txt").write_text("a\n")
        assert cli.main(["index", str(out), "--classes", str(tmp_path / "classes.txt")]) == 2
        assert re.search(busy, capsys.readouterr().err)
        assert contents(out) == before
        process.kill()
        os.killpg(process.pid, signal.SIGCONT)
        process.stderr.read()  # until the last of them is gone
    assert not (out / "index.json").exists()
    with pytest.raises(DataError, match="creation was interrupted"):
        Index.load(str(out))
    for tar in out.glob("*.tar"):
        with tarfile.open(tar) as whole:
            assert len(whole.getnames()) == 28
    create(source, str(out), 7)
    assert contents(out) == contents(shard_set)


def test_a_store_without_locks_says_who_writes_and_only_overwrite_takes_over(shard_set: Path) -> None:
    whole, memory = synthetic_source(48, 8, 64, seed=0), fsspec.filesystem("memory")
    second = []

    def read(key: str) -> dict[str, bytes]:
        if not second:  # while the first is at work
            second.append(key)
            with pytest.raises(DataError, match=rf"being written by process {os.getpid()} on .*, give --overwrite$"):
                create(whole, "memory://busy", 7)
            create(whole, "memory://busy", 7, overwrite=True)
        return whole.read(key)

    with pytest.raises(DataError, match=r"busy was taken over by another process that is done by now"):
        create(Source(whole.classes, whole.splits, read), "memory://busy", 7, workers=1)
    names = {Path(n).name for n in memory.ls("/busy", detail=False)}
    assert {n: memory.cat_file(f"/busy/{n}") for n in names} == contents(shard_set)

    def fail(key: str) -> dict[str, bytes]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create(Source(whole.classes, whole.splits, fail), "memory://busy", 7, overwrite=True, workers=1)
    with pytest.raises(DataError, match="creation was interrupted"):
        Index.load("memory://busy")
    create(whole, "memory://busy", 7)  # nobody is at work there any more
    memory.rm("/busy", recursive=True)


def test_a_shard_set_is_not_overwritten_unasked(own_shard_set: Path, shard_set: Path) -> None:
    source = synthetic_source(4, 0, 32)
    with pytest.raises(DataError, match="--overwrite"):
        create(source, str(own_shard_set))
    assert contents(own_shard_set) == contents(shard_set)
    create(source, str(own_shard_set), overwrite=True)
    assert sorted(contents(own_shard_set)) == ["index.json", "shard-000000.tar"]


def test_strangers_shards_are_not_removed(own_shard_set: Path) -> None:
    (own_shard_set / "index.json").unlink()
    with pytest.raises(DataError, match="did not write"):
        create(synthetic_source(4, 0, 32), str(own_shard_set))
    assert len(contents(own_shard_set)) == 8


def test_full_disk_is_named_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        create(synthetic_source(4, 0, 32), str(tmp_path))
    assert sorted(contents(tmp_path)) == ["creation-unfinished"]


def test_all_bad_samples_are_listed_and_no_index_is_written(tmp_path: Path) -> None:
    whole = synthetic_source(6, 0, 32)

    def read(key: str) -> dict[str, bytes]:
        if key in ("train_000001", "train_000004"):
            raise DataError(f"{key}.jpg: unreadable image")
        return whole.read(key)

    with pytest.raises(DataError, match=r"2 images cannot be used(.|\n)*train_000001(.|\n)*train_000004"):
        create(Source(whole.classes, whole.splits, read), str(tmp_path), 2)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a b", "x" * 81])
def test_keys_that_tar_readers_would_split_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="key"):
        create(Source(("a",), {"train": [key]}, lambda key: {}), str(tmp_path))


def test_mirrored_shards_have_their_own_index(shard_set: Path, tmp_path: Path) -> None:
    index = Index.load(str(shard_set))
    records = []
    for number, shard in enumerate(index.shards):
        keys = index.keys[index.first[number] : index.first[number] + shard.samples]
        samples = [{"__key__": str(key), "cam.npy": key.encode()} for key in keys]
        records.append(write_mirror_shard(tmp_path, shard.name, samples))
    write_index(tmp_path, index.classes, index.splits, records)
    mirror = Index.load(str(tmp_path))
    assert mirror.keys.tolist() == index.keys.tolist()
    assert list(mirror.members) == ["cam.npy"]
    assert not list(tmp_path.glob("*.tmp"))
    assert cli.main(["verify", str(tmp_path)]) == 0


CAT = ("cat", "dog")


def photo(size: tuple[int, int], orientation: int = 1) -> bytes:
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (90, 120, 30)).save(out, "JPEG", exif=exif)
    return out.getvalue()


def mask(size: tuple[int, int], value: int = 1) -> bytes:
    return encode_mask(np.full(size[::-1], value, np.uint8))


def test_photo_bytes_are_kept_and_sizes_are_upright() -> None:
    sample = pack("k", "k.jpg", photo((40, 30), orientation=6), {"dog", "cat"}, CAT, mask((30, 40)), "k.png")
    assert sample["jpg"] == photo((40, 30), orientation=6)
    assert json.loads(sample["json"]) == {"labels": ["cat", "dog"], "height": 40, "width": 30}
    with pytest.raises(DataError, match=r"k\.png is 40x30 pixels, but its photo k\.jpg is 30x40"):
        pack("k", "k.jpg", photo((40, 30), orientation=6), {"dog"}, CAT, mask((40, 30)), "k.png")


def test_long_side_shrinks_photo_and_mask_together_and_only_when_needed() -> None:
    small = pack("k", "k.jpg", photo((80, 40), orientation=8), {"dog"}, CAT, mask((40, 80), 2), "k.png", long_side=20)
    assert Image.open(io.BytesIO(small["jpg"])).size == (10, 20)
    assert Image.open(io.BytesIO(small["jpg"])).getexif().get(0x0112, 1) == 1
    levels = np.asarray(Image.open(io.BytesIO(small["mask.png"])))
    assert levels.shape == (20, 10)
    assert (levels == 2).all()
    assert pack("k", "k.jpg", photo((80, 40)), {"dog"}, CAT, long_side=80)["jpg"] == photo((80, 40))


@pytest.mark.parametrize(
    ("data", "labels", "drawn", "words"),
    [
        (photo((40, 30))[:-200], {"cat"}, None, r"k\.jpg: unreadable image"),
        (b"", {"cat"}, None, r"k\.jpg: unreadable image"),
        (b"\0" * 500, {"cat"}, None, r"k\.jpg: unreadable image"),
        (photo((40, 30)), {"catt"}, None, r"k\.jpg: label 'catt' .* did you mean 'cat'\?"),
        (photo((40, 30)), {"cat"}, mask((30, 30)), r"k\.png is 30x30 pixels, but its photo k\.jpg is 40x30"),
        (photo((40, 30)), {"cat"}, mask((40, 30), 3), r"k\.png: value 3 is no class"),
        (photo((40, 30)), {"cat"}, mask((40, 30))[:-30], r"k\.png: the PNG cannot be decoded"),
        (photo((40, 30)), {"cat"}, photo((40, 30)), r"k\.png: a mask must be an 8-bit"),
    ],
)
def test_bad_photo_label_or_mask_is_named(data: bytes, labels: set[str], drawn: bytes | None, words: str) -> None:
    with pytest.raises(DataError, match=words):
        pack("k", "k.jpg", data, labels, CAT, drawn, "k.png")


def test_scenes_have_exact_masks_and_each_class_a_part_and_a_larger_body() -> None:
    share: dict[int, list[float]] = {c: [] for c in range(1, len(CLASSES) + 1)}
    for number in range(120):
        _, levels, part = draw_scene(np.random.default_rng([0, 0, number]), 96)
        assert levels.any()
        assert not part[levels == 0].any()
        for c in np.unique(levels[levels > 0]):
            share[c].append(float((part[levels == c] == 255).mean()))
    for values in share.values():
        assert len(values) > 15
        assert 0.2 < np.mean(values) < 0.32


def test_a_part_wears_colours_that_nothing_else_wears() -> None:
    # magenta petals: the cactus' part, and next to nothing outside it
    inside = outside = 0
    for number in range(60):
        image, levels, part = (a.astype(int) for a in draw_scene(np.random.default_rng([0, 0, number]), 96))
        magenta = (image[..., 0] > 190) & (image[..., 1] < 100) & (image[..., 2] > 110)
        flower = (levels == CLASSES.index("cactus") + 1) & (part > 0)
        inside, outside = inside + (magenta & flower).sum(), outside + (magenta & ~flower).sum()
    assert inside > 1000
    assert outside < inside / 20


def test_labels_are_the_classes_of_the_mask() -> None:
    source = synthetic_source(30, 0, 48)
    for key in source.splits["train"]:
        sample = source.read(key)
        levels = np.asarray(Image.open(io.BytesIO(sample["mask.png"])))
        assert json.loads(sample["json"])["labels"] == [CLASSES[c - 1] for c in np.unique(levels) if c]


def test_known_scene() -> None:
    """The drawing is in integers: the same pixels on every machine, whatever encodes them later."""
    image, levels, part = draw_scene(np.random.default_rng([0, 0, 1]), 48)
    assert (int(image.sum()), int(levels.sum()), int((part > 0).sum())) == (1217297, 791, 129)


@pytest.mark.parametrize("words", [[], ["create"], *(["create", k] for k in ("voc", "coco", "folder", "synthetic"))])
def test_help_is_there_and_imports_nothing_heavy(words: list[str]) -> None:
    code = f"import sys; from shards.cli import main\ntry: main({[*words, '--help']})\nfinally: sys.stderr.write(repr("
    code += "sorted({'torch', 'webdataset', 'mlflow', 'accelerate', 'numpy'} & sys.modules.keys())))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == "[]"
    assert "usage: esol-shards" in done.stdout


def test_commands_say_what_is_wrong_and_exit_with_2(
    own_shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["create", "synthetic", "--out", str(own_shard_set)]) == 2
    assert "already holds a shard set" in capsys.readouterr().err
    assert cli.main(["create", "voc", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "ImageSets" in capsys.readouterr().err


def test_scenes_of_more_classes_have_them_all_and_five_are_as_they_were() -> None:
    names = (*CLASSES, *MORE_CLASSES)
    source = synthetic_source(60, 0, 64, classes=20)
    assert source.classes == names
    samples = [source.read(key) for key in source.splits["train"]]
    shown = {label for sample in samples for label in json.loads(sample["json"])["labels"]}
    assert shown == set(names)
    few = synthetic_source(3, 0, 64, classes=5)
    assert few.read("train_000002") == synthetic_source(3, 0, 64).read("train_000002")
    for count in (0, 21):
        with pytest.raises(DataError, match=f"--classes {count}: there are 1 to 20"):
            synthetic_source(3, 0, 64, classes=count)
