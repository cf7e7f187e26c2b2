"""Finds damage in shard sets, and indexes sets that something else has written."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from esol.base.errors import DataError
from esol.base.progress import progress
from esol.data.index import PHOTO_EXTENSIONS, Index, scan_tar, write_index
from esol.data.photos import OTHERS, upright_size
from esol.data.samples import decode_mask
from esol.data.storage import filesystem, writer_of
from shards.census import Census
from shards.inputs import list_files, read_bytes, read_lines
from shards.names import foreground
from shards.samples import PHOTO_FORMATS, check_labels, listing, open_image


def verify(root: str, say: Callable[[str], None] = lambda line: None) -> list[str]:
    """Reads everything and returns one line for each problem, naming shard and key; empty where all is well.

    say: is told, where all bytes are sound, how many photos of each class are labelled and drawn. Found are missing,
    surplus, empty, truncated and all-zero shards, changed bytes, samples or members that the index lacks or has too
    many, undecodable photos, sizes and labels that do not fit, masks of another size or with unknown values.
    """
    filesystem(root)  # what is no URL for shards is no problem of theirs
    try:
        index = Index.load(root)
    except DataError as error:
        return [str(error)]
    names = {shard.name for shard in index.shards}
    tars = {name for name in list_files(root) if "/" not in name and name.endswith(".tar")}
    problems = [f"{name} is not in index.json" for name in sorted(tars - names)]
    if json.loads(read_bytes(f"{root.rstrip('/')}/index.json")).get("hash", index.hash) != index.hash:
        problems.append("index.json: classes, splits or shards are not those that were written (hash)")
    census = Census(index.classes)
    with progress("verify", len(index), "samples", visible=True) as advance:
        for number, shard in enumerate(index.shards):
            try:
                data = read_bytes(f"{root.rstrip('/')}/{shard.name}", shard.bytes)
            except DataError as error:
                problems.append(f"{shard.name}: {error}")
            else:
                problems += _check_shard(data, index, number, census)
            advance(int(index.first[number]) + shard.samples, shard.name)
    if not problems and any(census.labelled.values()):
        for line in census.lines():
            say(line)
        try:
            census.refuse(root)
            if census.masks and census.only_void == census.masks:
                problems.append(f"{root}: no mask shows a class, all {census.masks} hold only 0 and 255, which is void")
        except DataError as error:
            problems.append(str(error))
    if problems and (writer := writer_of(root)):
        problems.insert(0, f"{root} is being written by {writer}: verify it again when that is done")
    return problems


def _check_shard(data: bytes, index: Index, number: int, census: Census) -> list[str]:
    shard = index.shards[number]
    if not data:
        return [f"{shard.name} is empty, the index says {shard.bytes} bytes"]
    if data.count(0) == len(data):
        return [f"{shard.name}: all its {len(data)} bytes are zero"]
    problems = []
    if len(data) != shard.bytes:
        kind = "truncated" if len(data) < shard.bytes else "too long"
        problems.append(f"{shard.name} is {kind}: {len(data)} bytes, the index says {shard.bytes}")
    try:
        record = scan_tar(io.BytesIO(data), shard.name)
    except DataError as error:
        problems.append(str(error))
    else:
        problems += _compare(record, index, number)
    for ordinal in range(int(index.first[number]), int(index.first[number]) + shard.samples):
        where = f"{shard.name}: sample {index.keys[ordinal]}"
        if "json" in index.members:  # the outputs of inference stages mirror the keys without photos and labels
            problems += _lacks({ext for ext, table in index.members.items() if table[ordinal, 0] >= 0}, where)
        members: dict[str, bytes] = {}
        for ext, table in index.members.items():
            offset, size, crc = table[ordinal].tolist()
            if offset < 0:
                continue
            piece = data[offset : offset + size]
            if len(piece) < size:
                problems.append(f"{where}, member {ext}: cut off after {len(piece)} of {size} bytes")
            elif zlib.crc32(piece) != crc:
                problems.append(f"{where}, member {ext}: its bytes are not those that the index knows (crc32)")
            else:
                members[ext] = piece
        found = check_sample(members, index.classes, where)
        if not found:
            census.add(str(index.keys[ordinal]), members)
        problems += found
    if not problems and hashlib.sha256(data).hexdigest() != shard.sha256:
        problems.append(f"{shard.name}: bytes between its members are not those that the index knows (sha256)")
    return problems


def _compare(record: dict[str, Any], index: Index, number: int) -> list[str]:
    """What a readable tar file holds, against what the index says it holds."""
    shard, first = index.shards[number], int(index.first[number])
    known = {str(key): first + i for i, key in enumerate(index.keys[first : first + shard.samples])}
    found = {key: i for i, key in enumerate(record["keys"])}
    problems = [
        f"{shard.name}: sample {key} is in the index, but not in the shard" for key in known if key not in found
    ]
    problems += [
        f"{shard.name}: sample {key} is in the shard, but not in the index" for key in found if key not in known
    ]
    for key in known.keys() & found.keys():
        for ext in index.members.keys() | record["members"].keys():
            column = record["members"].get(ext)
            here = column[found[key]] if column else None
            row = index.members[ext][known[key]].tolist() if ext in index.members else [-1, -1, -1]
            listed = row if row[0] >= 0 else None
            if here is None and listed is not None:
                problems.append(f"{shard.name}: sample {key}: member {ext} is in the index, but not in the shard")
            elif here is not None and listed is None:
                problems.append(f"{shard.name}: sample {key}: member {ext} is in the shard, but not in the index")
            elif here is not None and listed is not None and here[:2] != listed[:2]:
                problems.append(f"{shard.name}: sample {key}: member {ext} is not where the index says")
    return sorted(problems)


def _lacks(members: Collection[str], where: str) -> list[str]:
    lacking = [] if "json" in members else ["json"]
    lacking += [] if set(members) & set(PHOTO_EXTENSIONS) else ["photo"]
    return [f"{where} has no {what}; its members: {', '.join(sorted(members))}" for what in lacking]


def check_sample(members: Mapping[str, bytes], classes: Sequence[str], where: str) -> list[str]:
    """Problems of one sample's intact members: photo, json, masks, and whether they fit together."""
    problems: list[str] = []
    size = None
    for ext in (e for e in PHOTO_EXTENSIONS if e in members):
        try:
            image = open_image(members[ext], f"{where}, member {ext}")
            size = upright_size(image)
            if image.format not in (*PHOTO_FORMATS, *OTHERS.values()):
                problems.append(f"{where}, member {ext}: {image.format} is not supported; convert it to JPEG")
        except DataError as error:
            problems.append(str(error))
        break
    if "json" in members:
        try:
            about = json.loads(members["json"])
            if not isinstance(about["labels"], list):
                raise TypeError("labels is no list")
            check_labels(about["labels"], classes, f"{where}, member json")
            stated = (int(about["width"]), int(about["height"]))
            if size is not None and stated != size:
                problems.append(f"{where}: json says {stated[0]}x{stated[1]} pixels, the photo is {size[0]}x{size[1]}")
        except DataError as error:
            problems.append(str(error))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            problems.append(
                f"{where}, member json: must hold labels, height and width ({type(error).__name__}: {error})"
            )
    if "mask.png" in members:
        try:
            levels = decode_mask(members["mask.png"], f"{where}, member mask.png", len(classes))
            if size is not None and levels.shape != size[::-1]:
                own = f"{levels.shape[1]}x{levels.shape[0]}"
                problems.append(f"{where}: member mask.png is {own} pixels, the photo {size[0]}x{size[1]}")
        except DataError as error:
            problems.append(str(error))
    return problems


