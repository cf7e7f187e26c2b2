"""Who reads what, when: the global sample order as a pure function, without torch and without I/O.

The order depends on (seed, epoch, index, global batch) alone. An epoch is one permutation of the split: the shards in
seeded order, taken BLOCK at a time, the samples of a block shuffled together, so that reads stay near each other on
disks and caches while every batch mixes thousands of samples (sets of up to BLOCK shards are shuffled as a whole).
Global batch b of an epoch is the b-th slice of that permutation; each rank takes a contiguous part of it, one image
larger on some than on others where it does not divide, cut into micro-batches. Hence the same global batches for every
number of ranks, workers and micro-batches, each sample at most once per epoch, and a start at any step without reading
what is past. The remainder of an epoch that fills no global batch (fewer than `global_batch` samples, others each
epoch) is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from esol.base.errors import ConfigError, DataError

BLOCK = 16  # shards whose samples are shuffled together: 2,048 samples at the default shard size


@dataclass(frozen=True, eq=False)
class Plan:
    """The global order of a split.

    ordinals: the split's samples (int64); shard_of: their shards; seed: of the run; global_batch: images per step.
    DataError where the split cannot fill one global batch.
    """

    ordinals: NDArray[np.int64]
    shard_of: NDArray[np.int32]
    seed: int
    global_batch: int

    def __post_init__(self) -> None:
        if len(self.ordinals) < self.global_batch:
            raise DataError(
                f"the training split has {len(self.ordinals)} samples, fewer than one global batch of "
                f"{self.global_batch}: lower global_batch"
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.ordinals) // self.global_batch

    def epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """The permutation of the split in this epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        shards, place = np.unique(self.shard_of, return_inverse=True)
        block_of = np.empty(len(shards), np.int64)
        block_of[rng.permutation(len(shards))] = np.arange(len(shards)) // BLOCK
        blocks = block_of[place]
        order = self.ordinals[np.argsort(blocks, kind="stable")]
        for block in np.split(order, np.cumsum(np.bincount(blocks))[:-1]):
            rng.shuffle(block)
        return order

    def micro_batches(
        self, share: Share, start: int, stop: int, worker: int = 0, workers: int = 1
    ) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """(epoch, ordinals) of the micro-batches that one data worker of one rank reads for steps start..stop-1.

        Worker w of n yields the rank's micro-batches w, w + n, w + 2n, ...: taken in turn, they are in order.
        """
        epoch, order = -1, self.ordinals
        for number in range(worker, (stop - start) * share.per_step, workers):
            step, part = divmod(number, share.per_step)
            step += start
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self.epoch_order(epoch)
            first = (step % self.steps_per_epoch) * self.global_batch
            yield epoch, order[first + share.edges[part] : first + share.edges[part + 1]]


@dataclass(frozen=True)
class Share:
    """One rank's part of every global batch: the batch's images edges[i]..edges[i + 1] - 1 are its micro-batch i.

    weights: how much the loss of each counts in the plain mean over the micro-batches of all ranks, which then is the
    mean over the images of the global batch. Exactly 1 where all micro-batches have as many images.
    """

    edges: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def per_step(self) -> int:
        """Micro-batches of a step, the same on every rank."""
        return len(self.weights)

    @property
    def largest(self) -> int:
        """Images of the rank's largest micro-batch."""
        return max(end - begin for begin, end in pairwise(self.edges))


def share_of(rank: int, world_size: int, global_batch: int, micro_batch: int) -> Share:
    """The rank's share: ranks differ by one image at most, and so do the micro-batches of a rank.

    micro_batch: the most images of one, 0 = the whole share at once. ConfigError, naming sizes that work, where a rank
    would have no image, or fewer images than another one has micro-batches.
    """
    least, rest = divmod(global_batch, world_size)
    if not least:
        raise ConfigError(
            f"global_batch = {global_batch} is too small for {world_size} processes, each of which needs an image: "
            f"set global_batch to {world_size} or more, or start at most {global_batch} processes"
        )
    most = least + (rest > 0)
    per_step = -(-most // (micro_batch or most))
    if per_step > least:  # only by micro-batches of one image
        raise ConfigError(
            f"engine.micro_batch = {micro_batch} cuts the {most} images that some of {world_size} processes take of "
            f"global_batch = {global_batch} into {per_step} parts, and others have only {least}: set "
            f"engine.micro_batch to 2, or global_batch to {round(global_batch / world_size) * world_size}"
        )
    begin, images = rank * least + min(rank, rest), least + (rank < rest)
    edges = tuple(begin + part * (images // per_step) + min(part, images % per_step) for part in range(per_step + 1))
    weights = tuple(world_size * per_step * (end - start) / global_batch for start, end in pairwise(edges))
    return Share(edges, weights)


def sample_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The generator of one sample's augmentation: the same wherever and by whomever the sample is read."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return np.random.default_rng([seed, epoch, int.from_bytes(digest, "little")])
