"""The global order: the same for every number of ranks, workers and micro-batches, exact, and resumable anywhere."""

import hashlib
from itertools import pairwise

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


def test_the_order_is_what_it_was_since_runs_go_on_with_it() -> None:
    orders = [plan_of(samples=5000).epoch_order(epoch).astype("<i8").tobytes() for epoch in (0, 1)]
    assert hashlib.sha256(b"".join(orders)).hexdigest() == (
        "2f40c08721ade49d74d58b8c619da4efaa1558a5b7fe11d1c8c735adad553373"  # by 3d33a13
    )


@pytest.mark.parametrize("micro_batch", [0, 1, 2, 3, 5, 200])
def test_shares_are_as_equal_as_whole_images_allow(micro_batch: int) -> None:
    rng = np.random.default_rng()
    for world in range(1, 20):
        images = int(rng.integers(world, 200)) if micro_batch != 1 else world * int(rng.integers(1, 9))
        shares = [share_of(rank, world, images, micro_batch) for rank in range(world)]
        case, most, sizes = (world, images), -(-images // world), [np.diff(share.edges) for share in shares]
        assert (shares[0].edges[0], shares[-1].edges[-1]) == (0, images), case
        assert all(one.edges[-1] == other.edges[0] for one, other in pairwise(shares)), case
        assert np.ptp([sum(each) for each in sizes]) <= 1, case
        assert all(np.ptp(each) <= 1 and each.min() > 0 for each in sizes), case
        assert {share.per_step for share in shares} == {-(-most // (micro_batch or most))}, case
        assert micro_batch == 0 or max(share.largest for share in shares) <= micro_batch, case
        weights = np.array([share.weights for share in shares])
        np.testing.assert_allclose(weights / weights.size * images, sizes, rtol=1e-12)  # an image counts 1 / images
        assert np.ptp(np.concatenate(sizes)) or (weights == 1).all(), case  # where all are equal, to the last bit


@pytest.mark.parametrize(("ranks", "micro_batch"), [(3, 0), (7, 2), (10, 0), (16, 2)])
def test_same_global_batches_where_ranks_and_micro_batches_do_not_divide_them(ranks: int, micro_batch: int) -> None:
    plan = plan_of(global_batch=25)
    steps = 2 * plan.steps_per_epoch
    assert global_batches(plan, ranks, 2, 7, steps, micro_batch) == global_batches(plan, 1, 1, 7, steps)


def test_sizes_that_cannot_be_shared_are_errors_that_name_some_that_can() -> None:
    with pytest.raises(
        ConfigError, match=r"global_batch = 3 .* 4 processes.*: set global_batch to 4 or more, or start"
    ):
        share_of(0, 4, 3, 0)
    message = r"engine.micro_batch = 1 cuts the 2 images .* others have only 1: set engine.micro_batch to 2, or "
    for rank in range(8):  # all say so, not only those that have too few
        with pytest.raises(ConfigError, match=message + "global_batch to 8"):
            share_of(rank, 8, 10, 1)
    with pytest.raises(DataError, match=r"10 samples, fewer than one global batch of 24"):
        plan_of(samples=10)
