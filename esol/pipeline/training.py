"""A stage that trains: data in, one task through the loop, the weights that it hands over out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from esol.base.errors import EsolError
from esol.base.files import atomic_write
from esol.base.progress import progress
from esol.config import Config, CropConfig, Duration, TrainConfig
from esol.data.index import Index
from esol.data.plan import Plan, share_of
from esol.data.stream import training_stream
from esol.data.transforms import Crop
from esol.models.backbones import Backbone
from esol.models.folded import for_training
from esol.pipeline.features import kept_features
from esol.pipeline.made import StageShards
from esol.pipeline.registry import Stage
from esol.pipeline.scores import Results
from esol.pipeline.weights import WEIGHTS
from esol.training.checkpoint import Checkpointer
from esol.training.loop import train
from esol.training.optim import build_optimizer
from esol.training.task import Task

Target = Callable[[int], NDArray[np.uint8]]


class TrainingStage(Stage):
    """A stage whose work is a task. split: the key below `data` that names the split that it learns from."""

    makes = "weights"
    produces = (WEIGHTS,)
    split: ClassVar[str] = "train_split"
    config: TrainConfig

    def task(self) -> Task:
        """Model and loss."""
        raise NotImplementedError

    def crop(self) -> Crop:
        """How a photo becomes a training crop."""
        raise NotImplementedError

    def target(self) -> Target | None:
        """The label map of a sample that is cropped with its photo, where the task learns from one."""
        return None

    def hand_over(self, state: dict[str, Tensor]) -> None:
        """Writes the weights; on the main rank."""
        atomic_write(self.folder / WEIGHTS, save({key: value.contiguous() for key, value in state.items()}))

    def run(self) -> Results:
        """Trains the task over all ranks and hands it over; results: the last logged values."""
        context, engine, settings, config = self.context, self.context.engine, self.context.config, self.config
        task = self.task()
        ordinals = context.index.split(getattr(settings.data, self.split))
        plan = Plan(ordinals, context.index.shard_of[ordinals], settings.seed, config.global_batch)
        share = share_of(engine.rank, engine.world_size, config.global_batch, settings.engine.micro_batch)
        total = total_steps(config, self.name, plan)
        fill = _mean_colour(task)  # before an engine may have the weights in parts
        for_training(task, context.kind)
        features = kept_features(context, task)

        last: dict[str, Any] = {}
        engine.prepare(task, build_optimizer(task, config), config.clip_norm)
        checkpoints = Checkpointer(
            self.folder / "checkpoints",
            engine,
            fingerprint=context.fingerprint,
            config=context.settings,
            every=settings.checkpoint.every,
            keep=settings.checkpoint.keep,
            notes=last,  # a run that is killed behind its last checkpoint has its results there
            timeout=settings.engine.timeout,
        )
        start = self._start(checkpoints, last)
        batches = training_stream(
            context.reader, plan, share, start, total, self.crop(), settings.data, fill, self.target(), features
        )
        with progress(self.name, total, "steps", engine.is_main) as advance, features or nullcontext():

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
            self.hand_over({k.removeprefix(prefix): value for k, value in state.items() if k.startswith(prefix)})
        return Results(others={key: value for key, value in last.items() if key != "lr"})

    def _start(self, checkpoints: Checkpointer, last: dict[str, Any]) -> int:
        """The steps that are done, and into `last` what was logged by then."""
        context = self.context
        if not context.resume:
            if context.engine.any(checkpoints.folder.exists()):
                context.say(f"{self.name}: starts over; there is an interrupted one, which --resume would go on with")
                context.engine.barrier("all ranks to see the interrupted stage")
                if context.engine.is_main:
                    shutil.rmtree(checkpoints.folder, ignore_errors=True)
            return 0
        found = checkpoints.resume()
        if found is None:
            return 0
        now, before = context.engine.world_size, found.world_size
        changed = "" if now == before else f", on {now} process{'es' if now > 1 else ''} in place of {before}"
        context.say(f"{self.name}: resumed after step {found.step}{changed}")
        last.update(found.notes)
        return found.step

    @classmethod
    def lacks(cls, config: Config, index: Index, world_size: int) -> Iterator[EsolError]:
        """A global batch that the processes cannot share, or that the split cannot fill."""
        batch = cls.own(config).global_batch
        try:
            ordinals = index.split(getattr(config.data, cls.split))
            share_of(0, world_size, batch, config.engine.micro_batch)
            Plan(ordinals, index.shard_of[ordinals], config.seed, batch)
        except EsolError as error:
            yield type(error)(f"{cls.name}: {error}")


class MaskTrainingStage(TrainingStage):
    """A stage that learns from label maps that another stage has made of the photos of data.mask_split."""

    split = "mask_split"
    shaped_by: ClassVar[tuple[str, ...]] = ("data.mask_split", "data.damaged")
    config: CropConfig

    def crop(self) -> Crop:
        """Photo and label map are scaled by a factor, and cropped together."""
        return Crop(self.config.crop, scale=self.config.scale)

    def made_by(self, stage: str, member: str) -> Target:
        """The label maps of a stage."""
        return partial(StageShards(self.context, stage).label_map, member=member)


def total_steps(config: TrainConfig, name: str, plan: Plan) -> int:
    """Optimizer steps of a stage's duration."""
    return Duration.parse(config.duration, f"{name}.duration").steps(config.global_batch, plan.steps_per_epoch)


def _mean_colour(task: Task) -> tuple[int, int, int]:
    """RGB 0..255, what surrounds photos that are smaller than the crop: normalisation turns it into zeros."""
    backbone = next(module for module in task.modules() if isinstance(module, Backbone))
    red, green, blue = backbone.mean.flatten().round().int().tolist()
    return red, green, blue
