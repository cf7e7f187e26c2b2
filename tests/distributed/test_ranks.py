"""Two real processes over gloo: agreement, equal numbers, and no rank ever left waiting."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import toy
from ranks import run_ranks

from esol.base import exits


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"step-{step}" / "state.pt", weights_only=True)["model"]


def assert_identical(folder: Path, other: Path, step: int) -> None:
    """Model, optimizer and scaler state, bit for bit."""
    a, b = ((f / f"step-{step}" / "state.pt").read_bytes() for f in (folder, other))
    assert a == b


def test_collectives() -> None:
    for rank, outcome in enumerate(run_ranks(2, toy.collectives)):
        assert outcome.result == {
            "world": (rank, 2, rank == 0),
            "sum": [1.0, 12.0],
            "mean": [0.5, 6.0],
            "max": [1.0, 7.0],
            "gather": [[0, 5], [1, 7]],
            "text": ["", "é from rank 1"],
            "any": (True, False),
            "kind": None,
        }, outcome.output


@pytest.mark.parametrize("micro", [1, 2])
def test_two_ranks_train_like_one(tmp_path: Path, micro: int) -> None:
    for count in (1, 2):
        for outcome in run_ranks(count, toy.run, tmp_path / str(count), 20, 20, 0.0, micro):
            assert outcome.exitcode == 0, outcome.output
    one, two = (weights(tmp_path / str(count), 20) for count in (1, 2))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


def test_ranks_of_uneven_shares_train_and_log_like_one(tmp_path: Path) -> None:
    """10 images on 3 ranks: micro-batches of 2 and 2, 2 and 1, 2 and 1."""
    logged = {}
    for count, micro in ((1, 1), (3, 2)):
        outcomes = run_ranks(count, toy.run, tmp_path / str(count), 8, 8, 0.0, micro, print, 10)
        assert all(outcome.exitcode == 0 for outcome in outcomes), outcomes
        logged[count] = outcomes[0].result
    one, three = (weights(tmp_path / str(count), 8) for count in (1, 3))
    for name in one:
        torch.testing.assert_close(three[name], one[name], rtol=0, atol=1e-6)
    assert list(logged[1]) == [5, 8]
    for step, values in logged[1].items():
        for name in ("loss", "mean_label", "grad_norm"):
            assert logged[3][step][name] == pytest.approx(values[name], rel=0, abs=1e-6)
        for found in (values, logged[3][step]):
            assert found["images_per_second"] * found["step_seconds"] == pytest.approx(10)


def test_accumulation_equals_the_big_batch(tmp_path: Path) -> None:
    for micro in (1, 4):
        (outcome,) = run_ranks(1, toy.run, tmp_path / str(micro), 20, 20, 0.0, micro)
        assert outcome.exitcode == 0, outcome.output
    one, four = (weights(tmp_path / str(micro), 20) for micro in (1, 4))
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=0, atol=1e-5)


def test_loss_not_finite_on_one_rank_stops_both_before_the_step() -> None:
    for outcome in run_ranks(2, toy.diverge):
        message, unchanged = outcome.result
        assert unchanged
        assert "rank 1: loss nan for samples step3-image6, step3-image7" in message
        assert "image5" not in message  # the healthy micro-batch


def test_a_main_rank_that_cannot_write_fails_the_checkpoint_on_all(tmp_path: Path) -> None:
    for outcome in run_ranks(2, toy.fill_disk, tmp_path):
        message, left = outcome.result
        assert "rank 0: cannot write" in message
        assert "File too large" in message
        assert "the last good checkpoint is step-2" in message
        assert left == ["latest", "step-2"]
    for outcome in run_ranks(2, toy.run, tmp_path, 6, 6):
        assert outcome.exitcode == 0, outcome.output


def test_sigterm_to_one_rank_saves_on_all_and_resume_is_bit_identical(tmp_path: Path) -> None:
    for outcome in run_ranks(2, toy.run, tmp_path / "unbroken", 12, 12, 0.3):
        assert outcome.exitcode == 0, outcome.output
    for outcome in run_ranks(2, toy.run, tmp_path / "broken", 12, 12, 0.3, 1, toy.sigterm_rank_1_twice):
        assert outcome.exitcode == exits.STOPPED, outcome.output
        assert "stopped after step 6 of 12" in outcome.output
    for outcome in run_ranks(2, toy.run, tmp_path / "broken", 12, 12, 0.3):
        assert outcome.exitcode == 0, outcome.output
    assert_identical(tmp_path / "unbroken", tmp_path / "broken", 12)


def test_a_killed_rank_ends_the_others() -> None:
    other, killed = run_ranks(2, toy.die_in_step_3)
    assert killed.exitcode == -9
    assert "rank 0 lost its peers while waiting for gradients" in other.result


def test_a_silent_rank_ends_the_wait_with_what_was_waited_for() -> None:
    waiting, silent = run_ranks(2, toy.never_come)
    assert "waiting for the class maps of rank 1" in waiting.result
    assert silent.exitcode == -9, silent.output


def test_processes_that_do_not_form_a_job() -> None:
    (alone,) = run_ranks(1, toy.launch_error, env={"WORLD_SIZE": "2"})
    assert "WORLD_SIZE=2" in alone.result
    assert "MASTER_ADDR=(not set)" in alone.result
    (unaware,) = run_ranks(1, toy.launch_error_of_a_group_of_one, env={"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    assert "WORLD_SIZE=2, but the engine sees 1 process" in unaware.result


def test_killed_at_ten_random_moments_ends_with_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first, total, every = random.randrange(10**6), 260, 3
    for outcome in run_ranks(2, toy.run, tmp_path / "unbroken", total, total, 0.3):
        assert outcome.exitcode == 0, outcome.output
    reached = []
    for seed in range(first, first + 10):
        outcomes = run_ranks(2, toy.run_and_be_killed, tmp_path / "killed", total, every, seed)
        assert any(outcome.exitcode == -9 for outcome in outcomes), (seed, outcomes)
        reached.append(max((int(path.name[5:]) for path in (tmp_path / "killed").glob("step-*[0-9]")), default=0))
    with capsys.disabled():
        print(f"\nkills with seeds {first}..{first + 9}, saved steps then: {reached} of {total}")
    for outcome in run_ranks(2, toy.run, tmp_path / "killed", total, every, 0.3):
        assert outcome.exitcode == 0, outcome.output
    assert_identical(tmp_path / "unbroken", tmp_path / "killed", total)


def test_a_run_directory_that_rank_0_cannot_use_is_no_lost_rank(tmp_path: Path, shard_set: Path) -> None:
    """A disk that is full, or read-only, shows when rank 0 takes the lock: here a folder stands in its place."""
    (tmp_path / "run/.lock").mkdir(parents=True)
    tree = {
        "run_dir": str(tmp_path / "run"), "stages": ["classify"], "data": {"root": str(shard_set), "crop": 48},
        "model": {"backbone": "small", "weights": "none", "output_stride": 8, "freeze": "none"},
        "classify": {"global_batch": 8}, "engine": {"threads": 1, "timeout": 1}, "tracking": {"uri": "none"},
    }  # fmt: skip
    for outcome in run_ranks(2, toy.begin, tree):
        assert outcome.result == exits.MEND, outcome.output
        assert f"error: {tmp_path / 'run/.lock'}: Is a directory; when that is mended" in outcome.output
