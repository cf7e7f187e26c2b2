"""The global order: the same for every number of ranks, workers and micro-batches, exact, and resumable anywhere."""

import numpy as np
import pytest

from esol.base.errors import ConfigError, DataError
from esol.data.plan import Plan, share_of

LAYOUTS = [(ranks, workers) for ranks in (1, 2, 3, 4) for workers in (1, 2)]  # 0 workers read like 1


def plan_of(samples: int = 1000, global_batch: int = 24, seed: int = 3) -> Plan:
    """Samples of a split that is a part of its shards, 40 to a shard."""
    ordinals = np.flatnonzero(np.arange(2 * samples) % 3 != 1)[:samples]
    return Plan(ordinals, (ordinals // 40).astype(np.int32), seed, global_batch)


def global_batches(
    plan: Plan, ranks: int, workers: int, start: int, stop: int, micro_batch: int = 0
) -> list[list[int]]:
    """What all ranks together read at each step, put together from what each data worker of each rank yields."""
    batches: list[list[int]] = [[] for _ in range(start, stop)]
    for rank in range(ranks):
        share = share_of(rank, ranks, plan.global_batch, micro_batch)
        streams = [plan.micro_batches(share, start, stop, w, workers) for w in range(workers)]
        for number in range((stop - start) * share.per_step):
            _, ordinals = next(streams[number % workers])
            batches[number // share.per_step].extend(ordinals.tolist())
        assert all(next(stream, None) is None for stream in streams)
    return batches


@pytest.mark.parametrize(("ranks", "workers"), LAYOUTS)
def test_same_global_batches_for_every_layout(ranks: int, workers: int) -> None:
    plan = plan_of()
    steps = 3 * plan.steps_per_epoch
    reference = global_batches(plan, 1, 1, 0, steps)
    assert global_batches(plan, ranks, workers, 0, steps) == reference
    assert global_batches(plan, ranks, workers, 0, steps, micro_batch=2) == reference
    start = int(np.random.default_rng(ranks * 10 + workers).integers(1, steps))
    assert global_batches(plan, ranks, workers, start, steps) == reference[start:]


def test_each_sample_once_per_epoch_up_to_the_remainder() -> None:
    plan = plan_of()
    left_out = set()
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = [o for batch in global_batches(plan, 1, 1, steps.start, steps.stop) for o in batch]
        assert len(seen) == len(set(seen)) == 1000 - 1000 % 24
        assert set(seen) <= set(plan.ordinals.tolist())
        left_out |= set(plan.ordinals.tolist()) - set(seen)
    assert len(left_out) > 1000 % 24  # another remainder each epoch


def test_epochs_and_seeds_give_other_orders_and_shards_stay_together() -> None:
    plan = plan_of(samples=4000)
    assert not np.array_equal(plan.epoch_order(0), plan.epoch_order(1))
    assert not np.array_equal(plan.epoch_order(0), plan_of(samples=4000, seed=4).epoch_order(0))
    assert np.array_equal(np.sort(plan.epoch_order(5)), plan.ordinals)
    first = plan.epoch_order(0)[:400] // 40
    assert len(np.unique(first)) == 16  # one block of shards, all of it mixed


def test_sizes_that_do_not_divide_are_errors_that_name_one_that_does() -> None:
    with pytest.raises(ConfigError, match=r"global_batch = 16 .* 3 processes: set global_batch to 15"):
        share_of(0, 3, 16, 0)
    with pytest.raises(ConfigError, match=r"engine.micro_batch = 3 .* set engine.micro_batch to 2"):
        share_of(0, 2, 16, 3)
    with pytest.raises(DataError, match=r"10 samples, fewer than one global batch of 24"):
        plan_of(samples=10)
