"""The main line on a frozen backbone, from features that are computed once: a setting costs a minute, not ten.

Crops, order, tasks, optimizer, precision and inference are the pipeline's own; only the backbone's forward pass is
looked up. tests/end_to_end/test_frozen_line.py holds it against the pipeline.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.refine import unseen
from esol.base.progress import progress
from esol.config import Config, TrainConfig
from esol.data.index import Index
from esol.data.plan import Plan, share_of
from esol.data.reader import ShardReader
from esol.data.samples import Batch, decode_mask
from esol.data.stream import training_stream
from esol.data.transforms import Crop, decode
from esol.engines.ranks import precision_of
from esol.models.cam_net import CamNet
from esol.models.heads import Decision, Expansion, Heads, Shrinkage
from esol.models.regrid import scale_to_grid
from esol.ops.class_maps import ClassMaps, class_maps
from esol.ops.metrics import ThresholdCurve
from esol.ops.seeds import best_class
from esol.training.losses import absence_weights
from esol.training.optim import build_optimizer, learning_rate
from esol.training.task import Task


class Remembered(nn.Module):
    """In the backbone's place: images that are features already pass, others are looked up by their size."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride
        self.photo: dict[tuple[int, ...], Tensor] = {}

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[1] == self.channels:
            return image
        return self.photo[tuple(image.shape[2:])].to(image.device, memory_format=torch.channels_last)

    def __deepcopy__(self, memo: dict[int, Any]) -> Remembered:
        """Copies of a network share it: a photo's features are part of a file of gigabytes, which would be copied."""
        return self


REACH = (0.25, 0.5, 0.75, 1.0, 1.5)  # edges of distances from the CAM's peak, in square roots of the object's area


@dataclass
class Evidence:
    """Everything that tables need of maps: whole numbers, which add up over photos.

    reach, int64 (bins, 2, levels): pixels of the present classes' objects (0) and of the background (1) by distance
    from the CAM's peak of that class and by the level of its map, as in ThresholdCurve. losses: of Expansion's
    steps, in the chains that have one.
    """

    curve: ThresholdCurve
    reach: NDArray[np.int64]
    losses: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    @classmethod
    def empty(cls, num_classes: int) -> Evidence:
        curve = ThresholdCurve(num_classes)
        return cls(curve, np.zeros((len(REACH) + 1, 2, curve.counts.shape[2]), np.int64))

    @classmethod
    def of(cls, counts: NDArray[np.int64], reach: NDArray[np.int64], losses: NDArray[np.float32]) -> Evidence:
        curve = ThresholdCurve(counts.shape[1])
        curve.add(counts)
        return cls(curve, reach, losses)

    def update(self, truth: NDArray[np.uint8], cam: ClassMaps, own: ClassMaps) -> None:
        """One photo: its truth (H, W), its CAM, and the maps that are judged."""
        winner, score = (t.numpy() for t in best_class(own.full, own.classes))
        self.curve.update(truth, winner, score)
        rows, columns = np.indices(truth.shape)
        for c, first, last in zip(cam.classes.tolist(), cam.full.numpy(), own.full.numpy(), strict=True):
            inside = truth == c + 1
            if not inside.any():
                continue
            y, x = np.unravel_index(int(first.argmax()), first.shape)
            distance = np.hypot(rows - y, columns - x) / np.sqrt(inside.sum())
            level = np.searchsorted(self.curve.thresholds, last.astype(np.float32), side="left")
            cell = np.searchsorted(REACH, distance) * self.reach.shape[2] + level
            for which, pixels in enumerate((inside, truth == 0)):
                size = len(self.reach) * self.reach.shape[2]
                found = np.bincount(cell[pixels], minlength=size)
                self.reach[:, which] += found.reshape(len(self.reach), -1)


@dataclass
class Photo:
    """What inference needs of a photo: labels (C,), truth (H, W) and the features of each input size, mirrored too.

    features lie on the disk: a size's tensor is read when it is used.
    """

    labels: Tensor
    truth: NDArray[np.uint8]
    features: dict[tuple[int, ...], Tensor]


def plan_of(config: Config, index: Index) -> Plan:
    """The order of classify, which all steps behind it see as well."""
    ordinals = index.split(config.data.train_split)
    return Plan(ordinals, index.shard_of[ordinals], config.seed, config.classify.global_batch)


