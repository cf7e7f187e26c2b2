"""Stage classify: the CAM network on image-level labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esol.base.schema import key
from esol.config import BackboneConfig, Config, LabelConfig
from esol.data.reader import ShardReader
from esol.data.samples import Batch
from esol.models.cam_net import CamNet, pool
from esol.models.heads import Heads
from esol.pipeline.cam import CamStage, new_net
from esol.pipeline.registry import register
from esol.training.head import CamTask
from esol.training.losses import classification_loss
from esol.training.task import ParameterGroup, Task


@dataclass(frozen=True)
class ClassifyConfig(LabelConfig):
    """The CAM network on image-level labels."""

    duration: str = key("5 epochs, 6400 to 400000 images")
    # the rate of the new layers
    head_lr: float = key(10.0, low=0, high=1000, unit="times lr, for W1 and the classifier")


class ClassifyTask(CamTask):
    """Classification loss of GAP(V * relu(W1 * X)); hands over the whole network."""

    handover: CamNet
    absence: Tensor | None

    def __init__(self, net: CamNet, config: ClassifyConfig, absence: Tensor | None = None) -> None:
        """absence: the weights of absent classes in the classification loss."""
        super().__init__()
        self.register_buffer("absence", absence, persistent=False)
        self.handover = net
        self.head_lr = config.head_lr

    @property
    def net(self) -> CamNet:  # type: ignore[override]  # the same module, under the name that it is handed over by
        return self.handover

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """losses: loss; report: exact, the share of images whose labels are all right at probability .5."""
        logits = pool(self.handover.class_maps(self.features(batch)))
        with torch.autocast(logits.device.type, enabled=False):
            loss = classification_loss(logits, batch["labels"], absence=self.absence).mean()
        exact = ((logits.detach() > 0) == (batch["labels"] > 0.5)).all(1).float().mean()
        return {"loss": loss}, {"exact_match": exact}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The backbone's unfrozen part at the base rate; W1 and V at head_lr times it."""
        net = self.handover
        body = [p for p in net.backbone.parameters() if p.requires_grad]
        head = [net.classifier] if net.kernel is None else [net.kernel, net.classifier]
        groups = [ParameterGroup("head", head, lr_multiplier=self.head_lr)]
        return [ParameterGroup("backbone", body), *groups] if body else groups


@register
class Classify(CamStage):
    """The CAM network on image-level labels."""

    name = "classify"
    source = "cam"
    section = ClassifyConfig
    version = 3
    config: ClassifyConfig

    def task(self) -> Task:
        for line in odd_classes(self.context.reader, self.context.config.data.train_split):
            self.context.say(line)
        net = new_net(self.context.config, len(self.context.index.classes), pretrained=True)
        return ClassifyTask(net, self.config, self.absence())

    @classmethod
    def head(cls, config: Config, heads: Heads, num_classes: int) -> CamNet:
        return new_net(config, num_classes, pretrained=False)

    @classmethod
    def weights(cls, config: Config) -> tuple[str, BackboneConfig]:
        return "model", config.model


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
