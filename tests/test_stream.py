"""The training stream through real worker processes: order, resume, damage."""

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from esol.base.errors import DataError
from esol.config import DataConfig
from esol.data.index import Index
from esol.data.plan import Plan, share_of
from esol.data.reader import ShardReader
from esol.data.samples import Batch
from esol.data.stream import training_stream
from esol.data.transforms import Crop, decode, training_crop

FILL = (10, 20, 30)


def read(
    root: Path,
    workers: int,
    start: int = 0,
    stop: int = 10,
    rank: int = 0,
    ranks: int = 1,
    damaged: str = "error",
    micro_batch: int = 2,
    global_batch: int = 8,
) -> list[list[Batch]]:
    index = Index.load(str(root))
    ordinals = index.split("train")
    plan = Plan(ordinals, index.shard_of[ordinals], 5, global_batch)
    config = DataConfig(root=str(root), workers=workers, damaged=damaged)  # type: ignore[arg-type]
    share = share_of(rank, ranks, global_batch, micro_batch)
    return list(training_stream(ShardReader(index), plan, share, start, stop, Crop(32, (48, 80)), config, FILL))


def same(a: list[list[Batch]], b: list[list[Batch]]) -> bool:
    pairs = [(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)]
    return all(
        x["key"] == y["key"] and torch.equal(x["image"], y["image"]) and torch.equal(x["labels"], y["labels"])
        for x, y in pairs
    )


def test_pixels_and_order_do_not_depend_on_workers_or_ranks_and_resume_anywhere(shard_set: Path) -> None:
    reference = read(shard_set, workers=0)  # 10 steps: one epoch of 6 and part of the next
    assert reference[0][0]["image"].shape == (2, 3, 32, 32)
    assert reference[0][0]["image"].dtype == torch.uint8
    assert {len(step) for step in reference} == {4}
    assert same(read(shard_set, workers=2), reference)
    assert same(read(shard_set, workers=1, start=7), reference[7:])
    halves = [read(shard_set, workers=rank, rank=rank, ranks=2) for rank in (0, 1)]
    assert same([a + b for a, b in zip(*halves, strict=True)], reference)
    epoch = [key for step in reference[:6] for batch in step for key in batch["key"]]
    assert len(epoch) == len(set(epoch)) == 48


@pytest.mark.parametrize("workers", [0, 2])
def test_uneven_shares_are_parts_of_the_same_global_batches(shard_set: Path, workers: int) -> None:
    """10 images over 3 ranks, 3 at most in a micro-batch; two workers have micro-batches of both sizes."""
    whole = read(shard_set, 0, stop=6, micro_batch=0, global_batch=10)  # 4 steps an epoch
    parts = [read(shard_set, workers, 0, 6, rank, 3, micro_batch=3, global_batch=10) for rank in range(3)]
    sizes = [{tuple(len(batch["image"]) for batch in step) for step in steps} for steps in parts]
    assert sizes == [{(2, 2)}, {(2, 1)}, {(2, 1)}]
    for (reference,), *steps in zip(whole, *parts, strict=True):
        batches = [batch for step in steps for batch in step]
        assert [key for batch in batches for key in batch["key"]] == reference["key"]
        assert torch.equal(torch.cat([batch["image"] for batch in batches]), reference["image"])
        assert torch.equal(torch.cat([batch["labels"] for batch in batches]), reference["labels"])
        assert [batch["weight"] / 6 for batch in batches] == pytest.approx([len(b["key"]) / 10 for b in batches])


def test_labels_are_those_of_the_shard(shard_set: Path) -> None:
    index = Index.load(str(shard_set))
    reader = ShardReader(index)
    for step in read(shard_set, workers=0, stop=2):
        for batch in step:
            for key, labels in zip(batch["key"], batch["labels"], strict=True):
                names = json.loads(reader.read(int(np.flatnonzero(index.keys == key)[0]), "json"))["labels"]
                assert [index.classes[i] for i in labels.nonzero().flatten().tolist()] == names


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_byte_is_an_error_that_names_shard_and_key(own_shard_set: Path, workers: int) -> None:
    key, shard = flip_a_photo(own_shard_set)
    with pytest.raises(DataError) as caught:
        read(own_shard_set, workers=workers)
    message = str(caught.value)
    assert message.startswith(f"{shard}, sample {key}: the shard holds other bytes than were indexed")
    assert "Traceback" not in message


