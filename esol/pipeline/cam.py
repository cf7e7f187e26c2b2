"""The stages that learn from image-level labels: each trains a head, all on one backbone, that makes class maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from esol.base.errors import ConfigError, DataError, EsolError
from esol.config import BackboneConfig, Config, LabelConfig, MapsConfig, ModelConfig
from esol.data.index import Index
from esol.data.transforms import Crop
from esol.models.backbones import Backbone, build_backbone
from esol.models.cam_net import CamNet
from esol.models.heads import Heads
from esol.ops.class_maps import ClassMaps, class_maps
from esol.ops.seeds import best_class, seed
from esol.pipeline import records
from esol.pipeline.context import Context
from esol.pipeline.inference import InferenceStage, Sample, draw
from esol.pipeline.registry import table
from esol.pipeline.scores import Results
from esol.pipeline.training import TrainingStage
from esol.pipeline.weights import restore
from esol.report.pictures import Pixels, heat, paint
from esol.training.losses import absence_weights

PAPER_THRESHOLD = 0.15  # IRN's evaluation threshold: reported beside the best one, and drawn by where none is known


class CamStage(TrainingStage):
    """A stage that trains a head. source: what the head's class maps are called."""

    source: ClassVar[str]
    shaped_by = ("data.train_split", "data.long_side", "data.crop", "data.damaged", "model")
    config: LabelConfig

    @classmethod
    def head(cls, config: Config, heads: Heads, num_classes: int) -> torch.nn.Module:
        """A new head of this stage, behind those of the stages before it; the first has the backbone."""
        raise NotImplementedError

    def crop(self) -> Crop:
        """The photo is scaled to a long side, as IRN has it."""
        data = self.context.config.data
        return Crop(data.crop, data.long_side)

    def absence(self) -> Tensor | None:
        """The weights of absent classes over the training split, if the stage's loss has them."""
        if not self.config.balance:
            return None
        train = self.context.index.split(self.context.config.data.train_split)
        return absence_weights(torch.from_numpy(self.context.reader.occurrence(train)), len(train))

    def heads(self) -> Heads:
        """Those of the stages before this one, as they were handed over."""
        return trained_heads(self.context.config, len(self.context.index.classes), before=self.name)

    def run(self) -> Results:
        """Trains; then draws by what was handed over, since an engine may have the task's weights in parts."""
        found = super().run()
        if self.context.engine.is_main:
            drawing = _Drawing(self.context)
            heads = trained_heads(self.context.config, len(self.context.index.classes), until=self.name)
            drawing.net = self.context.ready(heads)
            draw(drawing, self.name)
        return found

    @classmethod
    def check(cls, config: Config) -> None:
        """Only classify can do without W1."""
        if cls.after and config.model.kernel_channels == 0:
            raise ConfigError(
                f"model.kernel_channels = 0 is the plain CAM network, which {cls.name} cannot use: set it above 0 or "
                "leave the stage out of stages"
            )

    @classmethod
    def lacks(cls, config: Config, index: Index, world_size: int) -> Iterator[EsolError]:
        """Some photo of the training split must show something."""
        yield from super().lacks(config, index, world_size)
        split = index.split(config.data.train_split)
        if index.labels is not None and len(split) and not index.labels[split].any():
            yield DataError(
                f"data.train_split = {config.data.train_split}: none of its {len(split)} photos in {index.root} has a "
                "label, so that there is nothing to learn; give labels to those that show an object, and leave the "
                "others' empty"
            )


class MapStage(InferenceStage[dict[str, ClassMaps]]):
    """A stage that makes class maps with all trained heads."""

    net: Heads

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.thresholds: dict[str, float] = {}  # by source, of the seeds in pictures

    def make(self, samples: Sequence[Sample]) -> list[dict[str, ClassMaps]]:
        """The maps of every head, by source."""
        device, maps = self.context.engine.device, self.context.config.section(MapsConfig)
        images = [sample.image.to(device) for sample in samples]
        labels = [torch.from_numpy(sample.labels).to(device) for sample in samples]
        with self.context.engine.autocast():
            return class_maps(
                images,
                labels,
                self.net,
                scales=maps.scales,
                flip=maps.flip,
                long_side=maps.long_side,
                tell=lambda what: self.context.engine.beat(f"{what} of {samples[0].key}"),
            )

    def tiles(self, sample: Sample, made: dict[str, ClassMaps]) -> dict[str, Pixels]:
        """Every head's best map, and the seeds of the last."""
        pixels = sample.pixels
        found = {
            source: heat(pixels, best_class(own.full, own.classes)[1].cpu().numpy()) for source, own in made.items()
        }
        last, own = list(made.items())[-1]
        threshold = self.thresholds.get(last, PAPER_THRESHOLD)
        seeds = seed(own.full, own.classes, threshold).cpu().numpy()
        return {**found, f"seeds of {last} at {threshold:.2f}": paint(pixels, seeds)}


class _Drawing(MapStage):
    """The pictures of a training stage."""

    name = "pictures"


def ran_with_maps(run_dir: Path) -> Config:
    """The config by which a finished run's class maps are made: localize's, or that of its last head."""
    return records.ran_with(run_dir, "localize", *(stage.name for stage in reversed(cam_stages())))


def cam_stages() -> list[type[CamStage]]:
    """All that are known, in order."""
    return [stage for stage in table().values() if issubclass(stage, CamStage)]


def new_net(config: Config, num_classes: int, pretrained: bool) -> CamNet:
    """The network of the `model` section; random weights follow from the seed alone."""
    torch.manual_seed(config.seed)
    return CamNet(build_backbone(config.model, pretrained), num_classes, config.model.kernel_channels)


def trained_heads(config: Config, num_classes: int, until: str = "", before: str = "") -> Heads:
    """The heads of the run's stages as they were handed over, up to one stage, or before one, or of all."""
    found = Heads()
    for stage in cam_stages():
        if stage.name == before:
            break
        if stage.name in config.stages or not found:  # the first of them holds the backbone
            found.add(stage.source, restore(stage.head(config, found, num_classes), config, stage.name))
        if stage.name == until:
            break
    return found


def initial_backbone(config: Config, num_classes: int, **changes: Any) -> Backbone:
    """As model.weights has it, with some of the section's fields changed; where there are no weights, as classify
    trained it."""
    model: ModelConfig = replace(config.model, **changes)
    torch.manual_seed(config.seed)
    if model.weights != "none":
        return build_backbone(model, pretrained=True)
    backbone = build_backbone(model, pretrained=False)
    backbone.load_state_dict(trained_heads(config, num_classes, until="classify").net.backbone.state_dict())
    torch.manual_seed(config.seed)  # building the trained network has drawn from it
    return backbone


def new_backbone(config: Config, **changes: Any) -> Backbone:
    """The same network without weights, for one that is restored."""
    model: BackboneConfig = replace(config.model, **changes)
    return build_backbone(model, pretrained=False)
