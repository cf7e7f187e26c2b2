"""A training stage of a few dozen parameters, and what the ranks of the distributed tests run."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esol.base import exits
from esol.base.errors import CheckpointError, DivergenceError, LaunchError
from esol.base.schema import build
from esol.config import BackboneConfig, DataConfig, DeepSpeedConfig, EngineConfig, TrainConfig
from esol.data.index import Index
from esol.data.plan import Plan, share_of
from esol.data.reader import ShardReader
from esol.data.samples import Batch
from esol.data.stream import training_stream
from esol.data.transforms import Crop
from esol.engines import make_engine, ranks
from esol.engines.base import Engine, gather_text
from esol.models.backbones import build_backbone
from esol.models.cam_net import CamNet
from esol.pipeline import doctor
from esol.pipeline.config_file import from_tree
from esol.pipeline.job import run_job
from esol.stages.classify import ClassifyConfig, ClassifyTask
from esol.training.checkpoint import Checkpointer
from esol.training.loop import Stopped, StopSignal, train
from esol.training.optim import build_optimizer
from esol.training.task import ParameterGroup, Task

CONFIG = TrainConfig(lr=0.05, momentum=0.9, weight_decay=1e-3, global_batch=8, clip_norm=1.0, warmup=2)


class Toy(Task):
    """Two layers on 3x4x4 images, two classes; noise adds dropout, so that random state matters."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.drop = nn.Dropout(noise)

    @property
    def handover(self) -> nn.Module:
        return self.head

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
    most = -(-global_batch // engine.world_size)
    share = share_of(engine.rank, engine.world_size, global_batch, -(-most // micro))
    for step in range(start_step, 1_000_000):
        parts = [batch(step, begin, end - begin) for begin, end in pairwise(share.edges)]
        for part, weight in zip(parts, share.weights, strict=True):
            part["weight"] = weight
        yield parts


def drill(
    name: str,
    zeros: tuple[int, ...],
    folder: Path,
    source: Path | None = None,
    optimizer: str = "sgd",
    precision: str = "fp32",
    extra: dict[str, Any] | None = None,
    images: int = 8,
) -> dict[int, tuple[list[tuple[float, float]], dict[str, torch.Tensor]]]:
    """Five steps from scratch or from a checkpoint, by ZeRO stage: losses and gradient norms, and the weights after.

    extra: other fields of DeepSpeedConfig; images: of a global batch.

    Saves into folder/<name><zero>. One engine for all stages: DeepSpeed cannot start twice in a process.
    """
    options = build(EngineConfig, {"name": name, "threads": 1, "timeout": 0.5, "precision": precision})
    config = replace(CONFIG, optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 0.01)
    engine: Any = make_engine(options, seed=7)
    found = {}
    for zero in zeros:
        engine._config = replace(options, deepspeed=DeepSpeedConfig(zero=zero, **extra or {}))  # type: ignore[arg-type]
        torch.manual_seed(7)
        task = Toy()
        engine.prepare(task, build_optimizer(task, config), config.clip_norm)
        if source is not None:
            engine.load(source, 5)
        stream, trace = batches(engine, 5 if source else 0, images, micro=2), []
        for _ in range(5):
            result = engine.train_step(next(stream), config.lr)
            trace.append((engine.reduce(result.losses["loss"], "mean").item(), result.grad_norm))
        place = folder / f"{name}{zero}"
        write = engine.snapshot()
        if write is not None:
            place.mkdir(parents=True)
            write(place)
        found[zero] = trace, engine.model_state_dict()
    engine.close()
    return found


def elastic(root: Path, folder: Path, name: str, zero: int, until: int, images: int = 8) -> list[tuple[str, float]]:
    """Trains on real shards from the newest checkpoint to step `until`: keys and loss of each step's global batch."""
    options = build(EngineConfig, {"name": name, "threads": 1, "timeout": 0.5, "deepspeed": {"zero": zero}})
    engine = make_engine(options, seed=7)
    index = Index.load(str(root))
    ordinals = index.split("train")
    plan = Plan(ordinals, index.shard_of[ordinals], seed=5, global_batch=images)
    task = Toy()
    engine.prepare(task, build_optimizer(task, CONFIG), CONFIG.clip_norm)
    checkpointer = Checkpointer(folder, engine, fingerprint="f", config={})
    resumed = checkpointer.resume()
    start = resumed.step if resumed else 0
    share = share_of(engine.rank, engine.world_size, images, 0)
    crop, data = Crop(16, (16, 24)), DataConfig(str(root), workers=0)
    stream, trace = training_stream(ShardReader(index), plan, share, start, until, crop, data, (0, 0, 0)), []
    for microbatches in stream:
        for item in microbatches:
            item["labels"] = item["labels"][:, :2]
        result = engine.train_step(microbatches, CONFIG.lr)
        keys = gather_text(engine, " ".join(key for item in microbatches for key in item["key"]))
        trace.append((" ".join(keys), engine.reduce(result.losses["loss"], "mean").item()))
    checkpointer.save(until)
    checkpointer.finish()
    engine.close()
    return trace


def vit_steps(name: str, zero: int) -> dict[str, torch.Tensor]:
    """The weights after two steps of classify on a small ViT, four photos a step over all ranks."""
    options = {"name": name, "threads": 1, "timeout": 0.5, "deepspeed": {"zero": zero}}
    engine = make_engine(build(EngineConfig, options), seed=7)
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig("timm:test_vit", weights="none", freeze="none"))
    task = ClassifyTask(CamNet(backbone, 2, 8), ClassifyConfig())
    engine.prepare(task, build_optimizer(task, CONFIG), CONFIG.clip_norm)
    count = 4 // engine.world_size
    for step in range(2):
        own = batch(step, engine.rank * count, count)
        own["image"] = own["image"].repeat_interleave(8, 2).repeat_interleave(8, 3)
        engine.train_step([own], 0.05)
    weights = engine.model_state_dict()
    engine.close()
    return weights


def deepspeed_overflow_and_divergence() -> dict[str, Any]:
    """fp16 at a loss that overflows at first; then a loss and a gradient that are not numbers in float32."""
    options = build(EngineConfig, {"name": "deepspeed", "threads": 1, "timeout": 0.5, "precision": "fp16"})
    engine: Any = make_engine(options, seed=7)
    found: dict[str, Any] = {}
    for zero in (0, 2, 3):
        engine._config = replace(options, deepspeed=DeepSpeedConfig(zero=zero))  # type: ignore[arg-type]
        task = Scaled(1e4)
        engine.prepare(task, build_optimizer(task, CONFIG))
        skipped, changed = [], []
        for step in range(20):
            before = engine.model_state_dict()
            skipped.append(engine.train_step([batch(step, 2 * engine.rank, 2)], 1e-6).skipped)
            after = engine.model_state_dict()
            changed.append(any(not torch.equal(before[name], after[name]) for name in before))
        found[f"skipped {zero}"], found[f"changed {zero}"] = skipped, changed
        found[f"scale {zero}"] = engine._scale.value
    for zero in (0, 2, 3):
        engine._config = replace(options, precision="fp32", deepspeed=DeepSpeedConfig(zero=zero))  # type: ignore[arg-type]
        for kind in ("loss", "gradient"):
            task = Scaled(1.0, root=kind == "gradient")
            engine.prepare(task, build_optimizer(task, CONFIG))
            before = engine.model_state_dict()
            if kind == "loss" and engine.rank == engine.world_size - 1:
                task.factor = float("inf")
            try:
                engine.train_step([batch(1, 2 * engine.rank, 2)], 0.1)
            except DivergenceError as error:
                after = engine.model_state_dict()
                found[f"{kind} {zero}"] = str(error), all(torch.equal(before[name], after[name]) for name in before)
    engine.close()
    return found


class Scaled(Toy):
    """The toy with its loss multiplied; root: with a gradient that is not a number."""

    def __init__(self, factor: float, root: bool = False) -> None:
        super().__init__()
        self.factor, self.root = factor, root

    def forward(self, batch: Batch) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        losses, report = super().forward(batch)
        loss = losses["loss"] * self.factor
        return {"loss": loss + (self.head.weight * 0).sum().sqrt() if self.root else loss}, report


def start(precision: str = "fp32", noise: float = 0.0, timeout: float = 0.5) -> tuple[Engine, Toy]:
    """An engine with the toy prepared."""
    engine = make_engine(EngineConfig(precision=precision, threads=1, timeout=timeout), seed=7)  # type: ignore[arg-type]
    task = Toy(noise)
    engine.prepare(task, build_optimizer(task, CONFIG), CONFIG.clip_norm)
    return engine, task


def run(
    folder: Path,
    total: int,
    every: int,
    noise: float = 0.0,
    micro: int = 1,
    event: Callable[[Engine, int], None] = print,
    images: int = 8,
) -> dict[int, dict[str, float]]:
    """Trains from the newest checkpoint in folder to step total; leaves with exits.STOPPED after a signal.

    event: called with the step whose batch is drawn; images: of a global batch. Returns what was logged, by step.
    """
    engine, _ = start(noise=noise)
    checkpointer = Checkpointer(folder, engine, fingerprint="f", config={"a": 1}, every=every, keep=2)
    resumed = checkpointer.resume()
    step = resumed.step if resumed else 0
    stream, logged = batches(engine, step, images, micro), {}

    def log(step: int, values: dict[str, float]) -> None:
        logged[step] = values
        print(step, values, flush=True)

    def drawn() -> Iterator[list[Batch]]:
        for number, item in enumerate(stream, step + 1):
            event(engine, number)
            yield item

    with StopSignal() as stop:
        try:
            train(
                engine,
                drawn(),
                total,
                CONFIG,
                start_step=step,
                checkpointer=checkpointer,
                stop=stop,
                log=log,
                log_every=5,
            )
        except Stopped as stopped:
            print(stopped, flush=True)
            os._exit(exits.STOPPED)
    engine.close()
    return logged


def sigterm_rank_1_twice(engine: Engine, step: int) -> None:
    if engine.rank == 1 and step == 6:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)


def examine(root: str, run_dirs: list[str], weights: str = "none") -> int:
    """esol doctor with a run directory of the rank's own, and DeepLab's initial weights."""
    own = run_dirs[int(os.environ["RANK"])]
    tree = {"run_dir": own, "data": {"root": root}, "engine": {"threads": 1, "timeout": 0.5}}
    tree |= {"model": {"backbone": "small", "weights": "none"}, "irn": {"global_batch": 8}}
    tree["segment"] = {"model": {"backbone": "small" if weights == "none" else "resnet50", "weights": weights}}
    return doctor.run(from_tree(tree))


def stands() -> None:
    time.sleep(60)


def stall(folder: Path, how: str) -> None:
    """Ten steps under a watchdog of three seconds, with something amiss on rank 1 in step 3."""
    options = build(EngineConfig, {"threads": 1, "timeout": 5, "stall": 0.05})
    engine = make_engine(options, seed=7)
    task = Toy()
    engine.prepare(task, build_optimizer(task, CONFIG), CONFIG.clip_norm)
    stream = batches(engine, 0)
    with engine.watched(folder):
        for step in range(1, 11):
            engine.beat(f"the data of step {step}")
            if step == 3 and engine.rank == 1:
                if how == "data":
                    time.sleep(60)
                elif how == "worker":
                    worker = multiprocessing.get_context("fork").Process(target=stands, daemon=True)
                    worker.start()
                    worker.join()
                elif how == "frozen":
                    time.sleep(1.5)  # until the others have heard where it is
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif how == "other collective":
                    engine.gather(torch.zeros(1))
            if how == "slow" and engine.rank == 1:
                time.sleep(0.8)
            batch = next(stream)
            engine.beat(f"step {step}")
            engine.train_step(batch, 0.1)
    engine.close()


def uneven(folder: Path, lost: bool) -> list[Any]:
    """Under a watchdog rank 1 works for longer than engine.timeout, or is gone; then all agree on something."""
    engine = make_engine(EngineConfig(threads=1, timeout=1 / 60, stall=0.5), seed=0)
    found: list[Any] = []
    with engine.watched(folder):
        for wait in ("a flag", "a barrier", "texts"):
            for second in range(3 if engine.rank == 1 else 0):
                engine.beat(f"photo {second} before {wait}")
                time.sleep(0.6)
                if lost:
                    os._exit(9)
            if wait == "a flag":
                found.append(engine.any(engine.rank == 1))
            elif wait == "a barrier":
                engine.barrier("the slow rank's photos")
            else:
                found.append(gather_text(engine, f"rank {engine.rank}"))
    engine.close()
    return found


def collectives() -> dict[str, Any]:
    ranks.cpu_has_bf16 = lambda: os.environ["RANK"] == "0"  # machines of two kinds: all compute alike
    engine = make_engine(EngineConfig(precision="auto", threads=1, timeout=0.5), seed=0)
    values = torch.tensor([engine.rank, 5 + 2 * engine.rank])
    found = {
        "world": (engine.rank, engine.world_size, engine.is_main),
        "sum": engine.reduce(values.double(), "sum").tolist(),
        "mean": engine.reduce(values.double(), "mean").tolist(),
        "max": engine.reduce(values.double(), "max").tolist(),
        "gather": [v.tolist() for v in engine.gather(values)],
        "text": gather_text(engine, "é from rank 1" if engine.rank else ""),
        "any": (engine.any(engine.rank == 1), engine.any(False)),
        "kind": engine.kind,
    }
    engine.barrier("the end")
    engine.close()
    return found


def diverge() -> tuple[str, bool]:
    """Two good steps, then labels that are not numbers in the second micro-batch of rank 1."""
    engine, _ = start()
    stream = batches(engine, 1, micro=2)
    for _ in range(2):
        engine.train_step(next(stream), 0.1)
    before = engine.model_state_dict()
    poisoned = next(stream)
    if engine.rank == 1:
        poisoned[1]["labels"][0, 0] = float("nan")
    try:
        engine.train_step(poisoned, 0.1)
    except DivergenceError as error:
        after = engine.model_state_dict()
        return str(error), all(torch.equal(before[name], after[name]) for name in before)
    raise AssertionError("trained on a loss that is not finite")


def fill_disk(folder: Path) -> tuple[str, list[str]]:
    """Saves after step 2, then again while the main rank's files may not grow as large as they must."""
    engine, _ = start()
    checkpointer = Checkpointer(folder, engine, fingerprint="f", config={"a": 1})
    stream = batches(engine, 0)
    for _ in range(2):
        engine.train_step(next(stream), 0.1)
    checkpointer.save(2)
    checkpointer.finish()  # a thread writes them: the limit below is for step 3's files alone
    engine.train_step(next(stream), 0.1)
    if engine.is_main:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    try:
        checkpointer.save(3)
        checkpointer.finish()
    except CheckpointError as error:
        engine.barrier("the main rank's cleaning up")
        return str(error), sorted(path.name for path in folder.iterdir())
    raise AssertionError("a checkpoint without a rank's file")


def die_in_step_3() -> str:
    engine, _ = start()
    stream = batches(engine, 0)
    for step in (1, 2, 3):
        if step == 3 and engine.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            engine.train_step(next(stream), 0.1)
        except LaunchError as error:
            return str(error)
    raise AssertionError("trained without the other rank")


def never_come() -> str:
    """Rank 1 lives on but does not come to the barrier."""
    engine = make_engine(EngineConfig(threads=1, timeout=0.03), seed=0)
    other = int(engine.gather(torch.tensor([os.getpid()]))[1])
    if engine.rank == 1:
        signal.pause()
    try:
        engine.barrier("the class maps of rank 1")
    except LaunchError as error:
        return str(error)
    finally:
        os.kill(other, signal.SIGKILL)
    raise AssertionError("passed a barrier alone")


def launch_error() -> str:
    try:
        make_engine(EngineConfig(threads=1, timeout=0.03), seed=0)
    except LaunchError as error:
        return str(error)
    raise AssertionError("started without the other process")


def launch_error_of_a_group_of_one() -> str:
    """As where a launcher's variables reach only half of what starts the group."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return launch_error()


def run_and_be_killed(folder: Path, total: int, every: int, seed: int) -> None:
    """A run in which both ranks die by SIGKILL at a random moment of their own.

    Half the seeds kill at a moment of time, half at a file operation, because a save is short and must be hit as well.
    """
    generator = random.Random(f"{seed} {os.environ['RANK']}")
    operations, step_to_die, delay = generator.randrange(1, 120), generator.randrange(1, 30), generator.uniform(0, 0.03)
    kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
    drawn = 0

    def count(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal operations
        if name in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(folder) in str(arguments[0]):
            operations -= 1
            if not operations:
                kill()

    def draw(engine: Engine, step: int) -> None:
        nonlocal drawn
        drawn += 1
        if seed % 2 and drawn == 1:
            sys.addaudithook(count)
        elif not seed % 2 and drawn == step_to_die:
            threading.Timer(delay, kill).start()

    run(folder, total, every, 0.3, 1, draw)


def begin(tree: dict[str, Any]) -> int:
    """What becomes of a run of this config: its exit code."""
    return exits.entry(lambda: run_job(from_tree(tree)))
