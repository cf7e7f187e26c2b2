"""A rank that stands still is named, every rank's stacks are written, and the job ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy
from ranks import run_ranks

from esol.base import exits


@pytest.mark.parametrize(
    ("how", "verdict"),
    [
        ("data", "rank 1 has stood for 3 s at: the data of step 3; rank 0 at: gradients of the other ranks"),
        (
            "other collective",
            "all ranks have waited for 3 s: rank 0 for gradients of the other ranks; rank 1 for values",
        ),
    ],
)
def test_the_stalled_rank_is_named_and_all_leave(tmp_path: Path, how: str, verdict: str) -> None:
    outcomes = run_ranks(2, toy.stall, tmp_path, how, bound=40)
    assert [outcome.exitcode for outcome in outcomes] == [exits.LOST] * 2, [o.output for o in outcomes]
    for rank, outcome in enumerate(outcomes):
        assert f"error: stalled: {verdict}" in outcome.output
        stacks = (tmp_path / f"rank-{rank}.txt").read_text()
        assert stacks.startswith(verdict)
        assert "toy.py" in stacks  # where the main thread stands
        assert " in stall" in stacks


def test_a_data_worker_that_stands_is_shown_too(tmp_path: Path) -> None:
    outcomes = run_ranks(2, toy.stall, tmp_path, "worker", bound=40)
    assert " in stands" in outcomes[1].output


def test_a_process_that_does_not_answer_is_named_by_the_others(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ranks \[1\] ran longer") as error:  # stopped, it cannot leave
        run_ranks(2, toy.stall, tmp_path, "frozen", bound=20)
    text = str(error.value)
    assert f"--- rank 0: {exits.LOST}" in text
    assert "error: stalled: rank 1 has stood for 3 s, and its process does not answer, at: the data of step 3" in text


def test_slow_ranks_are_left_alone(tmp_path: Path) -> None:
    for outcome in run_ranks(2, toy.stall, tmp_path, "slow", bound=40):
        assert outcome.exitcode == 0, outcome.output
        assert "stalled" not in outcome.output
    assert not list(tmp_path.iterdir())


def test_ranks_whose_work_differs_by_more_than_the_timeout_are_waited_for(tmp_path: Path) -> None:
    for outcome in run_ranks(3, toy.uneven, tmp_path, False):
        assert outcome.result == [True, ["rank 0", "rank 1", "rank 2"]], outcome.output
    assert not list(tmp_path.iterdir())
    first, gone, third = run_ranks(3, toy.uneven, tmp_path, True)
    assert gone.exitcode == 9
    for outcome in (first, third):
        assert outcome.exitcode == 1
        assert "lost its peers while waiting for a max over all ranks" in outcome.output
