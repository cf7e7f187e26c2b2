"""Sets of the size of COCO and ImageNet: making the shards, the index, and one walk through all photos.

    python -m benchmarks.large_set create --folder scratch --photos 100000
    python -m benchmarks.large_set index --folder scratch
    python -m benchmarks.large_set walk --folder scratch

create  photos a second of `esol-shards create folder` by processes and by threads, in turn; names are many, photos few:
        DISTINCT drawn scenes of SIDE pixels with masks, under hard links
index   one of made-up samples, by itself: size, seconds to load, memory of ranks and workers, seconds to an epoch
walk    that many tiny photos, really made; each read once in the order of an epoch; 300 batches of the training stream

The folder takes 3 GB for a walk of 1.2 million photos and 6 GB for each 50,000 photos of create; it is left empty.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import interleaved, machine, ratios, table
from esol.base.machine import cores
from esol.config import DataConfig
from esol.data import index as index_module
from esol.data.index import Index, write_index
from esol.data.plan import Plan, share_of
from esol.data.reader import ShardReader
from esol.data.samples import encode_jpeg
from shards import writer
from shards.folder import folder_source
from shards.samples import Reads, Source, pack
from shards.synthetic import CLASSES, synthetic_source

DISTINCT, SIDE = 300, 480
CATEGORIES = tuple(f"category-{number:02d}" for number in range(80))  # as many as COCO has
TINY, BATCH = 32, 64  # pixels of a tiny photo's side, photos of a batch
NEVER = 10**12


def make_photos(folder: Path, photos: int) -> None:
    """A folder as `create folder` reads it: images/, masks/, labels.csv, classes.txt."""
    source, labels = synthetic_source(DISTINCT, 0, SIDE), []
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number, key in enumerate(source.splits["train"]):
        sample = source.read(key)
        labels.append(";".join(json.loads(sample["json"])["labels"]))
        (folder / f"images/{number:06d}.jpg").write_bytes(sample["jpg"])
        (folder / f"masks/{number:06d}.png").write_bytes(sample["mask.png"])
    for number in range(DISTINCT, photos):
        for name in ("images/{:06d}.jpg", "masks/{:06d}.png"):
            os.link(folder / name.format(number % DISTINCT), folder / name.format(number))
    rows = [f"{number:06d}.jpg,{labels[number % DISTINCT]}" for number in range(photos)]
    (folder / "labels.csv").write_text("image,labels\n" + "\n".join(rows) + "\n")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def create(folder: Path, photos: int, rounds: int) -> None:
    make_photos(folder / "photos", photos)
    source, out, worth = folder_source(str(folder / "photos")), folder / "out", writer.WORTH

    def made(workers: int, least: int) -> float:
        writer.WORTH = least
        began = time.perf_counter()
        writer.create(source, str(out), workers=workers)
        spent = time.perf_counter() - began
        shutil.rmtree(out)
        return photos / spent

    cases: dict[str, Callable[[], float]] = {
        "one thread": partial(made, 1, NEVER),
        f"{cores()} threads, as before": partial(made, cores(), NEVER),
        f"{cores()} processes": partial(made, cores(), worth),
    }
    found = interleaved(cases, rounds)
    print(f"{machine()}; {photos} photos of {SIDE} pixels, {rounds} rounds in turn\n")
    rows = []
    for name, rates in found.items():
        median, least, most = ratios(rates, found["one thread"])
        rows.append((name, statistics.median(rates), median, least, most))
    print(table(("made by", "photos/s", "of one thread, median", "least", "most"), rows))


def make_index(root: Path, samples: int, large: bool) -> float:
    """Writes one of shards that are not there; returns the seconds that it took."""
    rng, records, members = np.random.default_rng(0), [], ("jpg", "json", "mask.png")
    for number, keys in enumerate(np.array_split(np.arange(samples), -(-samples // writer.SAMPLES_PER_SHARD))):
        sizes = rng.integers(1, 200, (len(keys), len(members))) * 512
        ends = np.cumsum(sizes.ravel() + 512).reshape(sizes.shape)
        crcs = rng.integers(0, 2**32, sizes.shape)
        records.append(
            {
                "name": f"shard-{number:06d}.tar",
                "samples": len(keys),
                "bytes": int(ends[-1, -1]) + 1024,
                "sha256": rng.bytes(32).hex(),
                "keys": [f"n01440764_{key:07d}" for key in keys],
                "members": {
                    ext: np.stack([ends[:, i] - sizes[:, i], sizes[:, i], crcs[:, i]], 1).tolist()
                    for i, ext in enumerate(members)
                },
                "labels": [[CATEGORIES[i] for i in own] for own in rng.integers(0, 80, (len(keys), 2)).tolist()],
            }
        )
    splits = {"train": np.arange(samples * 24 // 25), "val": np.arange(samples * 24 // 25, samples)}
    root.mkdir(parents=True)
    index_module.LARGE = 0 if large else NEVER
    began = time.perf_counter()
    write_index(root, CATEGORIES, splits, records)
    return time.perf_counter() - began


def memory_of(process: int | str, file: str = "smaps_rollup", what: str = "Pss") -> float:
    """MB of a process; of Pss a page that several share counts in parts, which add up to one."""
    lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) / 1e3


def touch(index: Index) -> None:
    """Reads all of an index, as a worker would in the course of an epoch."""
    for start in range(0, len(index), 1 << 10):
        part = slice(start, start + (1 << 10))
        for array in (index.keys, *index.members.values(), *([] if index.labels is None else [index.labels])):
            array[part].tobytes()


def worker(index: Index | None, pipe: Connection) -> None:
    if index is not None:
        touch(index)
    pipe.send(os.getpid())
    pipe.recv()


def rank(root: str, workers: int, pipe: Connection) -> None:
    """A rank with forked workers loads the index, if any, and begins an epoch; all stay until they are told to go."""
    index, said, before = None, [0.0, 0.0, 0.0], memory_of("self", "status", "VmRSS")
    if root:
        began = time.perf_counter()
        index = Index.load(root)
        said[0] = time.perf_counter() - began
        said[1] = memory_of("self", "status", "VmHWM") - before
        began = time.perf_counter()
        train = index.split("train")
        plan = Plan(train, index.shard_of[train], 0, BATCH)
        next(plan.micro_batches(share_of(0, 1, BATCH, 0), 0, plan.steps_per_epoch))
        said[2] = time.perf_counter() - began
        touch(index)
    context, pipes, processes = multiprocessing.get_context("fork"), [], [os.getpid()]
    for _ in range(workers):
        here, there = context.Pipe()
        context.Process(target=worker, args=(index, there)).start()
        processes.append(here.recv())
        pipes.append(here)
    pipe.send((said, processes))
    pipe.recv()
    for each in pipes:
        each.send(None)


def node(root: str, ranks: int, workers: int) -> tuple[list[float], float]:
    """What the first rank says of its loading, and the MB of all processes together."""
    context, pipes, said, processes = multiprocessing.get_context("spawn"), [], [], []
    for _ in range(ranks):
        here, there = context.Pipe()
        context.Process(target=rank, args=(root, workers, there)).start()
        there.close()  # where the process fails, recv does not wait for ever
        own, ids = here.recv()
        said.append(own)
        processes += ids
        pipes.append(here)
    total = sum(map(memory_of, processes))
    for each in pipes:
        each.send(None)
    for each in multiprocessing.active_children():
        each.join()
    return said[0], total


def index(folder: Path, samples: int) -> None:
    rows, crowds = [], ((1, 0), (2, 2))
    without = [node("", ranks, workers)[1] for ranks, workers in crowds]
    for large in (False, True):
        root = folder / f"index-{large}"
        spent = make_index(root, samples, large)
        size = sum(path.stat().st_size for path in root.iterdir()) / 1e6
        found = [node(str(root), ranks, workers) for ranks, workers in crowds]
        one, six = (total - own for (_, total), own in zip(found, without, strict=True))
        loaded, peak, epoch = found[0][0]
        name = json.loads((root / "index.json").read_text())["format"]
        rows.append((name, size, spent, loaded, peak, one, six - one, epoch))
        shutil.rmtree(root)
    print(f"{machine()}; {samples} samples of three members, {len(CATEGORIES)} classes, two splits\n")
    heads = "format", "MB on disk", "s to write", "s to load", "MB at the peak", "MB of the first rank"
    print(table((*heads, "MB of a second one and two workers each", "s to an epoch's first batch"), rows))


@cache
def tiny_photos() -> list[bytes]:
    rng = np.random.default_rng(0)
    shades = (rng.integers(0, 256, (64, 4, 4, 3), np.uint8) for _ in range(1))
    return [encode_jpeg(Image.fromarray(own).resize((TINY, TINY), Image.Resampling.BICUBIC)) for own in next(shades)]


def tiny(key: str, number: int) -> dict[str, bytes]:
    return pack(key, key, tiny_photos()[number % 64], [CATEGORIES[number % 80]], CATEGORIES)


def walk(folder: Path, samples: int) -> None:
    numbers = {f"n{number:07d}": number for number in range(samples)}
    out, began = folder / "tiny", time.perf_counter()
    writer.create(Source(CATEGORIES, {"train": list(numbers)}, Reads(tiny, numbers)), str(out))
    making, of_making = time.perf_counter() - began, memory_of("self", "status", "VmHWM")
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e9
    print(f"{machine()}; {samples} photos of {TINY} pixels, {size:.1f} GB; {cores()} processes made them\n")
    rows = [("create", samples, making, samples / making, of_making)]
    context = multiprocessing.get_context("spawn")
    for what, work in (("every photo in an epoch's order", read_all), ("training stream", train)):
        here, there = context.Pipe()
        context.Process(target=work, args=(str(out), there)).start()
        there.close()
        photos, first, spent, most = here.recv()
        rows.append((f"{what}: its start", 1, first, "", ""))
        rows.append((what, photos, spent, photos / spent, most))
    print(table(("what", "photos", "s", "photos/s", "MB at most of the main process"), rows))
    shutil.rmtree(out)


def planned(root: str) -> tuple[ShardReader, Plan]:
    found = Index.load(root)
    ordinals = found.split("train")
    return ShardReader(found), Plan(ordinals, found.shard_of[ordinals], 0, BATCH)


def read_all(root: str, pipe: Connection) -> None:
    """Reads and checks the bytes of all photos and labels, and counts that each comes once."""
    began = time.perf_counter()
    reader, plan = planned(root)
    seen, first = np.zeros(len(reader.index), np.int64), 0.0
    for _, ordinals in plan.micro_batches(share_of(0, 1, BATCH, 0), 0, plan.steps_per_epoch):
        for ordinal in ordinals.tolist():
            photo, labels = reader.image_and_labels(ordinal)
            number = int(str(reader.index.keys[ordinal])[1:])
            assert photo == tiny_photos()[number % 64]
            assert labels[number % 80] == labels.sum() == 1
            seen[number] += 1
        first = first or time.perf_counter() - began
    rest = len(seen) % BATCH  # of an epoch, which fills no batch
    assert (seen <= 1).all(), "a photo came twice"
    assert seen.sum() == len(seen) - rest, f"{len(seen) - rest - seen.sum()} photos did not come"
    spent = time.perf_counter() - began
    pipe.send((int(seen.sum()), first, spent, memory_of("self", "status", "VmHWM")))


def train(root: str, pipe: Connection) -> None:
    """The first batches of an epoch, decoded and cropped by a worker for each core."""
    from esol.data.stream import training_stream  # with torch, which ranks of `index` do without
    from esol.data.transforms import Crop

    began = time.perf_counter()
    reader, plan = planned(root)
    steps, first, crop = min(300, plan.steps_per_epoch), 0.0, Crop(TINY, (TINY, TINY))
    config, share = DataConfig(root=root, workers=cores()), share_of(0, 1, BATCH, 0)
    for _ in training_stream(reader, plan, share, 0, steps, crop, config, (124, 116, 104)):
        first = first or time.perf_counter() - began
    spent = time.perf_counter() - began
    pipe.send((steps * BATCH, first, spent, memory_of("self", "status", "VmHWM")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("create", "index", "walk"))
    parser.add_argument("--folder", type=Path, required=True, help="where to write to; not there, or empty")
    parser.add_argument("--photos", type=int, default=5000, help="of create (default: 5000)")
    parser.add_argument("--rounds", type=int, default=3, help="of create (default: 3)")
    parser.add_argument("--samples", type=int, default=1_200_000, help="of index and walk (default: 1200000)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.what == "create":
        create(args.folder, args.photos, args.rounds)
        shutil.rmtree(args.folder / "photos")
    else:
        {"index": index, "walk": walk}[args.what](args.folder, args.samples)


if __name__ == "__main__":
    main()
