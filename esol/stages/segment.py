"""Stage segment: DeepLab-v2 on label maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esol.base.errors import ConfigError, EsolError
from esol.base.palette import VOID
from esol.base.schema import key, one_of
from esol.config import BackboneConfig, Config, CropConfig, PredictionConfig
from esol.data.index import Index
from esol.data.samples import Batch
from esol.data.transforms import decode
from esol.models.backbones import build_backbone
from esol.models.deeplab import DeepLab
from esol.models.regrid import scale_to_grid
from esol.pipeline import records
from esol.pipeline.made import TrueMasks
from esol.pipeline.masks import highest, judged_masks, mask_stages, spoken
from esol.pipeline.model_file import ModelInfo, write_model
from esol.pipeline.registry import register
from esol.pipeline.saliency import without
from esol.pipeline.scores import Results
from esol.pipeline.training import MaskTrainingStage, Target
from esol.pipeline.weights import WEIGHTS, initial_weights
from esol.training.losses import segmentation_loss
from esol.training.noise import unbalanced, without_highest_losses, without_the_doubted
from esol.training.task import ParameterGroup, Task

MAX_ROUNDS = 3
FILTERED = 0.4  # of the training behind segment.noise.after: where segment.noise.filter is reached
ROUND = "round_"  # of segment.rounds: what the names of the stages before the last network begin with


def masks_of_round(number: int) -> str:
    """The stage of the masks that a round's network makes."""
    return f"{ROUND}{number}_masks"


def _first_masks() -> list[str]:
    """The stages whose masks the first network may learn from, in order."""
    return [name for name in mask_stages() if not name.startswith(ROUND)]


@dataclass(frozen=True)
class NoiseConfig:
    """Masks are wrong in places: which of their pixels DeepLab does not believe, once it has learned something.

    The share of its training before which it believes all of them is `after`.
    """

    # in which every pixel is believed
    after: float = key(0.3, low=0, high=1, unit="share of the training, from its beginning")
    # those of the highest loss, of background and objects alike, which are left out; the share grows for a while
    filter: float = key(0.0, low=0, high=0.9, unit="share of a crop's pixels")
    # pixels of which the network is sure that they are another label of the photo: off, ignore or correct them
    doubt: Literal["off", "ignore", "correct"] = key("correct")
    sure: tuple[float, float] = key((0.9, 0.7), low=0, high=1)  # probability at which it is, at first and in the end

    @property
    def changes(self) -> bool:
        """Whether any label may change."""
        return self.filter > 0 or self.doubt != "off"


@dataclass(frozen=True)
class SegmentConfig(CropConfig):
    """DeepLab-v2 on masks; but for noise the values are its public codes' for VOC and a start from ImageNet."""

    masks: str = key("auto")  # what it learns from: auto (the judge's choice), a stage that makes masks, or truth
    model: BackboneConfig = field(default_factory=lambda: BackboneConfig("resnet101", output_stride=8, freeze="none"))
    # how far apart the taps of each branch of ASPP are
    rates: tuple[int, ...] = key((6, 12, 18, 24), low=1, high=256, unit="grid pixels, dilation of ASPP's branches")
    duration: str = key("30000 steps")
    # photos that one step learns from
    global_batch: int = key(10, low=1, high=65536, unit="images per optimizer step, over all ranks")
    # what lr is for
    lr_batch: int = key(10, low=1, high=65536, unit="images that lr is for; another global_batch scales it")
    lr: float = key(2e-4, low=0, high=100)
    weight_decay: float = key(5e-4, low=0, high=1)  # pull of the weights towards zero
    # the rate of ASPP
    head_lr: float = key(10.0, low=0, high=1000, unit="times lr, for ASPP; its biases twice that, without decay")
    scale: tuple[float, float] = key((0.5, 2.0), low=0.1, high=8, unit="times the photo's size")  # drawn uniformly
    crop: int = key(321, low=16, high=4096, unit="pixels")  # side of the square training crops
    # sizes at which a crop is looked at in training
    inputs: tuple[float, ...] = key((1.0, 0.75, 0.5), low=0.1, high=4, unit="times the crop, a loss each")
    balance: bool = key(True)  # foreground's and background's means weigh the same (DSRG); ImageNet starts want it
    noise: NoiseConfig = field(default_factory=NoiseConfig)  # what is done about masks that are wrong in places
    # networks in a row: what each says of the photos that it learned from is among the masks that the next learns from
    rounds: int = key(1, low=1, high=MAX_ROUNDS, runtime=True)

    def check(self, where: str) -> None:
        super().check(where)
        for name in ("rates", "inputs"):
            if not getattr(self, name):
                raise ConfigError(f"{where}.{name} is empty: give at least one")
        if self.model.output_stride != 8:
            raise ConfigError(f"{where}.model.output_stride = {self.model.output_stride}: DeepLab-v2 has 8")


