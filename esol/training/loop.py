"""The one training loop: steps, saves, logs and stops; it knows nothing of stages."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor

from esol.base import exits
from esol.base.errors import DivergenceError
from esol.base.interrupts import LAUNCHED, Interrupts
from esol.config import TrainConfig
from esol.data.samples import Batch
from esol.engines.base import Engine
from esol.training.optim import learning_rate

_LOG = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
MAX_SKIPPED = 20  # fp16 scaling halves at each skip: from 2**16 this many leave nothing that could still overflow


class Stopped(Exception):  # noqa: N818  it is no error: all is saved
    """Training was asked to stop and has saved its state; entry points leave with `code`."""

    def __init__(self, text: str = "", code: int = exits.STOPPED) -> None:
        super().__init__(text)
        self.code = code


class Saver(Protocol):
    """What the loop asks of a checkpointer."""

    every: int

    @property
    def writing(self) -> bool:
        """Whether this rank still writes what it has saved."""

    def save(self, step: int) -> None:
        """Begins to save the state after `step` steps, once the save before it is finished; a collective."""

    def finish(self) -> None:
        """Waits for what was begun and makes a checkpoint of it, where that is not done already; a collective."""


class StopSignal:
    """Notes SIGTERM, SIGUSR1 and SIGINT while it is entered; signals may come twice (torchrun sends them so).

    The death of the launcher counts as one: nobody else would ever end its processes. A second Ctrl-C is not waited for
    here: where the entry point has entered esol.base.interrupts, that ends the process at once.
    """

    def __init__(self) -> None:
        self.name = ""
        self._launcher = exits.PARENT if os.environ.keys() & LAUNCHED else None

    def __bool__(self) -> bool:
        if self._launcher is not None and os.getppid() != self._launcher and not self.name:
            self.name = "the launcher is gone"
        return bool(self.name)

    def __enter__(self) -> StopSignal:
        Interrupts.saving = True
        self._former = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        Interrupts.saving = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        Interrupts.taken |= number == signal.SIGINT
        self.name = self.name or signal.Signals(number).name

    def stopped(self, engine: Engine, where: str) -> Stopped:
        """What to raise once all ranks know of the signal; a collective, so that all leave with the same code."""
        interrupted = engine.any(self.name == "SIGINT")
        name = self.name or "a signal to another rank"
        return Stopped(f"{name}: {where}", exits.INTERRUPTED if interrupted else exits.STOPPED)


def train(
    engine: Engine,
    batches: Iterator[Sequence[Batch]],
    total_steps: int,
    config: TrainConfig,
    *,
    start_step: int,
    checkpointer: Saver,
    stop: StopSignal,
    log: Callable[[int, dict[str, float]], None],
    log_every: int,
) -> None:
    """Trains the prepared task from start_step to total_steps.

    batches yields this rank's micro-batches of one optimizer step, starting at start_step. Steps are counted from 1 in
    logs and checkpoints: "after step N". Every log_every steps, and at the end, the main rank's log gets means over the
    steps since the last time and over their global batches' images. A signal on any rank: the running step is finished,
    all ranks save and raise Stopped. A checkpoint is written while the next steps run, and gets its name behind the
    first step that no rank began while writing, at the next save or at the end. DivergenceError: a non-finite loss, or
    MAX_SKIPPED fp16 overflows in a row.
    """
    meter = _Meter(engine)
    skipped_in_a_row = 0
    for step in range(start_step + 1, total_steps + 1):
        began = time.perf_counter()
        engine.beat(f"the data of step {step}")
        microbatches = next(batches)
        waited = time.perf_counter() - began
        lr = learning_rate(step - 1, total_steps, config)
        engine.beat(f"step {step}")
        try:
            result = engine.train_step(microbatches, lr, stop=bool(stop), writing=checkpointer.writing)
        except DivergenceError as error:
            raise DivergenceError(f"step {step}: {error}") from error
        skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
        if skipped_in_a_row == MAX_SKIPPED:
            raise DivergenceError(
                f"step {step}: {MAX_SKIPPED} steps in a row overflowed in fp16 and were skipped; "
                "train with engine.precision bf16 or fp32, or lower lr"
            )
        images = sum(len(batch["key"]) for batch in microbatches)
        damaged = [reason for batch in microbatches for reason in batch.get("skipped", ())]
        for reason in damaged:
            _LOG.warning("step %d: another sample stands in for a damaged one: %s", step, reason)
        meter.add(result.losses, images, waited, time.perf_counter() - began, result.skipped, len(damaged))
        if step % log_every == 0 or step == total_steps or result.stop:
            values = meter.collect()
            if engine.is_main:
                log(step, {**values, "lr": lr, "grad_norm": result.grad_norm})
        if step % checkpointer.every == 0 or step == total_steps or result.stop:
            engine.beat(f"the checkpoint after step {step}")
            checkpointer.save(step)
        elif not result.writing:  # on all ranks alike
            checkpointer.finish()
        if step == total_steps or result.stop:
            checkpointer.finish()
        if result.stop and step < total_steps:
            raise stop.stopped(engine, f"stopped after step {step} of {total_steps}, saved")


class _Meter:
    """Means over the steps since the last log; nothing is fetched from the device in between."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._skipped = self._damaged = 0
        self._clear()

    def _clear(self) -> None:
        self._losses: dict[str, Tensor] = {}
        self._steps = self._images = 0
        self._waited = self._seconds = 0.0

    def add(
        self, losses: dict[str, Tensor], images: int, waited: float, seconds: float, skipped: bool, damaged: int
    ) -> None:
        for name, value in losses.items():
            self._losses[name] = self._losses[name] + value if name in self._losses else value.clone()
        self._steps += 1
        self._images += images
        self._waited += waited
        self._seconds += seconds
        self._skipped += skipped
        self._damaged += damaged

    def collect(self) -> dict[str, float]:
        """Reduced over all ranks, which must all call it: losses are means, waits and memory the worst rank's."""
        names = sorted(self._losses)
        losses = torch.stack([self._losses[name] for name in names]) / self._steps
        losses = self._engine.reduce(losses, "mean")
        worst = torch.tensor([self._waited / self._steps, self._seconds / self._steps, *_memory(self._engine.device)])
        waited, seconds, resident, cuda = self._engine.reduce(worst.double(), "max").tolist()
        damaged = self._engine.reduce(torch.tensor([self._damaged]), "sum")
        images = torch.tensor([self._images / self._steps], dtype=torch.float64)
        images_of_all = float(self._engine.reduce(images, "mean")) * self._engine.world_size
        values = dict(zip(names, losses.tolist(), strict=True))
        values |= {"images_per_second": images_of_all / seconds, "step_seconds": seconds, "data_wait_seconds": waited}
        values |= {"peak_memory_mib": resident, "skipped_steps": float(self._skipped)}
        values["damaged_samples"] = float(damaged)
        if self._engine.device.type == "cuda":
            values["peak_cuda_memory_mib"] = cuda
        self._clear()
        return values


def _memory(device: torch.device) -> tuple[float, float]:
    """Peak of this process so far in MiB: resident memory and CUDA memory."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return resident, torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
