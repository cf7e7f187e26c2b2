"""A job that changes its size and its engine on the way: the samples go on in order, as if nothing had happened."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import toy
from ranks import run_ranks


def legs(root: Path, folder: Path, *plan: tuple[int, str, int, int], images: int = 8) -> list[tuple[str, float]]:
    """Runs (ranks, engine, zero, until step) one after the other; what rank 0 saw of all of them."""
    trace = []
    for count, name, zero, until in plan:
        outcomes = run_ranks(count, toy.elastic, root, folder, name, zero, until, images, bound=120)
        assert all(outcome.exitcode == 0 for outcome in outcomes), outcomes
        assert all(outcome.result == outcomes[0].result for outcome in outcomes[1:])
        trace += outcomes[0].result
    return trace


def test_4_ranks_to_2_to_1_and_back(tmp_path: Path, shard_set: Path) -> None:
    """48 samples, 6 steps an epoch: three epochs, changed within each."""
    plan = [(4, "accelerate", 0, 4), (2, "deepspeed", 2, 9), (1, "accelerate", 0, 13), (4, "deepspeed", 1, 18)]
    whole = legs(shard_set, tmp_path / "whole", (1, "accelerate", 0, 18))
    found = legs(shard_set, tmp_path / "moved", *plan)
    assert [keys for keys, _ in found] == [keys for keys, _ in whole]
    for begin, end in pairwise((0, 6, 12, 18)):
        assert len({key for keys, _ in found[begin:end] for key in keys.split()}) == 48
    assert_like(tmp_path, found, whole)


def test_3_ranks_to_2_that_share_7_images_unevenly(tmp_path: Path, shard_set: Path) -> None:
    """6 steps an epoch: two epochs, changed within the first."""
    whole = legs(shard_set, tmp_path / "whole", (1, "accelerate", 0, 12), images=7)
    found = legs(shard_set, tmp_path / "moved", (3, "deepspeed", 1, 4), (2, "accelerate", 0, 12), images=7)
    assert len(whole[0][0].split()) == 7
    assert [keys for keys, _ in found] == [keys for keys, _ in whole]
    assert_like(tmp_path, found, whole)


def assert_like(folder: Path, found: list[tuple[str, float]], whole: list[tuple[str, float]]) -> None:
    """Losses, and the weights that are saved last, to 1e-6."""
    np.testing.assert_allclose([loss for _, loss in found], [loss for _, loss in whole], rtol=0, atol=1e-6)
    last = f"step-{len(whole)}/state.pt"
    a, b = (torch.load(folder / f / last, weights_only=True)["model"] for f in ("whole", "moved"))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=1e-6)
