"""A rank that stands still is named, every rank's stacks are written, and the job ends."""

from __future__ import annotations

import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import toy
from ranks import run_ranks
from torch.distributed import TCPStore

from esol.base import exits
from esol.engines.watchdog import Watchdog, _names


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


def test_a_process_that_does_not_answer_is_named_by_the_others_and_killed(tmp_path: Path) -> None:
    left, stopped = run_ranks(2, toy.stall, tmp_path, "frozen", bound=40)
    assert left.exitcode == exits.LOST
    text = "error: stalled: rank 1 has stood for 3 s, and its process does not answer, at: the data of step 3"
    assert text in left.output
    assert stopped.exitcode == -signal.SIGKILL  # stopped, it cannot leave, and its launcher would wait without end


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


class Told(Watchdog):
    """Says why it would end its process, and ends nothing."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._deadline = None

    def _end(self, verdict: str) -> None:
        self.why = verdict
        self._done.set()


def verdicts(world: int, standing: int, silent: int = -1) -> list[str]:
    """The verdicts of watchdogs of one job, of which one rank's work stands, and one's process is silent."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    dogs = [Told(rank, world, store, Path(), 4.0) for rank in range(world)]
    try:
        for rank, dog in enumerate(dogs):
            if rank != silent:
                dog.start()
        end = time.monotonic() + 50
        while not all(hasattr(dog, "why") for rank, dog in enumerate(dogs) if rank != silent):
            assert time.monotonic() < end
            for rank, dog in enumerate(dogs):
                if rank != standing:
                    dog.beat("step 7")
            time.sleep(0.05)
    finally:
        for rank, dog in enumerate(dogs):
            if rank != silent:
                dog.stop()
    return [dog.why for rank, dog in enumerate(dogs) if rank != silent]


def test_rank_0_judges_and_says_in_a_few_words_where_all_others_are() -> None:
    assert set(verdicts(24, standing=5)) == {"rank 5 has stood for 4 s at: starting; ranks 0 to 4, 6 to 23 at: step 7"}
    assert _names([0, 1, 2, 3, 7, 8, 10]) == "ranks 0 to 3, 7, 8, 10"


def test_a_silent_rank_0_whose_store_lives_on_is_named_by_the_others() -> None:
    (verdict,) = set(verdicts(3, standing=-1, silent=0))
    assert verdict.startswith("rank 0 has stood for 4 s, and its process does not answer, at: its start; rank ")


def test_what_a_rank_but_0_asks_of_the_store_does_not_grow_with_the_job() -> None:
    asked: dict[tuple[int, int], int] = {}

    class Asked:
        def __init__(self, world: int, rank: int) -> None:
            self.key = world, rank

        def clone(self) -> Asked:
            return self

        def set_timeout(self, timeout: timedelta) -> None: ...

        def set(self, key: str, value: str) -> None: ...

        def multi_get(self, keys: list[str]) -> list[bytes]:
            asked[self.key] = len(keys)
            return [b"", *[b'{"tick": 1}'] * (len(keys) - 1)]

    for world in (2, 100):
        for rank in (0, 1):
            dog = Watchdog(rank, world, Asked(world, rank), Path(), 600.0)
            dog._period = 0.01
            dog.start()
            while (world, rank) not in asked:
                time.sleep(0.01)
            dog.stop()
    assert asked == {(2, 0): 2, (2, 1): 2, (100, 0): 100, (100, 1): 2}
