"""The training stages: what each one learns, from what, and what it hands over."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from esol import localization
from esol.base.files import atomic_write
from esol.base.progress import progress
from esol.config import Duration, LabelConfig, PairConfig, TrainConfig
from esol.data.plan import Plan, share_of
from esol.data.reader import ShardReader
from esol.data.stream import training_stream
from esol.data.transforms import Crop
from esol.deploy.segmenter import WEIGHTS, ModelInfo, write_model
from esol.models.backbones import Backbone
from esol.networks import (
    affinity_net,
    build_net,
    deeplab,
    initial_weights,
    irn_net,
    trained_cam,
    trained_decision,
    trained_expansion,
    trained_net,
)
from esol.pipeline.context import Context, Results
from esol.pipeline.inference import StageShards, TrueMasks, photo
from esol.pipeline.judging import mask_source
from esol.tasks.affinity import Affinity
from esol.tasks.classify import Classify
from esol.tasks.decide import Decide
from esol.tasks.expand import Expand
from esol.tasks.irn import Irn
from esol.tasks.segment import Segment
from esol.tasks.shrink import Shrink
from esol.training.checkpoint import Checkpointer
from esol.training.loop import train
from esol.training.losses import absence_weights
from esol.training.optim import build_optimizer
from esol.training.task import Task

Target = Callable[[int], NDArray[np.uint8]]


def classify(context: Context, folder: Path) -> Results:
    """The CAM network on image-level labels."""
    for line in odd_classes(context.reader, context.config.data.train_split):
        context.say(line)
    net = build_net(context.config, len(context.index.classes), pretrained=True)
    task = Classify(net, context.config.classify, _absence(context, "classify"))
    return _fit_cam(context, "classify", task, folder, net.backbone)


def decide(context: Context, folder: Path) -> Results:
    """The trained network's head, until its class maps decide."""
    net = trained_net(context.config, len(context.index.classes))
    task = Decide(net, context.config.decide, _absence(context, "decide"))
    return _fit_cam(context, "decide", task, folder, net.backbone)


def expand(context: Context, folder: Path) -> Results:
    """The expansion sampler on the trained network."""
    net = trained_net(context.config, len(context.index.classes))
    decision = trained_decision(context.config, net) if "decide" in context.config.stages else None
    task = Expand(net, context.config.expand, decision, _absence(context, "expand"))
    return _fit_cam(context, "expand", task, folder, net.backbone)


def shrink(context: Context, folder: Path) -> Results:
    """The shrinkage sampler on the expanded features."""
    net = trained_net(context.config, len(context.index.classes))
    expansion = trained_expansion(context.config, net)
    task = Shrink(net, expansion, context.config.shrink, _absence(context, "shrink"))
    return _fit_cam(context, "shrink", task, folder, net.backbone)


def psa(context: Context, folder: Path) -> Results:
    """AffinityNet on the labels of psa_labels."""
    net = affinity_net(context.config, len(context.index.classes))
    return _fit_pairs(context, "psa", Affinity(net, context.config.psa), folder, net.backbone)


def irn(context: Context, folder: Path) -> Results:
    """IRNet on the labels of irn_labels."""
    net = irn_net(context.config, len(context.index.classes))
    return _fit_pairs(context, "irn", Irn(net, context.config.irn), folder, net.backbone)


def segment(context: Context, folder: Path) -> Results:
    """DeepLab-v2 on pseudo masks, or on the true ones; hands over a file that says how to predict with it."""
    config, classes = context.config, context.index.classes
    net = deeplab(config, len(classes))
    source, started = mask_source(context), initial_weights(config.segment.model)
    context.say(f"segment: learns from {source}, starts from {started}")
    target = TrueMasks(context.reader) if source == "truth" else _reader(context, source, "mask.png")
    info = ModelInfo(
        classes=classes,
        backbone=config.segment.model.backbone,
        rates=config.segment.rates,
        evaluate=config.evaluate,
        photo_side=_photo_side(context),
        masks=source,
        initial_weights=started,
    )
    crop = Crop(config.segment.crop, scale=config.segment.scale)
    task, split = Segment(net, config.segment), config.data.mask_split
    results = _fit(context, "segment", task, folder, net.backbone, split, crop, target, info)
    return {**results, "photos": len(context.index.split(split)), "masks": source, "initial_weights": started}


def _absence(context: Context, name: str) -> Tensor | None:
    """The weights of absent classes over the training split, if the stage's loss has them."""
    config: LabelConfig = getattr(context.config, name)
    if not config.balance:
        return None
    train = context.index.split(context.config.data.train_split)
    return absence_weights(torch.from_numpy(context.reader.occurrence(train)), len(train))


