"""Stages irn_labels, irn, irn_mean and irn_masks: IRNet, and a random walk that its class boundaries hold up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor
from torch.autograd.function import once_differentiable

from esol.base.files import atomic_write
from esol.base.schema import key
from esol.config import Auto, BackboneConfig, Config, CrfConfig, PairConfig, WalkConfig
from esol.data.samples import Batch
from esol.models.irn_net import STRIDE, IrnNet
from esol.models.regrid import squeeze_to_grid
from esol.ops.pairs import at_once, boundary_affinity, offsets_on, pair_labels, pair_offsets, pair_places, pair_windows
from esol.ops.pseudo_labels import irn_labels, irn_scores
from esol.pipeline.cam import initial_backbone, new_backbone
from esol.pipeline.inference import InferenceStage, Sample, Tally
from esol.pipeline.labels import LabelStage
from esol.pipeline.masks import MaskStage
from esol.pipeline.registry import register
from esol.pipeline.scores import Results
from esol.pipeline.training import MaskTrainingStage, Target
from esol.pipeline.weights import WEIGHTS, restore
from esol.training.losses import affinity_losses
from esol.training.task import ParameterGroup, Task


@dataclass(frozen=True)
class IrnLabelsConfig:
    """IRN's label synthesis: the CRF on hard seeds at a high and at a low threshold."""

    foreground: float | Auto = key("auto", low=0, high=1)  # a class at this threshold is that class; IRN has 0.30
    background: float | Auto = key("auto", low=0, high=1)  # background at both is background; the rest void; IRN: 0.05
    # of a label that the CRF starts from
    certainty: float = key(0.7, low=0.01, high=0.99, unit="probability of a hard label")
    crf: CrfConfig = field(default_factory=CrfConfig)


@dataclass(frozen=True)
class IrnConfig(PairConfig):
    """IRNet. Momentum 1e-4 is what IRN really trains with: it passes the weight decay in that place."""

    duration: str = key("3 epochs, 2000 to 100000 images")
    # photos that one step learns from
    global_batch: int = key(32, low=1, high=65536, unit="images per optimizer step, over all ranks")
    # what lr is for
    lr_batch: int = key(32, low=1, high=65536, unit="images that lr is for; another global_batch scales it")
    momentum: float = key(1e-4, low=0, high=1)
    scale: tuple[float, float] = key((0.5, 1.5), low=0.1, high=8, unit="times the photo's size")  # drawn uniformly
    crop: int = key(512, low=16, high=4096, unit="pixels")  # side of the square training crops
    radius: int = key(10, low=2, high=64, unit="grid pixels")  # within which two pixels are a pair
    # the rate of the displacement branch
    displacement_lr: float = key(10.0, low=0, high=1000, unit="times lr, for the displacement branch")


@dataclass(frozen=True)
class IrnMasksConfig(WalkConfig):
    """Walk of the class maps, boundaries taken out, on IRNet's affinities; alpha 0: no background walks (IRN)."""


@register
class IrnLabels(LabelStage):
    """IRN: dense CRF on the seeds at a high and a low threshold."""

    name = "irn_labels"
    after = "psa_masks"
    section = IrnLabelsConfig
    version = 2
    config: IrnLabelsConfig

    def labels(self, images: Sequence[Tensor], maps: Sequence[Tensor], classes: Sequence[Tensor]) -> list[Tensor]:
        config = self.config
        return irn_labels(images, maps, classes, config.crf, config.foreground, config.background, config.certainty)


