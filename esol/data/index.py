"""What a shard set holds: index.json, its checks, and the walk through a tar file that it is made from.

Of a set of LARGE or more samples index.json has what is small, and index.npy (columns.py) the arrays over the samples.

A shard set is a folder (or fsspec URL) with shard-000000.tar, shard-000001.tar, ... and index.json. A sample with key K
is the adjacent members K.jpg (.jpeg, .png, .webp), K.json = {"labels": [...], "height": H, "width": W} and, where there
is one, K.mask.png (0 background, 1..C class, 255 void). Its ordinal is its position counting through the shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esol.base.errors import DataError
from esol.base.files import atomic_write, hold, sha256
from esol.base.strangers import content, plain, printable
from esol.data import columns
from esol.data.columns import Columns
from esol.data.storage import (
    CACHE,
    DOWNLOAD_MINUTES,
    LIKELY,
    cache_folder,
    filesystem,
    is_local,
    patient,
    sizes,
    why_missing,
)

FORMAT, FORMAT_LARGE = "esol-shards 1", "esol-shards 2"
LARGE = 100_000  # samples; from here on an index in JSON alone costs each process seconds and 150 MB
PHOTO_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MOST_BYTES = 1 << 32  # of an index.json: some 20 million photos
MOST_CLASSES = 254  # that an 8-bit mask can number: 0 is background, 255 void


@dataclass(frozen=True)
class Shard:
    """One tar file; bytes is the size of the file."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Index:
    """A shard set's content, in arrays over the N sample ordinals (some 200 bytes a sample).

    keys: unicode (N,); shard_of: int32 (N,) position in shards; first: int64 (S,), first ordinal of each shard;
    splits: name -> ascending int64 ordinals; members: extension -> int64 (N, 3) offset of the data in the tar file,
    size, crc32, or -1 where a sample has no such member; hash: of classes, splits, shard contents, not of the place;
    labels: bool (N, C), what each sample's photo shows, or None where the index does not say (sets that an earlier
    version wrote, and what inference stages write); mapped: the file that keys, members and labels are read from where
    they are used, whose pages all processes of a machine share, or "" where they are in memory, which workers fork.
    """

    root: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    keys: np.ndarray
    shard_of: np.ndarray
    first: np.ndarray
    splits: dict[str, np.ndarray]
    members: dict[str, np.ndarray]
    hash: str
    labels: np.ndarray | None = None
    mapped: str = ""

    @staticmethod
    def load(root: str | os.PathLike[str], cache: str = "") -> Index:
        """Reads ROOT/index.json from a local folder or fsspec URL; DataError says what is wrong and what to do.

        cache: where index.npy of a large set behind a URL is fetched to, once per node.
        """
        root = os.fspath(root)
        fs, path = filesystem(root)
        place = f"{root.rstrip('/')}/index.json"
        again = f"rebuild it with: esol-shards index {root} --classes FILE --overwrite"
        try:
            if is_local(fs):
                text = content(Path(path, "index.json"), MOST_BYTES)
            else:
                text = patient(fs, place, LIKELY, fs.cat_file, f"{path}/index.json")
        except FileNotFoundError:
            raise DataError(f"{place} is missing; {why_missing(fs, path, root)}") from None
        except Exception as error:  # every storage back end has its own
            raise DataError(f"cannot read {place}: {error}") from error
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place} is not valid JSON ({error}); {again}") from error
        found = tree.get("format") if isinstance(tree, dict) else None
        if found not in (FORMAT, FORMAT_LARGE):
            raise DataError(
                f"{place} has format {found!r:.80}, this version reads {FORMAT!r} and {FORMAT_LARGE!r}; {again}"
            )
        try:
            return _parse(root, tree) if found == FORMAT else _parse_large(root, tree, cache)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{place} is damaged: {what}; {again}") from error

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        """To be pickled: what is mapped stays in its file, which the other process maps as well."""
        left = ("keys", "members", "labels") if self.mapped else ()
        return {name: value for name, value in vars(self).items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.mapped:
            found = columns.mapped(Path(self.mapped), list(self.splits))
            vars(self).update(keys=found.keys, members=found.members, labels=found.labels)

    def split(self, name: str) -> np.ndarray:
        """Ascending ordinals of a split; DataError names the splits that exist."""
        if name not in self.splits:
            raise DataError(f"{self.root} has no split {name!r}; it has: {', '.join(self.splits) or 'none'}")
        return self.splits[name]

    def image_ext(self, ordinal: int) -> str:
        """Extension of the sample's photo; DataError where it has none."""
        for ext in PHOTO_EXTENSIONS:
            if ext in self.members and self.members[ext][ordinal, 0] >= 0:
                return ext
        shard = self.shards[self.shard_of[ordinal]].name
        raise DataError(f"{shard}: sample {self.keys[ordinal]} has no photo ({', '.join(PHOTO_EXTENSIONS)})")

    def check_files(self) -> None:
        """Checks, without reading, that every shard is there in the size that the index says; DataError lists all."""
        found = sizes(self.root, [shard.name for shard in self.shards])
        problems = []
        for shard, size in zip(self.shards, found, strict=True):
            if size == -1:
                problems.append(f"{shard.name} is missing")
            elif size is not None and size != shard.bytes:
                kind = "empty" if size == 0 else "truncated" if size < shard.bytes else "too long"
                problems.append(f"{shard.name} is {kind}: {size} bytes, the index says {shard.bytes}")
        if problems:
            raise DataError(
                f"{self.root} is damaged: {'; '.join(problems)}. For every detail: esol-shards verify {self.root}"
            )


def write_index(
    root: str | os.PathLike[str],
    classes: Sequence[str],
    splits: Mapping[str, Sequence[int] | np.ndarray],
    shards: Sequence[Mapping[str, Any]],
) -> None:
    """Writes ROOT/index.json, whole or not at all, from the records that scan_shard returns; call it last.

    Of a large set index.npy comes before it.
    """
    tree = {
        "format": FORMAT,
        "classes": list(classes),
        "splits": {name: sorted(int(i) for i in ordinals) for name, ordinals in splits.items()},
        "shards": [dict(s) for s in shards],
    }
    index = _parse(os.fspath(root), tree)  # what cannot be read back is a bug of the caller
    tree["hash"] = index.hash  # for verify: nothing else vouches for classes and splits
    if len(index) >= LARGE:
        data = columns.pack(Columns(index.keys, index.members, index.splits, index.labels))
        _put(root, columns.NAME, data)
        tree |= {"format": FORMAT_LARGE, "splits": list(splits), "shards": [vars(shard) for shard in index.shards]}
        tree["samples"] = {"name": columns.NAME, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    _put(root, "index.json", json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode())


def _put(root: str | os.PathLike[str], name: str, data: bytes | memoryview) -> None:
    fs, path = filesystem(os.fspath(root))
    if is_local(fs):
        atomic_write(f"{path}/{name}", data)
    else:
        # object stores put whole objects or none
        patient(fs, f"{root}/{name}", len(data), fs.pipe_file, f"{path}/{name}", bytes(data))


def scan_shard(folder: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Walks through one tar file of a local folder and returns its record for write_index.

    {"name", "samples", "bytes", "sha256", "keys": [...], "members": {ext: [[offset, size, crc32] or None, ...]}},
    and "labels": a list of names or None for each sample, where samples have a json member.
    DataError where the file is missing, not a whole tar file, or holds a key twice.
    """
    try:
        with open(Path(folder, name), "rb") as file:
            return scan_tar(file, name)
    except FileNotFoundError:
        raise DataError(f"{name} is missing in {os.fspath(folder)}") from None


def scan_tar(file: Any, name: str) -> dict[str, Any]:
    """scan_shard of an open binary file; name is for messages and the record."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size == 0:
        raise DataError(f"{name} is empty")
    keys: list[str] = []
    rows: list[dict[str, list[int]]] = []
    labels: dict[str, list[str] | None] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, dot, ext = _key_and_extension(member.name)
                if not member.isfile() or not dot or (key.startswith("__") and key.endswith("__")):
                    continue  # folders and notes: webdataset's readers pass over them as well
                if not plain(key):
                    raise DataError(f"{name}: the name {member.name!r:.80} is no plain path below a folder")
                if not keys or keys[-1] != key:
                    keys.append(key)
                    rows.append({})
                if ext in rows[-1]:
                    raise DataError(f"{name}: sample {key} has member {ext} twice")
                file.seek(member.offset_data)
                data = file.read(member.size)
                if len(data) != member.size:
                    raise DataError(f"{name} is truncated in sample {key}, member {ext}")
                rows[-1][ext] = [member.offset_data, member.size, zlib.crc32(data)]
                if ext == "json":
                    labels[key] = _labels(data)
            end = tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError) as error:
        after = f" after sample {keys[-1]}" if keys else ""
        raise DataError(f"{name} is not a whole tar file{after}: {error}") from error
    # tarfile ends without a word at a damaged header and at a cut between members; the end marker tells
    file.seek(end)
    rest = file.read()
    if not keys:
        raise DataError(f"{name} holds no sample" + (" (all bytes are zero)" if not any(rest) else ""))
    if len(rest) < 1024 or rest.strip(b"\0"):
        raise DataError(f"{name} is truncated or damaged after sample {keys[-1]}: no end of archive at byte {end}")
    twice = {k for k, n in zip(*np.unique(keys, return_counts=True), strict=True) if n > 1}
    if twice:
        raise DataError(f"{name} holds these keys twice: {', '.join(sorted(map(str, twice))[:5])}")
    extensions = sorted({ext for row in rows for ext in row})
    members = {ext: [row.get(ext) for row in rows] for ext in extensions}
    record = {"name": name, "samples": len(keys), "bytes": size, "sha256": digest, "keys": keys, "members": members}
    return record | ({"labels": [labels.get(key) for key in keys]} if labels else {})


def _labels(data: bytes) -> list[str] | None:
    """The labels that a json member holds; None where it is damaged, which its reader will say."""
    try:
        found = json.loads(data)["labels"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else None


def _key_and_extension(name: str) -> tuple[str, str, str]:
    """webdataset's rule: the key ends at the first dot behind the last slash; extensions are lower case."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, ext = base.partition(".")
    return folder + slash + stem, dot if stem else "", ext.lower()


def check_classes(classes: tuple[str, ...]) -> None:
    """ValueError where these are not the names of 1 to MOST_CLASSES classes, which stand on pages and terminals."""
    if not classes or not all(isinstance(c, str) and c for c in classes) or len(set(classes)) != len(classes):
        raise ValueError(f"classes must be different names, got {classes!r:.200}")
    if foreign := [name for name in classes if printable(name) != name]:
        raise ValueError(f"class {foreign[0]!r:.80} has characters that are no text")
    if len(classes) > MOST_CLASSES:
        raise ValueError(f"{len(classes)} classes; masks can number {MOST_CLASSES}")


def _parse(root: str, tree: dict[str, Any]) -> Index:
    classes, shards = _classes_and_shards(tree)
    for shard, record in zip(shards, tree["shards"], strict=True):
        listed = {"keys": record["keys"], "labels": record.get("labels", record["keys"]), **record["members"]}
        for what, column in listed.items():
            if not isinstance(column, list) or len(column) != shard.samples:
                raise ValueError(f"{shard.name} must have as many {what} as samples, {shard.samples}")
        for key in record["keys"]:
            if not plain(str(key)):
                raise ValueError(f"{shard.name}: key {key!r:.80} is no plain path below a folder")
    names = np.array([str(key) for record in tree["shards"] for key in record["keys"]], dtype=np.str_)
    found, times = np.unique(names, return_counts=True)
    if (times > 1).any():
        raise ValueError(f"key {found[times > 1][0]} appears twice")
    total = len(names)
    splits = {name: np.array(ordinals, dtype=np.int64) for name, ordinals in tree["splits"].items()}
    _check_splits(splits)
    for name, ordinals in splits.items():
        if ordinals.ndim != 1 or (ordinals < 0).any() or (ordinals >= total).any() or (np.diff(ordinals) <= 0).any():
            raise ValueError(f"split {name} must hold ascending ordinals below {total}")
    rows = [own for s in tree["shards"] for own in s.get("labels", [None] * int(s["samples"]))]
    members = _member_tables(shards, tree["shards"], total)
    return _assemble(root, classes, shards, Columns(names, members, splits, _multi_hot(rows, classes)))


def _parse_large(root: str, tree: dict[str, Any], cache: str) -> Index:
    classes, shards = _classes_and_shards(tree)
    splits, spec = tree["splits"], tree["samples"]
    if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
        raise ValueError(f"splits must be a list of names, got {splits!r:.200}")
    _check_splits(splits)
    if len(set(splits)) != len(splits):
        raise ValueError(f"splits has names twice: {', '.join(splits):.200}")
    if not isinstance(spec, dict) or spec["name"] != columns.NAME:
        raise ValueError(f"samples must be those of {columns.NAME}, got {spec!r:.200}")
    _check_sha256(columns.NAME, spec["sha256"])
    path = _array_file(root, spec["sha256"], int(spec["bytes"]), cache)
    try:
        if (path.stat().st_size, sha256(path)) != (spec["bytes"], spec["sha256"]):
            raise ValueError("it is not the file that index.json was written with")
        found = columns.load(path, splits, len(classes), [(s.samples, s.bytes) for s in shards])
    except (OSError, ValueError) as error:
        again = f"rebuild both with: esol-shards index {root} --classes FILE --overwrite"
        what = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged: {error}"
        raise DataError(f"{root.rstrip('/')}/{columns.NAME} {what}; {again}") from error
    return _assemble(root, classes, shards, found, str(path))


def _array_file(root: str, digest: str, size: int, cache: str) -> Path:
    """index.npy as a local file; of a set behind a URL in the cache, under a name that its content gives."""
    fs, path = filesystem(root)
    if "://" not in root:
        return Path(path) / columns.NAME
    place, folder = f"{root.rstrip('/')}/{columns.NAME}", cache_folder(root, cache or CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{digest[:16]}-{columns.NAME}"
        with hold(folder / f"{columns.NAME}.lock", DOWNLOAD_MINUTES * 60):
            if not target.exists() or sha256(target) != digest:
                atomic_write(target, patient(fs, place, size, fs.cat_file, f"{path}/{columns.NAME}"))
    except FileNotFoundError:
        raise DataError(f"{place} is missing; rebuild it with: esol-shards index {root} --classes FILE") from None
    except Exception as error:  # every storage back end has its own
        raise DataError(f"{place} cannot be fetched to {folder} (data.cache): {error}") from error
    return target


def _classes_and_shards(tree: dict[str, Any]) -> tuple[tuple[str, ...], tuple[Shard, ...]]:
    check_classes(classes := tuple(tree["classes"]))
    shards = tuple(Shard(s["name"], int(s["samples"]), int(s["bytes"]), s["sha256"]) for s in tree["shards"])
    if not shards:
        raise ValueError("it lists no shard")
    for shard in shards:
        if shard.name in ("", ".", "..") or shard.name != Path(shard.name).name or not shard.name.isprintable():
            raise ValueError(f"shard {shard.name!r} is not a plain file name")
        if shard.samples < 0:
            raise ValueError(f"{shard.name} holds {shard.samples} samples")
        _check_sha256(shard.name, shard.sha256)
    return classes, shards


def _check_splits(names: Iterable[str]) -> None:
    for name in names:
        if not plain(name) or "/" in name:
            raise ValueError(f"split {name!r:.80} is no plain name")


def _check_sha256(name: str, digest: object) -> None:
    """A hash names a file of the cache: nothing else may get there."""
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"{name} has sha256 {digest!r:.80}")


def _assemble(
    root: str, classes: tuple[str, ...], shards: tuple[Shard, ...], found: Columns, mapped: str = ""
) -> Index:
    sizes = np.array([s.samples for s in shards], dtype=np.int64)
    splits = {name: ordinals.tolist() for name, ordinals in sorted(found.splits.items())}
    content = json.dumps([classes, splits, [s.sha256 for s in shards]])
    return Index(
        root=root,
        classes=classes,
        shards=shards,
        keys=found.keys,
        shard_of=np.repeat(np.arange(len(shards), dtype=np.int32), sizes),
        first=np.cumsum(sizes) - sizes,
        splits=found.splits,
        members=found.members,
        hash=hashlib.sha256(content.encode()).hexdigest(),
        labels=found.labels,
        mapped=mapped,
    )


def _multi_hot(rows: list[list[str] | None], classes: tuple[str, ...]) -> np.ndarray | None:
    """bool (N, C); None where a row is unknown or names what is no class, which the reader of the sample will say."""
    place = {name: i for i, name in enumerate(classes)}
    if any(row is None or any(name not in place for name in row) for row in rows):
        return None
    found = np.zeros((len(rows), len(classes)), bool)
    samples = np.repeat(np.arange(len(rows)), [len(row or ()) for row in rows])
    found[samples, [place[name] for row in rows for name in row or ()]] = True
    return found


def _member_tables(shards: Sequence[Shard], records: Sequence[dict[str, Any]], total: int) -> dict[str, np.ndarray]:
    members: dict[str, np.ndarray] = {}
    start = 0
    for shard, record in zip(shards, records, strict=True):
        for ext, column in record["members"].items():
            rows = np.array([(-1, -1, -1) if row is None else row for row in column], dtype=np.int64)
            if rows.shape != (shard.samples, 3):
                raise ValueError(f"{shard.name}: members {ext} must be [offset, size, crc32] or null")
            there = np.array([row is not None for row in column])
            if (rows[there] < 0).any() or (rows[there, 1] > shard.bytes - rows[there, 0]).any():
                raise ValueError(f"{shard.name} has {ext} members outside its {shard.bytes} bytes")
            members.setdefault(ext, np.full((total, 3), -1, dtype=np.int64))[start : start + shard.samples] = rows
        start += shard.samples
    return members
