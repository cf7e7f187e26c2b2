"""The rows `step` and `cam` of python -m benchmarks: classify and localize against code in the way of IRN's.

That is a ResNet-50 of stride 16 in float32, NCHW as PyTorch has it by itself, a photo at a time; written from what
IRN's public code does, none of which is here. Both have the same random weights, photos and crops, and the kernels that
an engine asks for: repeatable ones on a GPU, and no TF32 for float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.common import CLASSES
from benchmarks.deeplab_step import make_random_start_sound
from benchmarks.rows import Comparison, Photos
from esol.data.plan import sample_rng
from esol.data.samples import Batch
from esol.data.transforms import Crop, decode, training_crop
from esol.models.backbones import IMAGENET_MEAN, IMAGENET_STD
from esol.models.cam_net import CamNet
from esol.models.folded import for_training
from esol.models.heads import Heads
from esol.models.regrid import scale_to_grid
from esol.pipeline.cam import new_net
from esol.pipeline.context import Context
from esol.pipeline.crew import Crew
from esol.stages.classify import ClassifyTask
from esol.stages.localize import Localize
from esol.training.optim import build_optimizer

BATCH, CROP = 4, 512
SCALES = (0.5, 1.0, 1.5, 2.0)
RATE = 1e-2  # random networks run away at the recipe's .1
FILL = (124, 116, 104)
PRECISIONS = {"bf16": "bf16", "float32": "fp32"}


class IrnStyle(nn.Module):
    """The plain CAM network with the weights of ours; batch norm is frozen, and so are the stem and two stages."""

    def __init__(self, net: CamNet) -> None:
        super().__init__()
        body = torchvision.models.resnet50()
        body.layer4[0].conv2.stride = body.layer4[0].downsample[0].stride = (1, 1)
        body.load_state_dict(net.backbone.body.state_dict(), strict=False)  # but for the fc that neither uses
        self.stem = nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool, body.layer1, body.layer2)
        self.rest = nn.Sequential(body.layer3, body.layer4)
        self.classifier = nn.Conv2d(2048, CLASSES, 1, bias=False)
        self.classifier.weight.data.copy_(net.classifier[:, :, None, None])
        self.stem.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()

    def forward(self, image: Tensor) -> Tensor:
        """Normalised (B, 3, H, W) -> logits (B, C)."""
        features = self.rest(self.stem(image).detach())
        return self.classifier(F.adaptive_avg_pool2d(features, 1)).flatten(1)

    def maps(self, image: Tensor) -> Tensor:
        """Normalised (B, 3, H, W) -> class maps (B, C, h, w)."""
        return F.relu(self.classifier(self.rest(self.stem(image))))


def normalised(image: Tensor) -> Tensor:
    """uint8 or float (B, 3, H, W), 0..255 -> float32, NCHW."""
    mean, std = (torch.tensor(v, device=image.device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((image.float() / 255 - mean) / std).contiguous()


def start(photos: Photos, precision: str) -> tuple[Context, CamNet]:
    """A job of voc12.yaml in that precision, and its CAM network without W1, of weights that follow from the seed."""
    overrides = ["stages=[classify, localize]", "model.kernel_channels=0", f"engine.precision={precision}"]
    overrides += ["classify.balance=false", f"classify.lr={RATE}", f"localize.scales={list(SCALES)}"]
    context = photos.context("voc12.yaml", *overrides)
    net = new_net(context.config, CLASSES, pretrained=False)
    make_random_start_sound(net.backbone, crops(photos)["image"])
    return context, net


def crops(photos: Photos) -> Batch:
    """A batch of training crops of the photos."""
    reader, own, crop = photos.reader, photos.ordinals[:BATCH], Crop(CROP, (320, 640))
    loaded = [(decode(reader.image(o), reader.name(o)), sample_rng(0, 0, str(o))) for o in own]
    made = [training_crop(photo, rng, crop, FILL) for photo, rng in loaded]
    labels = torch.stack([torch.from_numpy(reader.labels(o)) for o in own])
    return Batch(image=torch.stack(made), labels=labels, key=[reader.name(o) for o in own])


def compared_steps(photos: Photos) -> Iterator[Comparison]:
    """An SGD step; it returns the loss that it began with, so that the second one's shows what the first has learned.

    What the loaders would have done is not timed: crops on both sides, normalising on the other's.
    """
    batch, ours = crops(photos), {}
    for name, precision in PRECISIONS.items():
        context, net = start(photos, precision)
        if not ours:
            device = context.engine.device
            model = IrnStyle(net).to(device)
            settings = context.config.named("classify")
        task = ClassifyTask(net, settings)
        for_training(task, context.kind)
        context.engine.prepare(task, build_optimizer(task, settings))
        ours[name] = partial(_our_step, context, batch, settings.lr)
    optimizer = torch.optim.SGD(
        [
            {"params": model.rest.parameters(), "lr": settings.lr},
            {"params": model.classifier.parameters(), "lr": settings.lr * settings.head_lr},
        ],
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    images, labels = normalised(batch["image"].to(device)), batch["labels"].to(device)

    def other() -> float:
        loss = F.multilabel_soft_margin_loss(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    within = {"bf16": 1e-3, "float32": 1e-5}
    yield Comparison(f"batch {BATCH}, crop {CROP}", other, ours, lambda mine, want: abs(mine - want), within, warm=2)


def _our_step(context: Context, batch: Batch, rate: float) -> float:
    return float(context.engine.train_step([batch], rate).losses["loss"])


def compared_maps(photos: Photos) -> Iterator[Comparison]:
    """Class maps of two photos, from the file to what is written; the difference is of the maps in the photo's size."""
    chosen, ours = slice(0, 2), {}
    for name, precision in PRECISIONS.items():
        context, net = start(photos, precision)
        if not ours:
            model = IrnStyle(net).to(context.engine.device).eval()
        stage = Localize(context)
        heads = Heads()
        heads.add("cam", net)
        stage.net, stage.written = context.ready(heads), "cam"
        ours[name] = partial(localized, stage, photos.ordinals[chosen], photos.place)
    labels = [photos.reader.labels(o).nonzero()[0] for o in photos.ordinals[chosen]]

    def other() -> list[Tensor]:
        return [cam(model, *photo, photos.place) for photo in zip(photos.paths[chosen], labels, strict=True)]

    def apart(mine: Sequence[Tensor], want: Sequence[Tensor]) -> float:
        return max(float((a.cpu() - b.cpu()).abs().max()) for a, b in zip(mine, want, strict=True))

    name = f"{len(SCALES)} scales and mirror, a photo of {photos.side} pixels"
    within = {"bf16": 0.05, "float32": 1e-4}  # of 0 to 1
    yield Comparison(name, other, ours, apart, within, units=len(labels))