def test_skipped_damage_is_named_and_the_rest_unchanged(own_shard_set: Path, shard_set: Path) -> None:
    key, _ = flip_a_photo(own_shard_set)
    whole, patched = read(shard_set, 0, stop=6), read(own_shard_set, 1, stop=6, damaged="skip")
    batches = [(a, b) for x, y in zip(whole, patched, strict=True) for a, b in zip(x, y, strict=True)]
    hit = [(a, b) for a, b in batches if key in a["key"]]
    assert len(hit) == 1
    assert key in hit[0][1]["skipped"][0]
    assert set(hit[0][1]["key"]) > set(hit[0][0]["key"]) - {key}
    assert key not in hit[0][1]["key"]
    assert all(a["key"] == b["key"] and not b["skipped"] for a, b in batches if key not in a["key"])


def test_missing_truncated_and_foreign_labels(own_shard_set: Path) -> None:
    shard = own_shard_set / Index.load(str(own_shard_set)).shards[2].name
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=rf"{shard.name} is truncated: \d+ bytes, the index says {len(data)}"):
        Index.load(str(own_shard_set)).check_files()
    with pytest.raises(DataError, match=rf"{shard.name}, sample \w+: the shard ends before it .*esol-shards verify"):
        read(own_shard_set, workers=0)
    shard.unlink()
    with pytest.raises(DataError, match=rf"shard .*{shard.name} cannot be opened: No such file"):
        read(own_shard_set, workers=0)
    tree = json.loads((own_shard_set / "index.json").read_text())
    tree["classes"][1] += "s"
    (own_shard_set / "index.json").write_text(json.dumps(tree))
    shard.write_bytes(data)
    with pytest.raises(
        DataError, match=r"shard-\d+.tar, sample \w+: label '(\w+)' is not one of the classes; .* \1s\?"
    ):
        read(own_shard_set, workers=0)


def test_shards_behind_a_url_are_fetched_once_and_read_alike(shard_set: Path, tmp_path: Path) -> None:
    local = read(shard_set, workers=0, stop=2)
    index = Index.load(f"file://{shard_set}")
    reader = ShardReader(index, str(tmp_path / "cache"))
    keys = [k for step in local for batch in step for k in batch["key"]]
    ordinals = {key: int(np.flatnonzero(index.keys == key)[0]) for key in keys}
    plain = ShardReader(Index.load(str(shard_set)))
    assert all(reader.image(o) == plain.image(o) for o in ordinals.values())
    cached = sorted((tmp_path / "cache").rglob("*.tar"))
    assert len(cached) == len({int(index.shard_of[o]) for o in ordinals.values()})


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_start_by_every_method(shard_set: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS spawns; Python 3.14 takes a forkserver on Linux."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        started = read(shard_set, workers=1, stop=2)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert same(started, read(shard_set, workers=0, stop=2))


def test_who_stands_in_does_not_depend_on_ranks_workers_or_micro_batches(own_shard_set: Path) -> None:
    index = Index.load(str(own_shard_set))
    train = index.split("train")
    gone = [int(train[i]) for i in (3, 4, len(train) - 1)]  # two in a row, and the last one
    for ordinal in gone:
        path = own_shard_set / index.shards[index.shard_of[ordinal]].name
        data = bytearray(path.read_bytes())
        data[index.members["jpg"][ordinal, 0] + 40] ^= 1
        path.write_bytes(data)
    whole = read(own_shard_set, 0, stop=6, damaged="skip", micro_batch=8)

    def flat(steps: list[list[Batch]]) -> list[list[tuple[str, bytes]]]:
        pairs = [[pair for b in step for pair in zip(b["key"], b["image"], strict=True)] for step in steps]
        return [[(key, image.numpy().tobytes()) for key, image in step] for step in pairs]

    assert flat(read(own_shard_set, 0, stop=6, damaged="skip", micro_batch=1)) == flat(whole)
    halves = [read(own_shard_set, rank, stop=6, rank=rank, ranks=2, damaged="skip", micro_batch=4) for rank in (0, 1)]
    assert flat([a + b for a, b in zip(*halves, strict=True)]) == flat(whole)
    keys = [key for step in whole for batch in step for key in batch["key"]]
    times = {key: keys.count(key) for key in index.keys[train].tolist()}
    assert {key for key, count in times.items() if not count} == set(index.keys[gone].tolist())
    assert sum(times.values()) == len(times)
    assert sum(count > 1 for count in times.values()) > 1  # not one for all
    assert sum(len(batch["skipped"]) for step in whole for batch in step) == 3
    for path in own_shard_set.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match=r"every sample of the split is damaged, the first: shard-0"):
        read(own_shard_set, 0, stop=1, damaged="skip")


