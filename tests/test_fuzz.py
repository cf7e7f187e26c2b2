"""A slice of benchmarks.fuzz, the proof that it sees a crash, a hang and a miss, and the bugs that it has found."""

import io
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

from benchmarks.fuzz import BAD, KINDS, Case, cases, judge, run, summary
from benchmarks.fuzz_kinds import NAME, make_set
from esol.base.errors import DataError
from esol.data.index import Index, write_index
from esol.data.reader import ShardReader
from esol.data.samples import decode_mask, encode_png, write_mirror_shard
from esol.data.transforms import decode
from shards.verify import verify

ODD_MATRIX = "label map: confusion_matrix, odd"


def test_every_kind_of_damage_is_reported_or_harmless() -> None:
    chosen = [case for case in cases(len(KINDS), seed=1) if case.name != ODD_MATRIX]
    outcomes = run(chosen)
    assert [o.case.number for o in outcomes] == [case.number for case in chosen]
    assert not [o for o in outcomes if o.verdict in BAD]
    assert sum(o.by_verify for o in outcomes) > 20
    assert sum(o.by_reading for o in outcomes) > 15
    assert summary(outcomes).count("\n") == len(chosen) + 2


def test_a_confusion_matrix_refuses_what_it_cannot_count(tmp_path: Path) -> None:
    outcomes = [judge(Case(i, ODD_MATRIX, KINDS[ODD_MATRIX], 0), tmp_path) for i in range(40)]
    assert not [o for o in outcomes if o.verdict in BAD]


def die(root: Path, rng: np.random.Generator) -> None:
    os.abort()


def hang(root: Path, rng: np.random.Generator) -> None:
    time.sleep(3600)


def nothing(root: Path, rng: np.random.Generator) -> None:
    pass


def cover_up(root: Path, rng: np.random.Generator) -> None:
    """Another split, and an index that vouches for it."""
    index = Index.load(root)
    records = json.loads((root / "index.json").read_text())["shards"]
    write_index(root, index.classes, {"train": index.splits["train"][1:], "val": index.splits["val"]}, records)


def test_crashes_hangs_and_misses_are_seen() -> None:
    kinds = (die, cover_up, hang, nothing)
    outcomes = run([Case(i, kind.__name__, kind, 0) for i, kind in enumerate(kinds)], seconds=4)
    assert [o.verdict for o in outcomes] == ["crash", "miss", "hang", "harmless"]
    assert "exit code -6" in outcomes[0].detail
    assert "splits" in outcomes[1].detail


# What it has found.


def encoded(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA", "L")),
    ],
)
def test_photos_that_pillow_decodes_are_those_of_torchvision(kind: str, mode: str) -> None:
    pixels = Image.fromarray(PIXELS).convert(mode)
    out = io.BytesIO()
    pixels.save(out, kind, lossless=True) if kind == "WEBP" else pixels.save(out, kind)
    tensor = torch.frombuffer(bytearray(out.getvalue()), dtype=torch.uint8)
    found = decode(out.getvalue(), "x")
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    assert torch.equal(found, decode_image(tensor, mode=ImageReadMode.RGB))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_photos_are_turned_upright_in_every_format(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(PIXELS, kind, exif=exif), "x").shape == (3, 17, 12)


def test_16_bit_gray_photos_become_8_bits() -> None:
    gray = PIXELS[..., 0].astype(np.uint16) * 256 + 77
    assert torch.equal(decode(encoded(gray, "PNG"), "x"), torch.from_numpy(PIXELS[..., 0]).expand(3, -1, -1))


def test_damaged_png_photos_are_errors_not_the_end_of_the_process() -> None:
    whole = encoded(PIXELS, "PNG")
    for at in range(41, len(whole) - 24, 7):
        with pytest.raises(DataError, match=r"^x: the image cannot be decoded"):
            decode(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], "x")