class FrozenLine:
    """Features of the crops of `steps` steps and of photos, on disk below `folder`, where processes share them.

    steps 0: no crops, nothing can be trained. Works on a GPU where there is one.
    """

    def __init__(self, config: Config, net: CamNet, folder: Path, steps: int) -> None:
        self.config = config
        self.index = Index.load(config.data.root)
        self.reader = ShardReader(self.index, config.data.cache)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.net = net.eval().to(self.device)
        half = precision_of(config.engine.precision, self.device) is torch.bfloat16
        self._type, self._bits = (
            (torch.bfloat16, torch.int16) if half else (torch.float32, torch.int32)
        )  # numpy has no bf16
        self.backbone = self.net.backbone
        self.net.backbone = Remembered(self.backbone.channels, self.backbone.stride)  # type: ignore[assignment]
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if steps:
            self.crops, self.labels = self._crops(steps)
        self.photos = self._photos("photos", self.index.split(config.data.score_split))

    @torch.no_grad()
    def _features(self, image: Tensor) -> NDArray[np.int16 | np.int32]:
        with self._autocast():
            return self.backbone(image.to(self.device)).to(self._type).contiguous().view(self._bits).cpu().numpy()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._type == torch.bfloat16)

    def _crops(self, steps: int) -> tuple[NDArray[np.int16 | np.int32], Tensor]:
        config = self.config
        batch, plan = config.classify.global_batch, plan_of(config, self.index)
        side = -(-config.data.crop // self.backbone.stride)
        shape = (steps, batch, self.backbone.channels, side, side)
        path = self._folder / "crops.npy"
        labels = path.with_suffix(".labels.npy")
        if not labels.exists():
            store = np.lib.format.open_memmap(path, "w+", str(self._bits).removeprefix("torch."), shape)
            found = np.zeros((steps, batch, len(self.index.classes)), np.float32)
            share = share_of(0, 1, batch, 0)
            fill = tuple(self.backbone.mean.flatten().round().int().tolist())
            stream = training_stream(
                self.reader, plan, share, 0, steps, Crop(config.data.crop, config.data.long_side), config.data, fill
            )
            with progress("features of crops", steps, "steps", True) as advance:
                for step, (one,) in enumerate(stream):
                    store[step] = self._features(one["image"])
                    found[step] = one["labels"].numpy()
                    advance(step + 1, "")
            np.save(labels, found)
        return np.load(path, mmap_mode="r"), torch.from_numpy(np.load(labels))

    @cached_property
    def absence(self) -> Tensor:
        """The weights of absent classes, as the pipeline gives them to its tasks."""
        train = self.index.split(self.config.data.train_split)
        return absence_weights(torch.from_numpy(self.reader.occurrence(train)), len(train))

    @cached_property
    def others(self) -> list[Photo]:
        """Those that are unseen."""
        return self._photos("others", unseen(self.config, self.index))

    def _photos(self, name: str, ordinals: NDArray[np.int64]) -> list[Photo]:
        path = self._folder / f"{name}.bin"
        places = path.with_suffix(".json")  # of each photo: input size, features' shape, where they begin
        if not places.exists():
            places.write_text(json.dumps(self._write_photos(path, ordinals)))
        stored = torch.from_file(str(path), size=path.stat().st_size // self._bits.itemsize, dtype=self._bits)
        photos = []
        for ordinal, own in zip(ordinals.tolist(), json.loads(places.read_text()), strict=True):
            truth = decode_mask(self.reader.read(ordinal, "mask.png"), self.reader.name(ordinal))
            features = {
                tuple(size): stored[start : start + math.prod(shape)].view(shape).view(self._type)
                for size, shape, start in own
            }
            photos.append(Photo(torch.from_numpy(self.reader.labels(ordinal)), truth, features))
        return photos

    def _write_photos(self, path: Path, ordinals: NDArray[np.int64]) -> list[list[Any]]:
        places, start = [], 0
        with path.open("wb") as file, progress("features of photos", len(ordinals), "photos", True) as advance:
            for done, ordinal in enumerate(ordinals.tolist(), 1):
                image = decode(self.reader.image(ordinal), self.reader.name(ordinal))
                own = []
                for scale in self.config.localize.scales:
                    inputs = scale_to_grid(image[None], scale, self.backbone.stride)
                    found = self._features(torch.cat((inputs, inputs.flip(3))))
                    file.write(found.tobytes())
                    own.append((tuple(inputs.shape[2:]), found.shape, start))
                    start += found.size
                places.append(own)
                advance(done, "")
        return places

    def train(self, task: Task, config: TrainConfig, steps: int) -> NDArray[np.float32]:
        """The pipeline's steps on its batches, in the order of its plan; the loss of each."""
        return self.train_together([(task, config)], steps)

    def train_together(self, tasks: list[tuple[Task, TrainConfig]], steps: int) -> NDArray[np.float32]:
        """Every task takes each step, in this order, on the same batch; the last one's losses."""
        found = []
        for task, own in tasks:
            if getattr(own, "balance", False):
                task.absence = self.absence
        optimizers = [build_optimizer(task.train().to(self.device), config) for task, config in tasks]
        for step in range(steps):
            x = torch.from_numpy(self.crops[step].copy()).view(self._type)
            x = x.to(self.device, memory_format=torch.channels_last)  # as backbones make them: the last digit differs
            batch: Batch = {"image": x, "labels": self.labels[step].to(self.device), "key": []}
            for (task, config), optimizer in zip(tasks, optimizers, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, config) * group["lr_multiplier"]
                with self._autocast():
                    losses, _ = task(batch)
                optimizer.zero_grad()
                losses["loss"].backward()
                if config.clip_norm:
                    nn.utils.clip_grad_norm_([p for p in task.parameters() if p.requires_grad], config.clip_norm)
                optimizer.step()
            found.append(losses["loss"].detach().float())
        for task, _ in tasks:
            task.eval()
        return torch.stack(found).cpu().numpy() if found else np.zeros(0, np.float32)

    def score(self, *nets: nn.Module | None) -> Evidence:
        """Of the last of net, decision, expansion, shrinkage that is given, on score_split."""
        evidence = Evidence.empty(len(self.index.classes))
        for photo, cam in zip(self.photos, self._cams, strict=True):
            evidence.update(photo.truth, cam, self._last(photo, nets))
        return evidence

    def score_unseen(self, *nets: nn.Module | None) -> ThresholdCurve:
        """The same on the photos that are unseen."""
        curve = ThresholdCurve(len(self.index.classes))
        for photo in self.others:
            last = self._last(photo, nets)
            curve.update(photo.truth, *(t.numpy() for t in best_class(last.full, last.classes)))
        return curve

    @cached_property
    def _cams(self) -> list[ClassMaps]:
        return [self._last(photo, (self.net,)) for photo in self.photos]

    @torch.no_grad()
    def _last(self, photo: Photo, nets: Sequence[nn.Module | None]) -> ClassMaps:
        """The maps of the last stage; those before it would cost as much each."""
        last, heads = Last(*nets), Heads()
        heads.add("cam", last)
        last.backbone.photo = photo.features
        blank = torch.zeros(1, 3, *photo.truth.shape, dtype=torch.uint8, device=self.device)
        scales, flip = self.config.localize.scales, self.config.localize.flip
        with self._autocast():
            maps = class_maps(blank, photo.labels[None].to(self.device), heads, scales=scales, flip=flip)[0]["cam"]
        return ClassMaps(maps.classes.cpu(), maps.size, tuple((grid.cpu(), corners) for grid, corners in maps.grids))


class Last(nn.Module):
    """The last stage that is given, in the CAM network's place."""

    def __init__(
        self,
        net: CamNet,
        decision: Decision | None = None,
        expansion: Expansion | None = None,
        shrinkage: Shrinkage | None = None,
    ) -> None:
        super().__init__()
        self.net, self.backbone = net, net.backbone
        self.decision, self.expansion, self.shrinkage = decision, expansion, shrinkage

    def features(self, image: Tensor) -> Tensor:
        return self.net.features(image)

    def class_maps(self, x: Tensor) -> Tensor:
        if self.expansion is None:
            return (self.decision or self.net).class_maps(x)
        return (self.shrinkage or self.expansion).class_maps(self.expansion.features(x))

    def head_maps(self, x: Tensor, made: dict[str, Tensor]) -> Tensor:
        return self.class_maps(x)
