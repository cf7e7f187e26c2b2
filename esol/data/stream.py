"""Training batches: a plan's samples through webdataset's pipeline in data workers, in the plan's order.

The plan replaces webdataset's own shard lists, splitting and shuffling, none of which keeps an order over different
numbers of workers or an exact epoch; its pipeline stages run on top unchanged.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

os.environ["WDS_SECURE"] = "1"  # no shell from a URL, no code from an archive; read when webdataset is imported

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from esol.base.errors import DataError, EsolError
from esol.config import DataConfig
from esol.data.features import FeatureStore
from esol.data.plan import Plan, Share, sample_rng
from esol.data.reader import ShardReader
from esol.data.samples import Batch
from esol.data.transforms import Crop, decode, training_crop

LOADER_MINUTES = 10  # a micro-batch that takes longer than this is an error, not a wait
PREFETCH = 2  # micro-batches that each data worker is ahead
STOP_SECONDS = 30  # that a data worker lives on after a signal to end

Sample = dict[str, Any]


@dataclass(eq=False)
class PlannedSamples(IterableDataset):
    """The source stage: the samples of the micro-batches that one data worker of one rank makes, in order."""

    reader: ShardReader
    plan: Plan
    share: Share
    start: int
    stop: int

    def __iter__(self) -> Iterator[list[Sample]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        self.reader.ahead(self._shards(worker, workers))
        for epoch, ordinals in self.plan.micro_batches(self.share, self.start, self.stop, worker, workers):
            keys = self.reader.index.keys[ordinals].tolist()
            yield [
                {"__key__": key, "epoch": epoch, "ordinal": ordinal}
                for key, ordinal in zip(keys, ordinals.tolist(), strict=True)
            ]

    def _shards(self, worker: int, workers: int) -> Iterator[int]:
        """The shards in the order in which they are read first."""
        seen: set[int] = set()
        every = len(np.unique(self.plan.shard_of))
        for _, ordinals in self.plan.micro_batches(self.share, self.start, self.stop, worker, workers):
            new = [s for s in dict.fromkeys(self.reader.index.shard_of[ordinals].tolist()) if s not in seen]
            seen.update(new)
            yield from new
            if len(seen) == every:
                return


@dataclass(frozen=True, eq=False)
class Examples:
    """The map stage: from the planned samples of a micro-batch to their crops, labels and targets, collated.

    skip: a damaged sample's place is taken by the first good one of an order that its key and the epoch draw, so that
    who stands in depends on the photos alone, not on ranks, workers or micro-batches, and a damaged shard does not make
    one photo count for all of it. DataError where none is good. kept: the numbers of crops whose features are at hand,
    in rising order; a micro-batch of which all are has no images, and no photo of it is read.
    """

    reader: ShardReader
    plan: Plan
    crop: Crop
    fill: tuple[int, ...]
    target: Callable[[int], NDArray[np.uint8]] | None
    skip: bool
    collate: Callable[[list[Sample]], Sample]
    kept: NDArray[np.int64]

    def __call__(self, samples: list[Sample]) -> Sample:
        """What `collate` makes of the samples' examples, with "crop", their numbers."""
        index = self.reader.index
        crops = np.array([sample["epoch"] * len(index) + sample["ordinal"] for sample in samples], np.int64)
        if not np.isin(crops, self.kept, assume_unique=True).all():
            return {**self.collate([self._example(sample) for sample in samples]), "crop": crops}
        labels = np.stack([self.reader.labels(sample["ordinal"]) for sample in samples])
        return {"labels": labels, "key": [sample["__key__"] for sample in samples], "skipped": [], "crop": crops}

    def _example(self, sample: Sample) -> Sample:
        """{"image", "labels", "key"}, with "damaged", the reason, where another sample stands in."""
        reason = ""
        for ordinal in self._candidates(sample):
            try:
                image, labels, target = self._read(ordinal)
            except DataError as error:
                if not self.skip:
                    raise
                reason = reason or str(error)
                continue
            rng = sample_rng(self.plan.seed, sample["epoch"], sample["__key__"])
            found = {
                "image": training_crop(image, rng, self.crop, self.fill, target),
                "labels": torch.from_numpy(labels),
                "key": str(self.reader.index.keys[ordinal]),
            }
            return found | ({"damaged": reason} if reason else {})
        raise DataError(f"every sample of the split is damaged, the first: {reason}")

    def _candidates(self, sample: Sample) -> Iterator[int]:
        yield sample["ordinal"]
        if self.skip:
            order = sample_rng(self.plan.seed, sample["epoch"], f"stands in for {sample['__key__']}")
            yield from map(int, order.permutation(self.plan.ordinals))

    def _read(self, ordinal: int) -> tuple[torch.Tensor, NDArray[np.float32], torch.Tensor | None]:
        reader = self.reader
        photo, labels = reader.image_and_labels(ordinal)
        image = decode(photo, reader.name(ordinal))
        if self.target is None:
            return image, labels, None
        target = torch.from_numpy(self.target(ordinal))
        if target.shape != image.shape[1:]:
            sizes = f"{tuple(target.shape)}, the photo {tuple(image.shape[1:])} (height, width)"
            raise DataError(f"{reader.name(ordinal)}: the label map is {sizes}")
        return image, labels, target