def index_set(root: str, classes_file: str, splits: Sequence[str] = (), overwrite: bool = False) -> None:
    """Writes index.json for webdataset shards that something else has made: all *.tar of a folder, sorted by name.

    Every sample needs a photo and K.json with labels of the classes file (a name a line). splits: NAME=FILE, a key a
    line; without any, all samples are the split train. DataError lists what does not fit; nothing is written then.
    """
    root = root.rstrip("/")
    if writer := writer_of(root):
        raise DataError(f"{root} is being written by {writer}: index it when that is done")
    names = list_files(root)
    if "index.json" in names and not overwrite:
        raise DataError(
            f"{root} has an index.json; to replace it, give --overwrite (first see: esol-shards verify {root})"
        )
    tars = sorted(name for name in names if "/" not in name and name.endswith(".tar"))
    if not tars:
        raise DataError(f"{root} holds no *.tar file")
    classes, _ = foreground(read_lines(classes_file), classes_file)
    records: list[dict[str, Any]] = []
    problems: list[str] = []
    with progress("index", len(tars), "shards", visible=True) as advance:
        for number, name in enumerate(tars):
            data = read_bytes(f"{root}/{name}")
            try:
                records.append(scan_tar(io.BytesIO(data), name))
                problems += _check_foreign(data, records[-1], classes)
            except DataError as error:
                problems.append(str(error))
            advance(number + 1, name)
    keys = [key for record in records for key in record["keys"]]
    problems += [f"key {key} appears {times} times" for key, times in Counter(keys).items() if times > 1]
    ordinals: dict[str, Sequence[int]] = {}
    for split in splits:
        name, _, file = split.partition("=")
        if not file:
            raise DataError(f"--split {split}: write it as NAME=FILE")
        wanted = read_lines(file)
        place = {key: i for i, key in enumerate(keys)}
        problems += [f"{file}: no shard has key {key}" for key in wanted if key not in place]
        ordinals[name] = sorted({place[key] for key in wanted if key in place})
    if problems:
        raise DataError(listing(f"{root}: {len(problems)} problems; no index was written", problems))
    write_index(root, classes, ordinals or {"train": range(len(keys))}, records)


def _check_foreign(data: bytes, record: dict[str, Any], classes: Sequence[str]) -> list[str]:
    problems = []
    for i, key in enumerate(record["keys"]):
        where = f"{record['name']}: sample {key}"
        rows = {ext: column[i] for ext, column in record["members"].items() if column[i] is not None}
        problems += _lacks(rows.keys(), where)
        problems += check_sample({ext: data[o : o + n] for ext, (o, n, _) in rows.items()}, classes, where)
    return problems