class SegmentTask(Task):
    """The sum of the cross entropies of the crop at every input scale and of their maximum; hands over the network.

    The label of a logit is that of the pixel that it looks at. Source: DeepLab-v2's training by its public codes, with
    three inputs and four losses; with one input there is one loss.
    """

    handover: DeepLab

    def __init__(self, net: DeepLab, config: SegmentConfig) -> None:
        super().__init__()
        self.handover = net
        self.config = config

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """losses: loss; report, of the largest input: accuracy, the share of labelled pixels that its logits get right.

        Where config.noise changes labels, doubted too: the share of pixels whose label it does not believe.
        """
        net, labels = self.handover, batch["target"]
        inputs = sorted(self.config.inputs, reverse=True)
        logits = [net(scale_to_grid(batch["image"], scale, net.backbone.stride)) for scale in inputs]
        with torch.autocast(labels.device.type, enabled=False):
            logits = [x if x.dtype == torch.float64 else x.float() for x in logits]
            size = (logits[0].shape[2], logits[0].shape[3])
            highest = logits[0]
            for x in logits[1:]:
                highest = torch.maximum(highest, F.interpolate(x, size, mode="bilinear", align_corners=True))
            each = logits if len(logits) == 1 else [*logits, highest]
            believed = [self._believed(x, batch) for x in each]
            losses = [segmentation_loss(x, y, self.config.balance) for x, y in zip(each, believed, strict=True)]
            loss = torch.stack(losses).sum(0).mean()
        truth = labels_on(labels, size)
        known = truth != VOID
        right = (((logits[0].argmax(1) == truth) & known).sum((1, 2)) / known.sum((1, 2)).clamp_min(1)).mean()
        report = {"accuracy": right}
        if self.config.noise.changes:
            report["doubted"] = (believed[0] != truth).float().mean((1, 2)).mean()
        return {"loss": loss}, report

    def _believed(self, logits: Tensor, batch: Batch) -> Tensor:
        """The labels at the logits' pixels, without those that config.noise does not believe, or with others."""
        noise, labels = self.config.noise, labels_on(batch["target"], logits.shape[2:])
        if not noise.changes or "done" not in batch:
            return labels
        done = ((batch["done"] - noise.after) / max(1 - noise.after, 1e-6)).clamp(0, 1)  # of what lies behind `after`
        if noise.doubt != "off":
            first, last = noise.sure
            sure = torch.where(done > 0, first + (last - first) * done, 2.0)
            plain = unbalanced(logits.detach(), labels) if self.config.balance else logits
            labels = without_the_doubted(plain, labels, batch["labels"], sure, noise.doubt == "correct")
        if noise.filter:
            labels = without_highest_losses(logits, labels, noise.filter * (done / FILTERED).clamp_max(1))
        return labels

    def parameter_groups(self) -> list[ParameterGroup]:
        """The backbone at the base rate; ASPP's weights at head_lr times it, its biases at twice that without decay."""
        net, rate = self.handover, self.config.head_lr
        body = [p for p in net.backbone.parameters() if p.requires_grad]
        weights = [p for name, p in net.aspp.named_parameters() if name.endswith("weight")]
        biases = [p for name, p in net.aspp.named_parameters() if name.endswith("bias")]
        groups = [
            ParameterGroup("aspp", weights, lr_multiplier=rate),
            ParameterGroup("aspp_bias", biases, lr_multiplier=2 * rate, weight_decay=False),
        ]
        return [ParameterGroup("backbone", body), *groups] if body else groups


def labels_on(labels: Tensor, size: tuple[int, ...]) -> Tensor:
    """Label maps (B, H, W) at the pixels that a grid of `size`, its corners on the image's, looks at: (B, *size)."""
    rows, columns = (
        torch.linspace(0, side - 1, points, device=labels.device).round().long()
        for side, points in zip(labels.shape[1:], size, strict=True)
    )
    return labels[:, rows][..., columns]


