"""The training stages: what each one learns, from what, and what it hands over."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from esol.checkpoint import Checkpointer
from esol.config import TrainConfig, parse_duration
from esol.context import Context, Results
from esol.data.plan import Plan, share_of
from esol.data.stream import training_stream
from esol.errors import CheckpointError
from esol.files import atomic_write
from esol.loop import train
from esol.models.backbones import build_backbone
from esol.models.cam_net import CamNet
from esol.models.expansion import Expansion, Shrinkage
from esol.optim import build_optimizer
from esol.progress import progress
from esol.tasks.base import Task
from esol.tasks.classify import Classify
from esol.tasks.expand import Expand
from esol.tasks.shrink import Shrink

WEIGHTS = "model.safetensors"


def classify(context: Context, folder: Path) -> Results:
    """The CAM network on image-level labels."""
    config = context.config.classify
    return _fit(context, "classify", Classify(build_net(context, pretrained=True), config), config, folder)


def expand(context: Context, folder: Path) -> Results:
    """The expansion sampler on the trained network."""
    config = context.config.expand
    return _fit(context, "expand", Expand(trained_net(context), config), config, folder)


def shrink(context: Context, folder: Path) -> Results:
    """The shrinkage sampler on the expanded features."""
    config = context.config.shrink
    net = trained_net(context)
    return _fit(context, "shrink", Shrink(net, trained_expansion(context, net), config), config, folder)


def build_net(context: Context, pretrained: bool) -> CamNet:
    """The network of the `model` section for the shard set's classes; initial weights follow from the seed alone."""
    model = context.config.model
    torch.manual_seed(context.config.seed)
    return CamNet(build_backbone(model, pretrained), len(context.index.classes), model.kernel_channels)


def trained_net(context: Context) -> CamNet:
    """The network as classify handed it over."""
    return _restore(build_net(context, pretrained=False), context.run_dir / "classify")


def trained_expansion(context: Context, net: CamNet) -> Expansion:
    """The Expansion as expand handed it over."""
    return _restore(Expansion(net, context.config.expand), context.run_dir / "expand")


def trained_shrinkage(context: Context, expansion: Expansion) -> Shrinkage:
    """The Shrinkage as shrink handed it over."""
    return _restore(Shrinkage(expansion, context.config.shrink), context.run_dir / "shrink")


_Module = TypeVar("_Module", bound=nn.Module)


def _restore(module: _Module, folder: Path) -> _Module:
    path = folder / WEIGHTS
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be used ({error}): delete {folder} to run the stage again") from error
    return module


def _fit(context: Context, name: str, task: Task, config: TrainConfig, folder: Path) -> Results:
    """Trains the task over all ranks and writes its handover; the last logged values are the results."""
    engine, settings = context.engine, context.config
    ordinals = context.index.split(settings.data.train_split)
    plan = Plan(ordinals, context.index.shard_of[ordinals], settings.seed, config.global_batch)
    share = share_of(engine.rank, engine.world_size, config.global_batch, settings.engine.micro_batch)
    count, unit = parse_duration(config.duration, f"{name}.duration")
    total = count * plan.steps_per_epoch if unit == "epochs" else count

    engine.prepare(task, build_optimizer(task, config), config.clip_norm)
    checkpoints = Checkpointer(
        folder / "checkpoints",
        engine,
        fingerprint=context.fingerprint,
        config=context.settings,
        every=settings.checkpoint.every,
        keep=settings.checkpoint.keep,
    )
    start = _start(context, name, checkpoints)
    batches = training_stream(context.reader, plan, share, start, total, settings.data, fill_of(task))
    last: Results = {}
    with progress(name, total, "steps", engine.is_main) as advance:

        def log(step: int, metrics: dict[str, float]) -> None:
            last.update(metrics)
            context.tracker.metrics(step, metrics)
            advance(step, f"loss {metrics['loss']:.4f}  {metrics['images_per_second']:.0f} images/s")

        train(
            engine,
            batches,
            total,
            config,
            start_step=start,
            checkpointer=checkpoints,
            stop=context.stop,
            log=log,
            log_every=settings.tracking.every,
        )
    state = engine.model_state_dict()
    if engine.is_main:
        prefix = next(path for path, module in task.named_modules() if module is task.handover) + "."
        kept = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        atomic_write(folder / WEIGHTS, save({key: value.contiguous() for key, value in kept.items()}))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {key: value for key, value in last.items() if key != "lr"}


def _start(context: Context, name: str, checkpoints: Checkpointer) -> int:
    if not context.resume:
        if context.engine.any(checkpoints.folder.exists()):
            context.say(f"{name}: starts over; there is an interrupted one, which --resume would go on with")
            context.engine.barrier("all ranks to see the interrupted stage")
            if context.engine.is_main:
                shutil.rmtree(checkpoints.folder, ignore_errors=True)
        return 0
    found = checkpoints.resume()
    if found is None:
        return 0
    context.say(f"{name}: resumed after step {found.step}")
    return found.step


def fill_of(task: Any) -> tuple[int, int, int]:
    """The network's mean colour, RGB 0..255: what surrounds photos that are smaller than the crop."""
    red, green, blue = task.net.backbone.mean.flatten().round().int().tolist()
    return red, green, blue
