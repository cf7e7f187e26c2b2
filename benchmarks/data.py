"""Images/s of the training stream against bare decoding, and of the two data plans against each other.

    python -m benchmarks.data --data data/voc-animals

bare    torchvision decode and training_crop in a loop in one process, photos' bytes already in memory
stream  the training stream with one worker process: index, ranged reads, checks, webdataset pipeline, hand-over
slots   the other design considered: whole shards read in sequence by webdataset, shuffled inside a shard, one worker;
        a prototype for this comparison, kept here only
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["WDS_SECURE"] = "1"

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from webdataset.tariterators import group_by_keys, tar_file_expander

from benchmarks.common import CLASSES, interleaved, machine, ratio, table
from benchmarks.rows import Comparison, Photos
from esol.config import DataConfig
from esol.data.index import Index
from esol.data.plan import Plan, sample_rng, share_of
from esol.data.reader import ShardReader
from esol.data.stream import collate, training_stream
from esol.data.transforms import Crop, decode, training_crop

FILL = (124, 116, 104)
BATCH = 16


def bare(reader: ShardReader, ordinals: Any, crop: Crop) -> Callable[[], float]:
    photos = [(str(reader.index.keys[o]), reader.image(o)) for o in ordinals]

    def run() -> float:
        begun = time.perf_counter()
        for key, data in photos:
            training_crop(decode(data, key), sample_rng(0, 0, key), crop, FILL)
        return len(photos) / (time.perf_counter() - begun)

    return run


def rate(batches: Iterator[Any], count: int) -> float:
    """Images/s from the first batch on: starting a worker is paid once per run, not per image."""
    next(batches)
    begun = time.perf_counter()
    for _ in range(count - 1):
        next(batches)
    return (count - 1) * BATCH / (time.perf_counter() - begun)


def slots(index: Index, crop: Crop) -> Iterator[Any]:
    """One slot stream: shards in seeded order, each read in sequence, its samples shuffled in memory."""

    def shuffled(samples: Iterator[Any]) -> Iterator[Any]:
        held, rng = [], np.random.default_rng(0)
        for sample in samples:
            if held and sample["__url__"] != held[-1]["__url__"]:
                yield from (held[i] for i in rng.permutation(len(held)))
                held = []
            held.append(sample)
        yield from (held[i] for i in rng.permutation(len(held)))

    def example(sample: dict[str, Any]) -> dict[str, Any]:
        key = sample["__key__"]
        image = training_crop(decode(sample["jpg"], key), sample_rng(0, 0, key), crop, FILL)
        return {"image": image, "labels": torch.zeros(len(index.classes))}

    def opened() -> Iterator[dict[str, Any]]:  # webdataset's secure setting opens no paths itself
        for url in urls:
            with open(url, "rb") as stream:
                yield {"url": url, "stream": stream}

    urls = [f"{index.root}/{index.shards[i].name}" for i in np.random.default_rng(0).permutation(len(index.shards))]
    pipeline = wds.DataPipeline(
        opened,
        tar_file_expander,
        group_by_keys,
        shuffled,
        wds.map(example),
        wds.batched(BATCH, collation_fn=collate),
    )
    return iter(wds.WebLoader(pipeline, batch_size=None, num_workers=1, worker_init_fn=_alone))


class Folder(Dataset[dict[str, Any]]):
    """A folder of JPEGs as IRN's code and most others read one: PIL decodes and scales the whole photo, then a crop.

    Scaled to a long side that is drawn uniformly, mirrored or not, cropped at a random place, or on the fill colour.
    """

    def __init__(self, paths: list[Path], crop: Crop) -> None:
        self.paths, self.crop = paths, crop

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> dict[str, Any]:
        size = self.crop.size
        assert self.crop.long_side is not None
        with Image.open(self.paths[number]) as file:
            photo = file.convert("RGB")
        factor = random.randint(*self.crop.long_side) / max(photo.size)
        width, height = (round(n * factor) for n in photo.size)
        photo = photo.resize((width, height), Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        canvas = np.empty((size, size, 3), np.uint8)
        canvas[:] = FILL
        shown, place, start = [], [], []
        for side in (height, width):
            shown.append(min(side, size))
            place.append(random.randint(0, size - shown[-1]))
            start.append(random.randint(0, side - shown[-1]))
        part = np.asarray(photo)[start[0] : start[0] + shown[0], start[1] : start[1] + shown[1]]
        canvas[place[0] : place[0] + shown[0], place[1] : place[1] + shown[1]] = part
        image = torch.from_numpy(canvas.transpose(2, 0, 1).copy())
        return {"image": image, "labels": torch.zeros(CLASSES)}


def compared(photos: Photos) -> Iterator[Comparison]:
    """The row `reading` of python -m benchmarks: training crops of the same photos, by one worker process each.

    A call takes 30 batches of a stream that goes on: a worker starts once, and is up to two batches ahead.
    """
    batch, steps = min(BATCH, photos.count), 30
    reader, ordinals = photos.reader, np.sort(photos.ordinals)
    crop, config = Crop(224, (224, 320)), DataConfig(root=str(reader.index.root), workers=1)
    plan = Plan(ordinals, reader.index.shard_of[ordinals], 0, batch)
    ours = training_stream(reader, plan, share_of(0, 1, batch, 0), 0, 10**6, crop, config, FILL)
    folder = Folder(photos.paths, crop)
    drawn = RandomSampler(folder, replacement=True, num_samples=10**6)
    theirs = iter(DataLoader(folder, batch, sampler=drawn, num_workers=1, worker_init_fn=_alone))

    def take(stream: Iterator[Any]) -> None:
        for _ in range(steps):
            next(stream)

    name = f"crops of {crop.size}, a photo of {photos.side} pixels"
    yield Comparison(name, lambda: take(theirs), {"": lambda: take(ours)}, units=batch * steps)


def _alone(worker: int) -> None:
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="shard set with a split to read")
    parser.add_argument("--split", default="train_aug")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long-side", type=int, nargs=2, default=(224, 320))
    parser.add_argument("--crop", type=int, default=224)
    args = parser.parse_args()
    torch.set_num_threads(1)
    index = Index.load(args.data)
    reader = ShardReader(index)
    config, crop = DataConfig(root=args.data, workers=1), Crop(args.crop, tuple(args.long_side))
    ordinals = index.split(args.split)
    plan = Plan(ordinals, index.shard_of[ordinals], 0, BATCH)
    steps = args.images // BATCH
    share = share_of(0, 1, BATCH, 0)
    found = interleaved(
        {
            "bare": bare(reader, plan.epoch_order(0)[: args.images], crop),
            "stream": lambda: rate(
                (b[0] for b in training_stream(reader, plan, share, 0, steps, crop, config, FILL)), steps
            ),
            "slots": lambda: rate(slots(index, crop), steps),
        },
        args.rounds,
    )
    print(f"{machine()}; {args.images} photos, crop {args.crop}, {args.rounds} rounds in turn, medians\n")
    rows = [(name, statistics.median(found[name]), ratio(found, name, "bare")) for name in found]
    print(table(("what", "images/s", "of bare"), rows))


if __name__ == "__main__":
    main()
