"""The tasks that only the ablations know: Expansion and Shrinkage as they might have been."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esol.data.samples import Batch
from esol.models.cam_net import CamNet, pool
from esol.models.heads import Decision, Expansion, Shrinkage
from esol.stages.expand import ExpandConfig, expansion
from esol.stages.shrink import ShrinkConfig, ShrinkTask
from esol.training.head import HeadTask
from esol.training.losses import classification_and_area, classification_loss
from esol.training.task import ParameterGroup


class Readout(HeadTask):
    """L_cls + lambda * L_area on an Expansion's features without a second sampler: V learns; W1 where W2 would.

    The offsets stay. The maps are clipped as config says from then on.
    """

    handover: Expansion

    def __init__(self, net: CamNet, expansion: Expansion, config: ShrinkConfig) -> None:
        super().__init__(net)
        self.handover = expansion.requires_grad_(False)
        self.handover.clip = config.clip
        self._learning = [expansion.classifier, *([expansion.kernel] if config.learn_kernel else [])]
        for parameter in self._learning:
            parameter.requires_grad_(True)
        self.config = config

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        maps = self.handover.class_maps(self.handover.features(self.features(batch)))
        config = self.config
        return classification_and_area(maps, batch["labels"], config.area, config.area_term, self.absence), {}

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("head", self._learning)]


class Following(ShrinkTask):
    """Shrinkage on an Expansion that another task moves on in between: its own frozen copy is kept up to date."""

    def __init__(self, net: CamNet, leader: Expansion, config: ShrinkConfig) -> None:
        super().__init__(net, copy.deepcopy(leader), config)
        self._leader = (leader,)  # in a tuple it is no part of this task: its parameters learn elsewhere

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self.expansion.offset.load_state_dict(self._leader[0].offset.state_dict())
        return super().forward(batch)


class Climb(HeadTask):
    """Offsets that maximise the classification loss of a handover's maps; what else the handover has stays."""

    handover: Expansion | Fields

    def __init__(self, net: CamNet, config: ExpandConfig) -> None:
        super().__init__(net)
        self.config = config

    def maps(self, x: Tensor) -> Tensor:
        """X (B, Cf, h, w) -> class maps (B, C, h, w)."""
        return self.handover.class_maps(self.handover.features(x))

    def loss(self, maps: Tensor, labels: Tensor) -> Tensor:
        """What is maximised, a scalar."""
        return classification_loss(pool(maps), labels, self.config.classes, self.absence).mean()

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        maps = self.maps(self.features(batch))
        with torch.autocast(maps.device.type, enabled=False):
            return {"loss": -self.config.alpha * self.loss(maps, batch["labels"])}, {}

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("offset", [p for p in self.handover.parameters() if p.requires_grad])]


class Further(Climb):
    """Expansion's offsets go on, by the loss of the maps of the Shrinkage behind them, which stays as it is."""

    handover: Expansion

    def __init__(self, net: CamNet, expansion: Expansion, shrinkage: Shrinkage, config: ExpandConfig) -> None:
        super().__init__(net, config)
        self.shrinkage = shrinkage.requires_grad_(False)
        self.handover = expansion.requires_grad_(False)
        self.handover.offset.requires_grad_(True)

    def maps(self, x: Tensor) -> Tensor:
        return self.shrinkage.class_maps(self.handover.features(x))


class Regions(Climb):
    """Expansion whose loss is the mean over n x n regions, pooled and labelled as the image is; 0 = over positions."""

    handover: Expansion

    def __init__(self, net: CamNet, config: ExpandConfig, decision: Decision | None, regions: int) -> None:
        super().__init__(net, config)
        self.handover = expansion(decision or net, config)
        self.regions = regions

    def loss(self, maps: Tensor, labels: Tensor) -> Tensor:
        logits = F.adaptive_avg_pool2d(maps.float(), self.regions) if self.regions else maps.float()
        return F.binary_cross_entropy_with_logits(logits, labels[:, :, None, None].expand_as(logits))


class Fields(nn.Module):
    """An Expansion for each class, all of the same W1 and V: each class's map is sampled by its own offsets."""

    def __init__(self, head: CamNet | Decision, config: ExpandConfig) -> None:
        super().__init__()
        self.each = nn.ModuleList(expansion(head, config) for _ in head.classifier)

    def features(self, x: Tensor) -> Tensor:
        """X (B, Cf, h, w) -> one F for each class, (C, B, K, h, w)."""
        return torch.stack([expansion.features(x) for expansion in self.each])

    def class_maps(self, features: Tensor) -> Tensor:
        """(C, B, K, h, w) -> class maps (B, C, h, w)."""
        maps = [own.class_maps(f)[:, c] for c, (own, f) in enumerate(zip(self.each, features, strict=True))]
        return torch.stack(maps, 1)


class FieldPerClass(Climb):
    """Expansion with an offset field for every class; a field sees the loss of its own class alone."""

    handover: Fields

    def __init__(self, net: CamNet, config: ExpandConfig, decision: Decision | None) -> None:
        super().__init__(net, config)
        self.handover = Fields(decision or net, config)
