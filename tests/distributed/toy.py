"""A training stage of a few dozen parameters, and what the ranks of the distributed tests run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from esol.checkpoint import Checkpointer
from esol.config import EngineConfig, TrainConfig
from esol.engines import make_engine
from esol.engines.base import Engine
from esol.loop import StopSignal, train
from esol.optim import build_optimizer
from esol.tasks.base import Batch, ParameterGroup, Task

CONFIG = TrainConfig(lr=0.05, momentum=0.9, weight_decay=1e-3, global_batch=8, clip_norm=1.0, warmup=2)


class Toy(Task):
    """Two layers on 3x4x4 images, two classes; noise adds dropout, so that random state matters."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.drop = nn.Dropout(noise)
        self.handover = self.head

    def forward(self, batch: Batch) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        features = self.drop(self.body(batch["image"].float() / 255).relu().mean((2, 3)))
        loss = nn.functional.multilabel_soft_margin_loss(self.head(features).float(), batch["labels"])
        return {"loss": loss}, {"mean_label": batch["labels"].mean()}

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup("body", list(self.body.parameters())),
            ParameterGroup("head", list(self.head.parameters()), lr_multiplier=10, weight_decay=False),
        ]


def batch(step: int, first: int, count: int) -> Batch:
    """Images first..first+count of a global batch: a function of the step, whatever the ranks."""
    images, labels = [], []
    for i in range(first, first + count):
        generator = torch.Generator().manual_seed(1000 * step + i)
        images.append(torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8, generator=generator))
        labels.append(torch.randint(0, 2, (2,), generator=generator).float())
    return Batch(
        image=torch.stack(images),
        labels=torch.stack(labels),
        key=[f"step{step}-image{i}" for i in range(first, first + count)],
    )


def batches(engine: Engine, start_step: int, global_batch: int = 8, micro: int = 1) -> Iterator[list[Batch]]:
    """This rank's share of each global batch, in `micro` micro-batches."""
    share = global_batch // engine.world_size // micro
    for step in range(start_step, 1_000_000):
        first = engine.rank * share * micro
        yield [batch(step, first + i * share, share) for i in range(micro)]


def start(precision: str = "fp32", noise: float = 0.0, timeout: float = 0.5) -> tuple[Engine, Toy]:
    """An engine with the toy prepared."""
    engine = make_engine(EngineConfig(precision=precision, threads=1, timeout=timeout), seed=7)  # type: ignore[arg-type]
    task = Toy(noise)
    engine.prepare(task, build_optimizer(task, CONFIG), CONFIG.clip_norm)
    return engine, task


def run(folder: Path, total: int, every: int, noise: float = 0.0, **more: object) -> Toy:
    """Trains from the newest checkpoint in folder to step total."""
    engine, task = start(noise=noise)
    checkpointer = Checkpointer(folder, engine, fingerprint="f", config={"a": 1}, every=every, keep=2)
    resumed = checkpointer.resume()
    step = resumed.step if resumed else 0
    with StopSignal() as stop:
        train(
            engine,
            batches(engine, step),
            total,
            CONFIG,
            start_step=step,
            checkpointer=checkpointer,
            stop=stop,
            log=lambda step, values: print(step, values, flush=True),
            log_every=5,
        )
    engine.close()
    return task