def test_masks_that_are_no_class_numbers_are_errors() -> None:
    levels = np.array([[0, 3, 255]], np.uint8)
    assert decode_mask(encoded(levels, "PNG"), "x", classes=3).tolist() == [[0, 3, 255]]
    with pytest.raises(DataError, match="x: value 3 is no class"):
        decode_mask(encoded(levels, "PNG"), "x", classes=2)
    huge = bytearray(encode_png(Image.fromarray(levels)))
    huge[16:24] = bytes([0, 1, 0, 0] * 2)  # a bomb to Pillow
    for data, words in (
        (encoded(levels.astype(np.uint16), "PNG"), "must be an 8-bit"),
        (encoded(PIXELS, "PNG"), "PNG RGB"),
        (encode_png(Image.fromarray(levels).convert("1")), "PNG 1"),
        (bytes(huge), "cannot be decoded"),
        (encoded(PIXELS, "WEBP"), "must be an 8-bit palette or gray PNG of class numbers, not WebP"),
    ):
        with pytest.raises(DataError, match=f"^x: .*{words}"):
            decode_mask(data, "x")


@pytest.mark.parametrize(
    "text", [b"{", b"[]", b"null", b"{}", b'{"labels": ""}', b'{"labels": {}}', b"\xff", b"[" * 10**5]
)
def test_a_json_without_labels_is_an_error_that_names_shard_and_key(tmp_path: Path, text: bytes) -> None:
    record = write_mirror_shard(tmp_path, "s.tar", [{"__key__": "k", "jpg": encoded(PIXELS, "JPEG"), "json": text}])
    write_index(tmp_path, ("cat",), {"train": [0]}, [record])
    with pytest.raises(DataError, match=r"^s\.tar, sample k: its json must hold a list of labels"):
        ShardReader(Index.load(tmp_path)).labels(0)
    assert any("sample k" in line and "labels" in line for line in verify(str(tmp_path)))


def test_verify_knows_the_classes_and_splits_that_were_written(tmp_path: Path) -> None:
    path = make_set(tmp_path / NAME) / "index.json"
    text = path.read_text()
    assert not verify(str(path.parent))
    for edit in (
        lambda t: t["splits"]["val"].pop(),
        lambda t: t["classes"].reverse(),
        lambda t: t["splits"].pop("val"),
        lambda t: t.update(hash=None),
    ):
        tree = json.loads(text)
        edit(tree)
        path.write_text(json.dumps(tree))
        assert verify(str(path.parent)) == [
            "index.json: classes, splits or shards are not those that were written (hash)"
        ]
    tree = json.loads(text)
    del tree["hash"]  # as older versions wrote it
    path.write_text(json.dumps(tree))
    assert not verify(str(path.parent))


def test_photos_that_training_cannot_decode_and_endless_sizes_are_found_by_verify(tmp_path: Path) -> None:
    samples = []
    for key, photo, height in (("ppm", encoded(PIXELS, "PPM"), 12), ("size", encoded(PIXELS, "JPEG"), float("inf"))):
        about = json.dumps({"labels": ["cat"], "height": height, "width": 17}).encode()
        samples.append({"__key__": key, "jpg": photo, "json": about})
    record = write_mirror_shard(tmp_path, "s.tar", samples)
    write_index(tmp_path, ("cat",), {"train": [0, 1]}, [record])
    found = verify(str(tmp_path))
    assert len(found) == 2
    assert "s.tar: sample ppm, member jpg: PPM is not supported" in found[0]
    assert "s.tar: sample size, member json" in found[1]
    with pytest.raises(DataError, match="sample ppm: the image cannot be decoded"):
        decode(samples[0]["jpg"], ShardReader(Index.load(tmp_path)).name(0))


def test_a_folder_where_a_shard_was_and_odd_shard_names_are_errors(tmp_path: Path) -> None:
    root = make_set(tmp_path / NAME)
    shard = root / "shard-000001.tar"
    shard.unlink()
    shard.mkdir()
    with pytest.raises(DataError, match=r"shard-000001\.tar, sample \w+: the shard cannot be read"):
        ShardReader(Index.load(root)).read(4, "json")
    text = (root / "index.json").read_text()
    for edit in (lambda s: s.update(name="a\0b"), lambda s: s.update(sha256=5)):
        tree = json.loads(text)
        edit(tree["shards"][1])
        (root / "index.json").write_text(json.dumps(tree))
        with pytest.raises(DataError, match=r"index\.json is damaged"):
            Index.load(root)