def training_stream(
    reader: ShardReader,
    plan: Plan,
    share: Share,
    start: int,
    stop: int,
    crop: Crop,
    config: DataConfig,
    fill: tuple[int, int, int],
    target: Callable[[int], NDArray[np.uint8]] | None = None,
    features: FeatureStore | None = None,
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of steps start..stop-1, a list per step.

    fill: RGB 0..255 around photos smaller than the crop; target: the label map (H, W) of a sample by its ordinal, which
    is cropped with its photo to batch["target"]; features: where those of crops are kept, which stand in place of
    images in micro-batches of which all are known there. DataError, naming shard and key, for a damaged sample, or,
    with data.damaged = skip, the next good sample of the split stands in and batch["skipped"] says what was wrong. All
    that goes to the data workers can be pickled, so that they start by fork, forkserver and spawn alike.
    """
    workers = config.workers
    ring = _Ring(workers, (share.largest, 3 if target is None else 4, crop.size, crop.size)) if workers else None
    skip = config.damaged == "skip"
    kept = features.known if features else np.zeros(0, np.int64)
    examples = Examples(reader, plan, crop, tuple(fill), target, skip, ring.collate if ring else collate, kept)
    pipeline = wds.DataPipeline(PlannedSamples(reader, plan, share, start, stop), wds.map(examples))
    if workers:
        import torchvision.io  # noqa: F401  # forked with them, where each would else spend seconds on it
    # a Ctrl-C while workers still import is the main process's affair: they unblock it when they ignore it
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT} if workers else set())
    loader = iter(
        DataLoader(
            pipeline,
            batch_size=None,
            collate_fn=_as_is,
            num_workers=workers,
            timeout=LOADER_MINUTES * 60 if workers else 0,
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=_set_up_worker if workers else None,
        )
    )
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        number, step = start, list[Batch]()
        for batch in _clear_errors(loader):
            batch["labels"] = torch.as_tensor(batch["labels"])
            if "image" in batch:
                batch = _part(ring.take(batch) if ring else batch)
            elif features is not None:
                batch["features"] = features.get(batch["crop"])
            batch["weight"], batch["done"] = share.weights[len(step)], torch.tensor(number / stop)
            step.append(batch)
            if len(step) == share.per_step:
                yield step
                number, step = number + 1, []
    finally:
        if workers:  # now, not when the last reference goes: a traceback may hold one until the process ends
            loader._shutdown_workers()  # type: ignore[attr-defined]


def collate(examples: list[Sample], out: torch.Tensor | None = None) -> Sample:
    """Stacks examples, images into `out`."""
    return {
        "image": torch.stack([e["image"] for e in examples], out=out),
        "labels": torch.stack([e["labels"] for e in examples]),
        "key": [e["key"] for e in examples],
        "skipped": [e["damaged"] for e in examples if "damaged" in e],
    }


def _part(batch: Batch) -> Batch:
    """Label maps travel as the fourth channel of their photos."""
    if batch["image"].shape[1] == 4:
        batch["target"] = batch["image"][:, 3]
        batch["image"] = batch["image"][:, :3]
    return batch


def _as_is(batch: Any) -> Any:
    """In place of torch's conversion, which would make tensors of what a worker sends by value."""
    return batch


class _Ring:
    """Shared memory that workers hand images over in, used again and again.

    torch's own way makes, fills and unmaps a new segment for every batch, a sixth of a worker's time. A worker has at
    most PREFETCH micro-batches under way beside the one that is being taken, so that PREFETCH + 2 places need no lock.
    A place has room for the largest micro-batch; smaller ones leave its end as it is.
    """

    def __init__(self, workers: int, shape: tuple[int, ...]) -> None:
        self._places = torch.empty((workers, PREFETCH + 2, *shape), dtype=torch.uint8).share_memory_()
        self._count = 0

    def collate(self, examples: list[Sample]) -> Sample:
        """In the worker: images go to the next place; small arrays travel by value."""
        worker = get_worker_info()
        assert worker is not None
        place = (worker.id, self._count % (PREFETCH + 2), slice(len(examples)))
        self._count += 1
        batch = collate(examples, out=self._places[place])
        return {**batch, "image": place, "labels": batch["labels"].numpy()}

    def take(self, batch: Sample) -> Batch:
        """In the main process: copies the images out, which frees their place."""
        place = self._places[batch["image"]]
        image = torch.empty(place.shape, dtype=place.dtype, pin_memory=torch.cuda.is_available()).copy_(place)
        return Batch(**{**batch, "image": image})  # type: ignore[typeddict-item]


def _set_up_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Schedulers and terminals signal the whole group: the main process decides, and needs workers to finish the step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _end_later)


def _end_later(number: int, frame: FrameType | None) -> None:
    """Gives the main process STOP_SECONDS to be done with this worker; a later signal does not prolong it."""
    if left := signal.alarm(STOP_SECONDS):
        signal.alarm(left)


def _clear_errors(loader: Any) -> Iterator[Any]:
    """torch re-raises a worker's error with its traceback inside the message: give back the message alone."""
    try:
        yield from loader
    except EsolError as error:
        cause = str(error)
        marker = f"{type(error).__module__}.{type(error).__name__}: "
        if "Original Traceback" in cause and marker in cause:
            raise type(error)(cause.rsplit(marker, 1)[1].strip()) from None
        raise
    except RuntimeError as error:
        if "DataLoader" in str(error):
            raise DataError(f"a data worker died or stalled: {error}") from error
        raise
