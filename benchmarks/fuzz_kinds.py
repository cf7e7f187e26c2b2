"""The damage that benchmarks.fuzz does: to shard files, to index.json, to single members."""

from __future__ import annotations

import io
import itertools
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from esol.data.index import Index, write_index
from esol.data.reader import ShardReader
from esol.data.samples import encode_mask, encode_png, write_mirror_shard
from shards.samples import Source, pack
from shards.synthetic import CLASSES, draw_scene
from shards.writer import create

NAME = "damaged-set"  # the folder's name, by which a report may name the set
Rng = np.random.Generator
PHOTOS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
# what nothing of an index or json should be, and what JSON and Python take for numbers
ODD: tuple[Any, ...] = (None, True, -1, 0.5, 10**30, float("inf"), float("nan"), "", "x", "a\0b", "../x", [], {}, [[]])


def make_set(root: Path) -> Path:
    """Twelve photos of 40 x 56 pixels in three formats, with masks, in three shards."""
    formats = tuple(PHOTOS)

    def read(key: str) -> dict[str, bytes]:
        number = int(key[1:])
        image, mask, _ = draw_scene(np.random.default_rng([7, number]), 64)
        image, mask = image[12:52, 4:60], mask[12:52, 4:60]
        labels = [CLASSES[c - 1] for c in np.unique(mask) if c] or [CLASSES[0]]
        photo = encode(Image.fromarray(image), formats[number % 3])
        return pack(key, key, photo, labels, CLASSES, encode_mask(mask), key)

    keys = [f"k{i:02d}" for i in range(12)]
    create(Source(CLASSES, {"train": keys[:9], "val": keys[9:]}, read), str(root), samples_per_shard=4)
    return root


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


# Bytes: of a shard, of index.json, of a member.