class IrnTask(Task):
    """(positive + negative) / 2 + (displacement of foreground + of background pairs) / 2; hands over the network.

    Each is a mean over the image's own pairs, 0 where it has none, then over the images. IRN's public code has the mean
    over all pairs of the batch, and leaves out pairs that start at the border, less than the radius from it.
    """

    handover: IrnNet

    def __init__(self, net: IrnNet, config: IrnConfig) -> None:
        super().__init__()
        self.handover = net
        self.config = config

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """losses: loss, positive, negative, displacement_fg, displacement_bg; no report."""
        radius = self.config.radius
        edge, displacement = self.handover(batch["image"])
        pairs = pair_labels(batch["target"][:, ::STRIDE, ::STRIDE], radius)
        with torch.autocast(edge.device.type, enabled=False):
            affinity = boundary_affinity(edge[:, 0].float().sigmoid(), radius)
            background, foreground, negative = (loss.mean() for loss in affinity_losses(affinity, pairs))
            positive = (background + foreground) / 2
            of_background = displacement_loss(displacement, pairs[0], radius, apart=False).mean()
            of_foreground = displacement_loss(displacement, pairs[1], radius, apart=True).mean()
            loss = (positive + negative) / 2 + (of_foreground + of_background) / 2
        return {
            "loss": loss,
            "positive": positive,
            "negative": negative,
            "displacement_fg": of_foreground,
            "displacement_bg": of_background,
        }, {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The boundary branch at the base rate, the displacement branch at displacement_lr times it."""
        net = self.handover
        return [
            ParameterGroup("edge", list(net.edge.parameters())),
            ParameterGroup(
                "displacement", list(net.displacement.parameters()), lr_multiplier=self.config.displacement_lr
            ),
        ]


def displacement_loss(displacement: Tensor, pairs: Tensor, radius: int, apart: bool) -> Tensor:
    """Mean of |D_i - D_j - (j - i)|, or of |D_i - D_j|, over an image's pairs and both axes -> (B,); 0 without pairs.

    displacement (B, 2, h, w), (dy, dx) in grid pixels, computed in float32 or wider; pairs bool (B, K, h, w). apart:
    both pixels point at one place, as in one instance; else both are displaced alike, as in the background.
    """
    wide = displacement if displacement.dtype == torch.float64 else displacement.float()
    total: Tensor = _PairDisplacement.apply(wide, pairs, radius, apart)
    return total / (2 * pairs.sum((1, 2, 3))).clamp_min(1)


class _PairDisplacement(torch.autograd.Function):
    """Sums over the pairs of an image. The gradient is a sum of signs: it is made on the way, and no pair is kept."""

    @staticmethod
    def forward(ctx: Any, displacement: Tensor, pairs: Tensor, radius: int, apart: bool) -> Tensor:
        summed = _displacement_at_once if at_once(displacement) else _displacement_by_offset
        total, signs = summed(displacement, pairs, radius, apart)
        ctx.save_for_backward(signs)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (signs,) = ctx.saved_tensors
        return signs * upstream[:, None, None, None], None, None, None


def _displacement_by_offset(displacement: Tensor, pairs: Tensor, radius: int, apart: bool) -> tuple[Tensor, Tensor]:
    """The sums (B,), and their gradients (B, 2, h, w)."""
    total = displacement.new_zeros(len(displacement))
    signs = torch.zeros_like(displacement)
    for k, offset in enumerate(pair_offsets(radius)):
        first, second = pair_windows(offset, *displacement.shape[2:])
        error = displacement[first] - displacement[second]
        if apart:
            for axis in (0, 1):
                error[:, axis] -= offset[axis]
        error *= pairs[:, k : k + 1][first]
        total += error.abs().sum((1, 2, 3))
        error.sign_()
        signs[first] += error
        signs[second] -= error
    return total, signs


def _displacement_at_once(displacement: Tensor, pairs: Tensor, radius: int, apart: bool) -> tuple[Tensor, Tensor]:
    """What _displacement_by_offset gives, in one gather. Its sums are of whole numbers: their order says nothing."""
    height, width = displacement.shape[2:]
    _, second = pair_places(radius, height, width, displacement.device)
    flat = displacement.flatten(2)
    error = flat[:, :, None] - flat[:, :, second]
    if apart:
        error = error - offsets_on(radius, displacement.device).t()[:, :, None]
    error = error * pairs.flatten(2)[:, None]
    signs = error.sign()
    pulled = torch.zeros_like(flat).index_add_(2, second.flatten(), signs.flatten(2))
    return error.abs().sum((1, 2, 3)), (signs.sum(2) - pulled).view_as(displacement)


@register
class Irn(MaskTrainingStage):
    """IRNet on the labels of irn_labels; its backbone never learns."""

    name = "irn"
    after = "irn_labels"
    section = IrnConfig
    version = 2
    needs = ("classify", "irn_labels")
    shaped_by = ("data.mask_split", "data.damaged", "model")
    config: IrnConfig

    def task(self) -> Task:
        backbone = initial_backbone(self.context.config, len(self.context.index.classes), freeze="all")
        return IrnTask(IrnNet(backbone), self.config)

    def target(self) -> Target:
        return self.made_by("irn_labels", "label.png")

    @classmethod
    def weights(cls, config: Config) -> tuple[str, BackboneConfig]:
        return "model", config.model


def _trained(stage: InferenceStage[Any]) -> IrnNet:
    net = IrnNet(new_backbone(stage.context.config, freeze="all"))
    return restore(net, stage.context.config, "irn")


@register
class IrnMean(InferenceStage[Tensor]):
    """The mean displacement over the photos that IRNet learned from, taken out of what it predicts.

    No stage of ours reads it: it is for whoever separates instances with IRNet. results: dy, dx in grid pixels (stride
    4), the mean over the photos of each photo's mean.
    """

    name = "irn_mean"
    after = "irn"
    needs = ("irn",)
    default = False
    makes = "weights"
    produces = (WEIGHTS,)
    splits = ("mask_split",)
    labelled = False
    writes = False

    def open(self) -> None:
        self.net = _trained(self).to(self.context.engine.device).eval()

    def make(self, samples: Sequence[Sample]) -> list[Tensor]:
        found = []
        for sample in samples:
            with self.context.engine.autocast():
                image = squeeze_to_grid(sample.image.to(self.context.engine.device), STRIDE)
                found.append(self.net(image)[1][0].double().mean((1, 2)))
        return found

    def count(self, sample: Sample, made: Tensor) -> Tally:
        return {"sum": np.array((*made.tolist(), 1.0))}

    def results(self, tally: Tally) -> Results:
        dy, dx, photos = tally["sum"].tolist()
        self.net.displacement_mean.copy_(torch.tensor((dy, dx)) / photos)
        state = {key: value.cpu().contiguous() for key, value in self.net.state_dict().items()}
        atomic_write(self.folder / WEIGHTS, save(state))
        return Results(others={"dy": dy / photos, "dx": dx / photos})


@register
class IrnMasks(MaskStage):
    """The class maps after a walk that boundaries hold up; the boundary is the mean over the photo and its mirror."""

    name = "irn_masks"
    after = "irn_mean"
    section = IrnMasksConfig
    version = 5
    needs = ("localize", "irn")
    refines = True
    config: IrnMasksConfig

    def open(self) -> None:
        super().open()
        self.net = self.context.ready(_trained(self))

    def scores_of(self, images: Sequence[Tensor], maps: Sequence[dict[str, NDArray[Any]]]) -> list[Tensor]:
        edges = []
        for image in images:
            inputs = squeeze_to_grid(image, STRIDE)
            with self.context.engine.autocast():
                logits = self.net(torch.cat((inputs, inputs.flip(3))))[0][:, 0].float()
            edges.append(((logits[0] + logits[1].flip(1)) / 2).sigmoid())
        low = [torch.from_numpy(own["stride4"]).to(image.device) for own, image in zip(maps, images, strict=True)]
        return irn_scores(low, edges, [(image.shape[1], image.shape[2]) for image in images], self.config)