def localized(stage: Localize, ordinals: list[int], place: Path) -> list[Tensor]:
    """Maps (n, H, W) of photos of the shards, as localize makes and packs them: a thread has a photo."""
    crew = Crew(stage.context.engine.device)

    def one(ordinal: int) -> Tensor:
        sample = stage.sample(ordinal)
        with torch.no_grad(), crew.room(sample.size):
            made = stage.make([sample])[0]
            for member, data in stage.members(sample, made).items():
                (place / f"{sample.key}.{member}").write_bytes(data)
        return made["cam"].full

    return list(crew.map(one, ordinals))


@torch.no_grad()
def cam(model: IrnStyle, path: Path, classes: Any, place: Path) -> Tensor:
    """Maps (n, H, W) of a JPEG: every class is enlarged at every scale, and then those that the labels name are kept.

    Scales are rounded as ours, and enlarged corner to corner, so that the maps can be compared.
    """
    device = next(model.parameters()).device
    with Image.open(path) as file:
        pixels = np.array(file.convert("RGB"))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device)
    height, width = image.shape[2:]
    found = []
    for scale in SCALES:
        seen = normalised(scale_to_grid(image, scale, 16))
        straight, mirrored = model.maps(torch.cat((seen, seen.flip(3))))
        found.append(straight + mirrored.flip(2))
    for member, size in (("low", (-(-height // 4), -(-width // 4))), ("full", (height, width))):
        each = [F.interpolate(maps[None], size, mode="bilinear", align_corners=True)[0] for maps in found]
        maps = torch.stack(each).sum(0)[classes]
        maps /= F.adaptive_max_pool2d(maps, 1) + 1e-5
        np.save(place / f"{path.stem}.{member}.npy", maps.cpu().numpy())
    return maps