def test_a_damaged_copy_in_the_cache_is_fetched_once_more(
    own_shard_set: Path, shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, cache = f"file://{own_shard_set}", tmp_path / "cache"
    index, plain = Index.load(url), ShardReader(Index.load(str(shard_set)))

    def cached() -> Path:
        return next(cache.rglob("*-shard-000000.tar"))

    assert ShardReader(index, str(cache)).image(0) == plain.image(0)
    whole = cached().read_bytes()
    for damage in (bytes(len(whole)), whole[:700], b""):
        cached().write_bytes(damage)
        leftover = cached().with_suffix(".tmp")
        leftover.write_bytes(b"of a process that was killed" * 10_000)
        old, older = cached().with_name("other.tmp"), time.time() - 3600
        old.touch()
        os.utime(old, (older, older))
        fresh = ShardReader(index, str(cache))
        assert [fresh.image(o) for o in range(7)] == [plain.image(o) for o in range(7)]
        assert cached().read_bytes() == whole
        assert not list(cache.rglob("*.tmp"))
    assert capsys.readouterr().err.count("shard-000000.tar") == 1  # of two the size tells before they are opened
    two = [ShardReader(index, str(cache)) for _ in range(2)]  # as if in two processes, both with the file open
    assert two[0].image(0) == two[1].image(0)
    cached().write_bytes(bytes(len(whole)))
    assert two[0].image(1) == plain.image(1)
    replaced = cached().stat()
    assert two[1].image(1) == plain.image(1)
    assert os.path.samestat(replaced, cached().stat())  # the second takes what the first has fetched
    cached().write_bytes(bytes(len(whole)))
    with pytest.raises(
        DataError, match=r"sample .* run esol-shards verify file://.*; if that finds nothing, the disk of"
    ):
        two[0].image(2)
    shard = own_shard_set / "shard-000000.tar"
    shard.write_bytes(whole[:-1] + b"x")
    with pytest.raises(
        DataError, match=r"shard-000000\.tar: two fresh copies hold other bytes .*; run esol-shards verify"
    ):
        ShardReader(index, str(cache)).image(2)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar cannot be fetched"):
        ShardReader(index, str(cache)).image(2)
    assert not list(cache.rglob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_named(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    index = Index.load(f"file://{shard_set}")
    with pytest.raises(DataError, match=r"^data\.cache: cannot write .*/file/.*: Not a directory; give a folder"):
        ShardReader(index, str(tmp_path / "file")).image(0)

    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(DataError, match=r"^data\.cache: cannot write .*/cache/.*: No space left on device; give"):
        ShardReader(index, str(tmp_path / "cache")).image(0)


def test_crop_fills_with_the_mean_and_keeps_the_shape() -> None:
    image = torch.full((3, 30, 60), 200, dtype=torch.uint8)
    for seed in range(20):
        out = training_crop(image, np.random.default_rng(seed), Crop(48, (40, 40)), FILL)
        assert out.shape == (3, 48, 48)
        inside = (out == 200).all(0)
        assert inside.any(0).sum() == 40
        assert inside.any(1).sum() == 20  # 30 x 60 at long side 40
        assert (out[:, ~inside] == torch.tensor(FILL, dtype=torch.uint8)[:, None]).all()
    big = training_crop(image, np.random.default_rng(0), Crop(48, (200, 300)), FILL)
    assert (big == 200).all()


def flip_a_photo(root: Path) -> tuple[str, str]:
    """Changes one byte in the middle of a training photo; returns its key and shard."""
    index = Index.load(str(root))
    ordinal = int(index.split("train")[11])
    offset, size, _ = index.members["jpg"][ordinal]
    shard = index.shards[int(index.shard_of[ordinal])].name
    with open(root / shard, "r+b") as file:
        file.seek(offset + size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0xFF]))
    return str(index.keys[ordinal]), shard


def test_label_maps_are_cropped_with_their_photos(shard_set: Path) -> None:
    index = Index.load(str(shard_set))
    reader = ShardReader(index)
    ordinals = index.split("train")
    plan = Plan(ordinals, index.shard_of[ordinals], seed=5, global_batch=8)

    def bright(ordinal: int) -> np.ndarray:
        return (decode(reader.image(ordinal), "")[0] > 127).to(torch.uint8).numpy()

    for workers in (0, 1):
        config = DataConfig(root=str(shard_set), workers=workers)
        stream = training_stream(
            reader, plan, share_of(0, 1, 8, 2), 0, 3, Crop(80, scale=(1.0, 1.0)), config, FILL, bright
        )
        for batch in (b for step in stream for b in step):
            inside = batch["target"] != 255
            assert inside.sum() == 2 * 64 * 64
            assert torch.equal(batch["target"][inside] == 1, batch["image"][:, 0][inside] > 127)
            assert (batch["image"].movedim(1, -1)[~inside] == torch.tensor(FILL)).all()
    with pytest.raises(DataError, match=r"sample .*: the label map is \(3, 3\), the photo \(64, 64\)"):
        list(
            training_stream(
                reader, plan, share_of(0, 1, 8, 2), 0, 1, Crop(32), config, FILL, lambda _: np.zeros((3, 3), np.uint8)
            )
        )
