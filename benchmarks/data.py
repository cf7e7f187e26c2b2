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
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ["WDS_SECURE"] = "1"

import numpy as np
import torch
import webdataset as wds
from webdataset.tariterators import group_by_keys, tar_file_expander

from benchmarks.common import interleaved, machine, ratio, table
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
    return iter(
        wds.WebLoader(pipeline, batch_size=None, num_workers=1, worker_init_fn=lambda _: torch.set_num_threads(1))
    )


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