def flip(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        changed[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _cut(data: bytes, rng: Rng) -> tuple[bytes, bytes, bytes]:
    """Before, inside and after a random piece of at most a quarter."""
    start = int(rng.integers(len(data)))
    stop = start + int(rng.integers(1, max(2, len(data) // 4)))
    return data[:start], data[start:stop], data[stop:]


def overwrite(data: bytes, rng: Rng) -> bytes:
    before, piece, after = _cut(data, rng)
    return before + rng.bytes(len(piece)) + after


def insert(data: bytes, rng: Rng) -> bytes:
    before, piece, after = _cut(data, rng)
    return before + rng.bytes(int(rng.integers(1, 700))) + piece + after


def delete(data: bytes, rng: Rng) -> bytes:
    before, _, after = _cut(data, rng)
    return before + after


def zero(data: bytes, rng: Rng) -> bytes:
    before, piece, after = _cut(data, rng)
    return before + bytes(len(piece)) + after


def truncate(data: bytes, rng: Rng) -> bytes:
    return data[: int(rng.integers(len(data)))]


BYTES = (flip, overwrite, insert, delete, zero, truncate)


def any_bytes(data: bytes, rng: Rng) -> bytes:
    return BYTES[int(rng.integers(len(BYTES)))](data, rng)


# Shards.


def _shard(root: Path, rng: Rng) -> Path:
    shards = sorted(root.glob("*.tar"))
    return shards[int(rng.integers(len(shards)))]


def _of_shard(change: Callable[[bytes, Rng], bytes], root: Path, rng: Rng) -> None:
    path = _shard(root, rng)
    path.write_bytes(change(path.read_bytes(), rng))


def _of_entries(change: Callable[[list[bytes], Rng], Any], root: Path, rng: Rng) -> None:
    """Changes the list of a shard's entries, each a header and its data."""
    path = _shard(root, rng)
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        starts = [member.offset for member in tar]
        end = tar.offset - 512  # behind the first block of the end marker
    entries = [data[a:b] for a, b in itertools.pairwise([*starts, end])]
    change(entries, rng)
    path.write_bytes(b"".join(entries) + data[end:])


def _swap(entries: list[Any], rng: Rng) -> None:
    a, b = rng.choice(len(entries), 2, replace=False)
    entries[a], entries[b] = entries[b], entries[a]


def _duplicate(entries: list[bytes], rng: Rng) -> None:
    entries.insert(int(rng.integers(len(entries) + 1)), entries[int(rng.integers(len(entries)))])


def _drop(entries: list[bytes], rng: Rng) -> None:
    del entries[int(rng.integers(len(entries)))]


def _swap_shards(root: Path, rng: Rng) -> None:
    shards = sorted(root.glob("*.tar"))
    contents = [path.read_bytes() for path in shards]
    _swap(contents, rng)
    for path, data in zip(shards, contents, strict=True):
        path.write_bytes(data)


def _folder_for_shard(root: Path, rng: Rng) -> None:
    path = _shard(root, rng)
    path.unlink()
    path.mkdir()


# index.json: a tree, and the places in it.


def _of_index(change: Callable[[bytes, Rng], bytes], root: Path, rng: Rng) -> None:
    path = root / "index.json"
    path.write_bytes(change(path.read_bytes(), rng))


def _places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key or number) of every node below."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, child in inside for place in [(node, key), *_places(child)]]


def _pick(places: Sequence[tuple[Any, Any]], rng: Rng) -> tuple[Any, Any]:
    """Places near the root as likely as the many numbers below: first a kind of place, then one of them."""
    groups: dict[str, list[tuple[Any, Any]]] = {}
    for container, key in places:
        groups.setdefault(f"{key if isinstance(key, str) else ''} {type(container[key]).__name__}", []).append(
            (container, key)
        )
    group = groups[sorted(groups)[int(rng.integers(len(groups)))]]
    return group[int(rng.integers(len(group)))]


def remove_node(data: bytes, rng: Rng) -> bytes:
    tree = json.loads(data)
    container, key = _pick(_places(tree), rng)
    del container[key]
    return json.dumps(tree).encode()


def replace_node(data: bytes, rng: Rng) -> bytes:
    tree = json.loads(data)
    container, key = _pick(_places(tree), rng)
    odd = [str(container[key]), *ODD]
    container[key] = odd[int(rng.integers(len(odd)))]
    return json.dumps(tree).encode()


def shift_number(data: bytes, rng: Rng) -> bytes:
    tree = json.loads(data)
    numbers = [(c, k) for c, k in _places(tree) if isinstance(c[k], int)]
    container, key = _pick(numbers, rng)
    container[key] += int(rng.choice([-512, -1, 1, 512, 10**6, 2**62]))
    return json.dumps(tree).encode()


def exchange(data: bytes, rng: Rng) -> bytes:
    """Two entries of one list: classes, keys, ordinals, places."""
    tree = json.loads(data)
    lists = [(c, k) for c, k in _places(tree) if isinstance(c[k], list) and len(c[k]) > 1]
    container, key = _pick(lists, rng)
    _swap(container[key], rng)
    return json.dumps(tree).encode()


FILES: dict[str, Callable[[Path, Rng], None]] = {
    **{f"shard: {change.__name__}": partial(_of_shard, change) for change in BYTES},
    "shard: swap members": partial(_of_entries, _swap),
    "shard: duplicate a member": partial(_of_entries, _duplicate),
    "shard: drop a member": partial(_of_entries, _drop),
    "shard: swap two shards": _swap_shards,
    "shard: a folder in its place": _folder_for_shard,
    "index.json: bytes": partial(_of_index, any_bytes),
    "index.json: remove a field": partial(_of_index, remove_node),
    "index.json: other type": partial(_of_index, replace_node),
    "index.json: shift a number": partial(_of_index, shift_number),
    "index.json: exchange entries": partial(_of_index, exchange),
}


# Members: the index is given the new bytes' crc32, so that they reach the decoders.


@dataclass(frozen=True)
class Member:
    """Changes one sample's member; may_be_valid: where nobody objects, it is another sound sample."""

    exts: tuple[str, ...]
    change: Callable[[bytes, Rng], bytes]
    may_be_valid: bool = False

    def __call__(self, root: Path, rng: Rng) -> None:
        index = Index.load(root)
        reader = ShardReader(index)
        there = [(i, e) for e in self.exts for i in np.flatnonzero(index.members[e][:, 0] >= 0).tolist()]
        ordinal, ext = there[int(rng.integers(len(there)))]
        records = []
        for number, shard in enumerate(index.shards):
            samples = []
            for i in range(int(index.first[number]), int(index.first[number]) + shard.samples):
                members = {e: reader.read(i, e) for e, rows in index.members.items() if rows[i, 0] >= 0}
                if i == ordinal:
                    members[ext] = self.change(members[ext], rng)
                samples.append({"__key__": str(index.keys[i]), **members})
            records.append(write_mirror_shard(root, shard.name, samples))
        write_index(root, index.classes, index.splits, records)


def _of_image(change: Callable[[Image.Image, Rng], bytes], data: bytes, rng: Rng) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return change(image, rng)


def _empty(data: bytes, rng: Rng) -> bytes:
    return b""


def _resized(image: Image.Image, rng: Rng) -> bytes:
    size = (image.width + int(rng.integers(1, 9)), image.height)
    return encode(image.resize(size, Image.Resampling.NEAREST), image.format or "PNG")


def _turned(image: Image.Image, rng: Rng) -> bytes:
    """Lies on its side by its EXIF tag; the json has the size of before."""
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(5, 9))
    return encode(image, image.format or "PNG", exif=exif)


def _other_format(image: Image.Image, rng: Rng) -> bytes:
    kind = ("GIF", "BMP", "TIFF", "PPM")[int(rng.integers(4))]
    more = {"save_all": True, "append_images": [image.convert("RGB").rotate(180)]} if kind in ("GIF", "TIFF") else {}
    return encode(image.convert("RGB"), kind, **more)


def _other_mode(image: Image.Image, rng: Rng) -> bytes:
    values = np.asarray(image)
    if rng.random() < 0.3:
        return encode_png(Image.fromarray(values.astype(np.uint16)))
    return encode_png(Image.fromarray(values).convert(("1", "RGB", "RGBA", "LA")[int(rng.integers(4))]))


def _above_classes(image: Image.Image, rng: Rng) -> bytes:
    values = np.array(image)
    values[int(rng.integers(image.height)), int(rng.integers(image.width))] = rng.integers(len(CLASSES) + 1, 255)
    return encode_png(Image.fromarray(values)) if rng.random() < 0.5 else encode_mask(values)


def _only_void(image: Image.Image, rng: Rng) -> bytes:
    return encode_mask(np.full((image.height, image.width), 255, np.uint8))


def _chunks(data: bytes, rng: Rng) -> bytes:
    """Damages a chunk of a PNG file and writes its crc anew, so that inflate and the filters meet it."""
    at, pieces = 8, []
    while at + 12 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        pieces.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    full = [i for i, (_, content) in enumerate(pieces) if content]
    chosen = full[int(rng.integers(len(full)))]
    pieces[chosen] = (pieces[chosen][0], any_bytes(pieces[chosen][1], rng))
    if rng.random() < 0.2:  # a size that no memory holds
        pieces[0] = (pieces[0][0], struct.pack(">II", *rng.integers(10**4, 2**31, 2)) + pieces[0][1][8:])
    return data[:8] + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in pieces
    )


def _other_type(data: bytes, rng: Rng) -> bytes:
    changed = data
    while changed == data or json.loads(changed)["labels"] == []:  # no label at all is sound
        changed = replace_node(data, rng)
    return changed


def _odd_json(data: bytes, rng: Rng) -> bytes:
    texts = (b"[" * 100_000, b"[3]", b"null", b"\xff\xfe", b'{"labels": ["fsh"], "height": 40, "width": 56}')
    return texts[int(rng.integers(len(texts)))]


_PHOTO, _MASK, _JSON = tuple(PHOTOS.values()), ("mask.png",), ("json",)
CONTENT: dict[str, Member] = {
    "photo: bytes": Member(_PHOTO, any_bytes, may_be_valid=True),
    "photo: PNG chunks": Member(("png",), _chunks, may_be_valid=True),
    "photo: truncated": Member(_PHOTO, truncate),
    "photo: empty": Member(_PHOTO, _empty),
    "photo: other size": Member(_PHOTO, partial(_of_image, _resized)),
    "photo: turned": Member(_PHOTO, partial(_of_image, _turned)),
    "photo: other format": Member(_PHOTO, partial(_of_image, _other_format), may_be_valid=True),
    "mask: bytes": Member(_MASK, any_bytes),
    "mask: PNG chunks": Member(_MASK, _chunks, may_be_valid=True),
    "mask: empty": Member(_MASK, _empty),
    "mask: other size": Member(_MASK, partial(_of_image, _resized)),
    "mask: 16 bits, RGB, ...": Member(_MASK, partial(_of_image, _other_mode)),
    "mask: number above C": Member(_MASK, partial(_of_image, _above_classes)),
    "mask: only void": Member(_MASK, partial(_of_image, _only_void), may_be_valid=True),
    "json: bytes": Member(_JSON, any_bytes, may_be_valid=True),
    "json: remove a field": Member(_JSON, remove_node, may_be_valid=True),
    "json: other type": Member(_JSON, _other_type),
    "json: anything": Member(_JSON, _odd_json),
}