def odd_classes(reader: ShardReader, split: str) -> list[str]:
    """Sentences on classes that no photo of the split shows, or that every photo does: neither can be told apart."""
    index, ordinals = reader.index, reader.index.split(split)
    count = reader.occurrence(ordinals)
    never = [name for name, times in zip(index.classes, count, strict=True) if not times]
    always = [name for name, times in zip(index.classes, count, strict=True) if times == len(ordinals)]
    lines = []
    if never:
        some = f"{', '.join(never[:5])}{', ...' if len(never) > 5 else ''}"
        lines.append(f"warning: no photo of {split} is labelled {some}: nothing is learned of {len(never)} classes")
    if always:
        lines.append(
            f"warning: every photo of {split} is labelled {', '.join(always)}, so that nothing shows what is not; "
            "add photos without it, with an empty label"
        )
    return lines


def _photo_side(context: Context) -> int:
    """Median long side of a hundred photos that segment learns from, evenly spread."""
    ordinals = context.index.split(context.config.data.mask_split)
    chosen = ordinals[np.linspace(0, len(ordinals) - 1, min(100, len(ordinals))).astype(int)]
    return int(np.median([max(photo(context, int(o)).shape[1:]) for o in chosen]))


def _fit_cam(context: Context, name: str, task: Task, folder: Path, backbone: Backbone) -> Results:
    """Image-level labels; then pictures, by what was handed over: an engine may have the task's weights in parts."""
    data = context.config.data
    results = _fit(context, name, task, folder, backbone, data.train_split, Crop(data.crop, data.long_side))
    if context.engine.is_main:
        nets = trained_cam(context.config, len(context.index.classes), context.engine.device, until=name)
        localization.draw(context, name, nets)
    return results


def _fit_pairs(context: Context, name: str, task: Task, folder: Path, backbone: Backbone) -> Results:
    """Photos and label maps of the mask split, cropped together."""
    config: PairConfig = getattr(context.config, name)
    crop = Crop(config.crop, scale=config.scale)
    split = context.config.data.mask_split
    target = _reader(context, f"{name}_labels", "label.png")
    return _fit(context, name, task, folder, backbone, split, crop, target)


def _reader(context: Context, stage: str, member: str) -> Target:
    return partial(StageShards(context, stage).label_map, member=member)


def _fit(
    context: Context,
    name: str,
    task: Task,
    folder: Path,
    backbone: Backbone,
    split: str,
    crop: Crop,
    target: Target | None = None,
    info: ModelInfo | None = None,
) -> Results:
    """Trains the task over all ranks and writes its handover, info in its header; results: the last logged values."""
    engine, settings = context.engine, context.config
    config: TrainConfig = getattr(settings, name)
    ordinals = context.index.split(split)
    plan = Plan(ordinals, context.index.shard_of[ordinals], settings.seed, config.global_batch)
    share = share_of(engine.rank, engine.world_size, config.global_batch, settings.engine.micro_batch)
    total = total_steps(config, name, plan)

    last: Results = {}
    engine.prepare(task, build_optimizer(task, config), config.clip_norm)
    checkpoints = Checkpointer(
        folder / "checkpoints",
        engine,
        fingerprint=context.fingerprint,
        config=context.settings,
        every=settings.checkpoint.every,
        keep=settings.checkpoint.keep,
        notes=last,  # a run that is killed behind its last checkpoint has its results there
    )
    start = _start(context, name, checkpoints, last)
    fill = _mean_colour(backbone)
    batches = training_stream(context.reader, plan, share, start, total, crop, settings.data, fill, target)
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
        prefix = "handover."
        kept = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if info is not None:
            write_model(folder / WEIGHTS, kept, info)
        else:
            atomic_write(folder / WEIGHTS, save({key: value.contiguous() for key, value in kept.items()}))
    return {key: value for key, value in last.items() if key != "lr"}


def _start(context: Context, name: str, checkpoints: Checkpointer, last: Results) -> int:
    """The steps that are done, and into `last` what was logged by then."""
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
    last.update(found.notes)
    return found.step


def total_steps(config: TrainConfig, name: str, plan: Plan) -> int:
    """Optimizer steps of a stage's duration."""
    return Duration.parse(config.duration, f"{name}.duration").steps(config.global_batch, plan.steps_per_epoch)


def _mean_colour(backbone: Backbone) -> tuple[int, int, int]:
    """RGB 0..255, what surrounds photos that are smaller than the crop: normalisation turns it into zeros."""
    red, green, blue = backbone.mean.flatten().round().int().tolist()
    return red, green, blue
