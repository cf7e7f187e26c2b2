"""Who reads what, when: the global sample order as a pure function, without torch and without I/O.

The order depends on (seed, epoch, index, global batch) alone. An epoch is one permutation of the split: the shards in
seeded order, taken BLOCK at a time, the samples of a block shuffled together, so that reads stay near each other on
disks and caches while every batch mixes thousands of samples (sets of up to BLOCK shards are shuffled as a whole).
Global batch b of an epoch is the b-th slice of that permutation; each rank takes an equal, contiguous part of it, cut
into micro-batches. Hence the same global batches for every number of ranks, workers and micro-batches, each sample at
most once per epoch, and a start at any step without reading what is past. The remainder of an epoch that fills no
global batch (fewer than `global_batch` samples, others each epoch) is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

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
        shards = rng.permutation(np.unique(self.shard_of))
        blocks = []
        for start in range(0, len(shards), BLOCK):
            members = self.ordinals[np.isin(self.shard_of, shards[start : start + BLOCK])]
            blocks.append(rng.permutation(members))
        return np.concatenate(blocks)

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
            begin = (step % self.steps_per_epoch) * self.global_batch
            begin += (share.rank * share.per_step + part) * share.micro_batch
            yield epoch, order[begin : begin + share.micro_batch]


@dataclass(frozen=True)
class Share:
    """One rank's part of every global batch: `per_step` micro-batches of `micro_batch` images."""

    rank: int
    micro_batch: int
    per_step: int


def share_of(rank: int, world_size: int, global_batch: int, micro_batch: int) -> Share:
    """The rank's share; micro_batch 0 = all at once. ConfigError, naming sizes that work, where it does not divide."""
    if global_batch % world_size:
        near = max(1, round(global_batch / world_size)) * world_size
        raise ConfigError(
            f"global_batch = {global_batch} cannot be shared by {world_size} processes: "
            f"set global_batch to {near}, or start a number of processes that divides {global_batch}"
        )
    images = global_batch // world_size
    if micro_batch and images % micro_batch:
        fits = max(d for d in range(1, micro_batch + 1) if images % d == 0)
        raise ConfigError(
            f"engine.micro_batch = {micro_batch} does not divide the {images} images that each of {world_size} "
            f"processes takes of global_batch = {global_batch}: set engine.micro_batch to {fits}"
        )
    micro_batch = micro_batch or images
    return Share(rank, micro_batch, images // micro_batch)


def sample_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The generator of one sample's augmentation: the same wherever and by whomever the sample is read."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return np.random.default_rng([seed, epoch, int.from_bytes(digest, "little")])