@register
class Segment(MaskTrainingStage):
    """DeepLab-v2 on pseudo masks, or on the true ones; hands over a file that says how to predict with it.

    round_number: which of segment.rounds it is, the last one for `segment` itself.
    """

    name = "segment"
    after = masks_of_round(MAX_ROUNDS - 1)
    round_number: ClassVar[int] = MAX_ROUNDS
    makes = "model"
    section: ClassVar[type[Any] | None] = SegmentConfig
    version = 3
    config: SegmentConfig

    @classmethod
    def consumes(cls, config: Config) -> tuple[str, ...]:
        """The masks that it is told to learn from, or all that the judge chooses from, and those of earlier rounds."""
        given, rounds = config.section(SegmentConfig).masks, [masks_of_round(n) for n in range(1, cls.round_number)]
        if given == "truth":
            return ()
        first = [given] if given != "auto" else [name for name in _first_masks() if name in config.stages]
        return (*(first or _first_masks()[:1]), *(name for name in rounds if name in config.stages))

    @classmethod
    def brings(cls, config: Config) -> tuple[str, ...]:
        """The rounds before the last one, and their masks."""
        earlier = range(1, config.section(SegmentConfig).rounds)
        return tuple(name for n in earlier for name in (f"{ROUND}{n}", masks_of_round(n)))

    @classmethod
    def weights(cls, config: Config) -> tuple[str, BackboneConfig]:
        return "segment.model", config.section(SegmentConfig).model

    @classmethod
    def check(cls, config: Config) -> None:
        own = config.section(SegmentConfig)
        one_of(own.masks, ("auto", *reversed(_first_masks()), "truth"), "segment.masks")
        if own.masks == "truth" and own.rounds > 1:
            raise ConfigError(f"segment.rounds = {own.rounds}: true masks get no better by rounds; use 1")

    @classmethod
    def lacks(cls, config: Config, index: Index, world_size: int) -> Iterator[EsolError]:
        """True masks of all photos, where it learns from them."""
        yield from super().lacks(config, index, world_size)
        if config.section(SegmentConfig).masks == "truth":
            yield from without(index, "mask.png", index.split(config.data.mask_split), "segment.masks = truth")

    def task(self) -> Task:
        torch.manual_seed(self.context.config.seed)
        backbone = build_backbone(self.config.model)
        net = DeepLab(backbone, len(self.context.index.classes) + 1, self.config.rates)
        self.source, self.started = self._source(), initial_weights(self.config.model)
        self.context.say(f"{self.name}: learns from {self.source}, starts from {self.started}")
        drawn = self.source == "truth"  # nothing is wrong with masks that people drew
        return SegmentTask(net, replace(self.config, noise=NoiseConfig(doubt="off")) if drawn else self.config)

    def target(self) -> Target:
        return TrueMasks(self.context.reader) if self.source == "truth" else self.made_by(self.source, "mask.png")

    def hand_over(self, state: dict[str, Tensor]) -> None:
        info = ModelInfo(
            classes=self.context.index.classes,
            backbone=self.config.model.backbone,
            rates=self.config.rates,
            evaluate=self.context.config.section(PredictionConfig),
            photo_side=self._photo_side(),
            masks=self.source,
            initial_weights=self.started,
            precision=self.context.precision,
        )
        write_model(self.folder / WEIGHTS, state, info)

    def run(self) -> Results:
        found, photos = super().run(), len(self.context.index.split(self.context.config.data.mask_split))
        found.others |= {"photos": photos, "masks": self.source, "initial_weights": self.started}
        return found

    def _source(self) -> str:
        """The stage whose masks DeepLab learns from, or "truth"; of several the judge's first, and the run says so."""
        config, among = self.context.config, self.consumes(self.context.config)
        if len(among) < 2:
            return among[0] if among else "truth"
        judged = judged_masks(config, records.results(self.context.run_dir))
        judged = {name: number for name, number in judged.items() if name in among}
        chosen = highest(judged) or among[-1]
        by = f", by the judge: {spoken(judged)}" if judged else ""
        self.context.say(f"{self.name}: takes {chosen}{by}")
        return chosen

    def _photo_side(self) -> int:
        """Median long side of a hundred photos that it learns from, evenly spread."""
        reader, ordinals = self.context.reader, self.context.index.split(self.context.config.data.mask_split)
        chosen = ordinals[np.linspace(0, len(ordinals) - 1, min(100, len(ordinals))).astype(int)].tolist()
        return int(np.median([max(decode(reader.image(o), reader.name(o)).shape[1:]) for o in chosen]))
