"""The loop against an engine that only answers: what it logs, saves, and when it stops (test_engine.py trains)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from esol.base import exits
from esol.base.errors import DivergenceError
from esol.config import TrainConfig
from esol.engines.base import StepResult
from esol.training.loop import MAX_SKIPPED, Stopped, StopSignal, train
from esol.training.optim import learning_rate

CONFIG = TrainConfig(lr=0.1)


class Answers:
    """Of an Engine what the loop uses; the loss of step n is n."""

    is_main, world_size, device = True, 2, torch.device("cpu")

    def __init__(self, skipped: set[int] = frozenset(), stop_at: int = 0, start: int = 0) -> None:  # type: ignore[assignment]
        self.step, self.skipped, self.stop_at, self.lrs = start, skipped, stop_at, []  # type: ignore[var-annotated]

    def beat(self, doing: str) -> None:
        self.doing = doing

    def train_step(self, microbatches: Any, lr: float, stop: bool, writing: bool) -> StepResult:
        assert self.doing == f"step {self.step + 1}"
        self.step += 1
        self.lrs.append(lr)
        losses = {"loss": torch.tensor(float(self.step)), "area": torch.tensor(2.0)}
        return StepResult(losses, 0.5, self.step in self.skipped, stop or self.step == self.stop_at, writing)

    def reduce(self, values: torch.Tensor, op: str) -> torch.Tensor:
        return values

    def any(self, flag: bool) -> bool:
        return flag


class Saves:
    every = 4

    def __init__(self, busy: int = 0) -> None:
        """busy: how many steps begin while a checkpoint is still written."""
        self.steps: list[int] = []
        self.busy, self.left, self.finished, self.pending = busy, 0, [], 0  # type: ignore[var-annotated]

    @property
    def writing(self) -> bool:
        self.left -= 1
        return self.left >= 0

    def save(self, step: int) -> None:
        self.finish()
        self.steps.append(step)
        self.left, self.pending = self.busy, step

    def finish(self) -> None:
        self.finished += [self.pending] if self.pending else []
        self.pending = 0


@pytest.mark.parametrize(("busy", "when"), [(0, [5, 9]), (2, [7, 11]), (9, [8, 12])])
def test_a_checkpoint_has_its_name_when_no_rank_writes_at_the_next_save_or_at_the_end(busy: int, when: list) -> None:
    """when: the steps at whose end checkpoints 4 and 8 are finished; 12 is the last step."""
    saves, engine = Saves(busy), Answers()
    at: dict[int, int] = {}
    finish = saves.finish

    def noted() -> None:
        if saves.pending:
            at[saves.pending] = engine.step
        finish()

    saves.finish = noted  # type: ignore[method-assign]
    run(engine, 12, saves=saves)
    assert [at[4], at[8], at[12]] == [*when, 12]
    assert saves.finished == [4, 8, 12]


def batches() -> Iterator[list[dict[str, Any]]]:
    yield [{"key": ["a", "b"], "skipped": ["shard-0.tar, sample z: damaged"]}, {"key": ["c"]}]
    while True:
        yield [{"key": ["a", "b"]}, {"key": ["c"]}]


def test_damaged_samples_are_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    logged, _ = run(Answers(), 10)
    assert [logged[step]["damaged_samples"] for step in (5, 10)] == [1, 1]  # of the stage so far
    assert "step 1: another sample stands in for a damaged one: shard-0.tar, sample z" in caplog.text


def run(
    engine: Answers, total: int, stop: StopSignal | None = None, start: int = 0, saves: Saves | None = None
) -> tuple[dict, list[int]]:
    logged: dict[int, dict[str, float]] = {}
    saves = saves or Saves()
    try:
        train(
            engine,  # type: ignore[arg-type]
            batches(),  # type: ignore[arg-type]
            total,
            CONFIG,
            start_step=start,
            checkpointer=saves,
            stop=stop or StopSignal(),
            log=logged.__setitem__,
            log_every=5,
        )
    finally:
        run.last = (logged, saves.steps)  # type: ignore[attr-defined]
        assert saves.finished == saves.steps
    return logged, saves.steps


def test_logs_means_and_saves() -> None:
    engine = Answers(skipped={3, 4})
    logged, saved = run(engine, 12)
    assert list(logged) == [5, 10, 12]
    assert [values["loss"] for values in logged.values()] == [3.0, 8.0, 11.5]
    assert [values["skipped_steps"] for values in logged.values()] == [2, 2, 2]
    assert saved == [4, 8, 12]
    assert engine.lrs == [learning_rate(step, 12, CONFIG) for step in range(12)]
    last = logged[12]
    assert last["area"] == 2.0
    assert last["lr"] == engine.lrs[-1]
    assert last["grad_norm"] == 0.5
    assert last["images_per_second"] == pytest.approx(6 / last["step_seconds"])  # 3 here, 3 on the other rank
    assert 0 <= last["data_wait_seconds"] <= last["step_seconds"]
    assert last["peak_memory_mib"] > 10


def test_resumes_in_the_middle_and_does_nothing_at_the_end() -> None:
    engine = Answers(start=7)
    assert run(engine, 12, start=7)[1] == [8, 12]
    assert engine.lrs == [learning_rate(step, 12, CONFIG) for step in range(7, 12)]
    assert run(Answers(start=12), 12, start=12) == ({}, [])


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, exits.STOPPED), (signal.SIGUSR1, exits.STOPPED), (signal.SIGINT, exits.INTERRUPTED)],
)
def test_signal_finishes_the_step_saves_and_stops(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped, match=f"{number.name}: stopped after step 1 of 12, saved") as stopped:
            run(Answers(), 12, stop)
    assert stopped.value.code == code
    assert run.last[1] == [1]  # type: ignore[attr-defined]
    assert signal.getsignal(number) is before


def test_stop_of_another_rank_and_in_the_last_step() -> None:
    with pytest.raises(Stopped, match="stopped after step 6 of 12"):
        run(Answers(stop_at=6), 12)
    assert run.last[1] == [4, 6]  # type: ignore[attr-defined]
    assert run(Answers(stop_at=12), 12)[1] == [4, 8, 12]  # all is done: the stage ends as ever


def test_overflow_without_end_is_divergence() -> None:
    with pytest.raises(DivergenceError, match=f"step {MAX_SKIPPED + 2}: {MAX_SKIPPED} steps in a row overflowed"):
        run(Answers(skipped=set(range(3, 99))), 99)
    scattered = {step for step in range(99) if step % MAX_SKIPPED}
    assert run(Answers(skipped=scattered), 99)[0][99]["skipped_steps"] == len(scattered)
