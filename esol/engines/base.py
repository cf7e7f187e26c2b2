"""The engine protocol: who computes, and how. The seam between training and its hardware is the optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from esol.data.samples import Batch
from esol.training.task import Task


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave on this rank.

    losses: every entry of the task's losses and report, detached float32 scalars on the engine's device: the mean over
    the micro-batches, each times its weight, so that the mean over the ranks is that over the images of the global
    batch; grad_norm: global norm before clipping, the same on all ranks;
    skipped: True where fp16 scaling overflowed and no weight changed; stop: whether any rank asked to stop; writing:
    whether any rank was still writing a checkpoint when the step began.
    """

    losses: dict[str, Tensor]
    grad_norm: float
    skipped: bool
    stop: bool
    writing: bool = False


class Engine(Protocol):
    """One process of a job: owns device, autocast, accumulation, gradient synchronisation, clipping and scaling."""

    rank: int
    world_size: int
    device: torch.device
    is_main: bool
    kind: torch.dtype | None
    """What matrix products are computed in, on every rank alike; None for float32."""

    def prepare(self, task: Task, optimizer: torch.optim.Optimizer, clip_norm: float = 0.0) -> None:
        """Moves the task to the device and takes it and its optimizer over; called once per training stage.

        clip_norm: largest global gradient norm, 0 = off.
        """

    def train_step(
        self, microbatches: Sequence[Batch], lr: float, stop: bool = False, writing: bool = False
    ) -> StepResult:
        """One optimizer step at learning rate lr over this rank's micro-batches, as many as every other rank has.

        Each counts by its batch["weight"]: the gradient is that of the mean over the images of the global batch.
        Each parameter group learns at lr * group["lr_multiplier"]. A non-finite loss on any rank raises
        DivergenceError on every rank, naming the batch's sample keys, before any weight changes.
        The random numbers of a step follow from seed, rank and the number of the step.
        stop: this rank was asked to stop; writing: it is writing a checkpoint. Both ride on the collective that agrees
        on the losses.
        """

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision for inference, the same as in training."""

    def reduce(self, values: Tensor, op: Literal["mean", "sum", "max"]) -> Tensor:
        """The tensor reduced over all ranks, on every rank."""

    def gather(self, values: Tensor) -> list[Tensor]:
        """The tensors (equal shapes) of all ranks, in rank order, on every rank."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; a collective that every rank must call."""

    def barrier(self, waiting_for: str) -> None:
        """Waits for all ranks; bounded, and the error says what it was waiting for."""

    def watched(self, folder: Path) -> AbstractContextManager[None]:
        """Inside, a rank that stands still for engine.stall minutes ends the job; all ranks enter and leave together.

        folder: where each rank then writes its stacks.
        """

    def beat(self, doing: str) -> None:
        """This rank begins something new: a step, a photo. Costs an assignment."""

    def snapshot(self) -> Callable[[Path], list[Path]] | None:
        """Copies model, optimizer and loss scale into the host's memory on the main rank; a collective.

        What it returns writes the copy into an existing folder and names the files; a thread may call it while steps
        go on. OSError where a file cannot be written. None on other ranks: they have nothing to write.
        """

    def load(self, folder: Path, step: int) -> None:
        """Restores what a snapshot wrote after `step` steps (weights_only); CheckpointError where it does not fit."""

    def model_state_dict(self) -> dict[str, Tensor]:
        """The whole task's state on the CPU, float32, on every rank (all ranks must call it)."""

    def close(self) -> None:
        """Leaves the process group."""


def gather_text(engine: Engine, text: str) -> list[str]:
    """The texts of all ranks, in rank order, on every rank: how the message of a failing rank reaches the others."""
    data = text.encode()
    size = int(engine.reduce(torch.tensor([len(data)]), "max"))
    padded = torch.zeros(size, dtype=torch.uint8)
    padded[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    return (
        [bytes(row.tolist()).rstrip(b"\0").decode() for row in engine.gather(padded)]
        if size
        else [""] * engine.world_size
    )
