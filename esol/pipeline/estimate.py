"""How long a run will take on this machine: a few steps of its networks, and how many of them each stage makes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from esol.config import BackboneConfig, Config, CrfConfig, Duration, MapsConfig, PredictionConfig, TrainConfig
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.transforms import decode, resize
from esol.engines.ranks import DTYPES, precision_of, wants_cpu
from esol.models.affinity_net import AffinityNet
from esol.models.backbones import build_backbone
from esol.models.deeplab import DeepLab
from esol.models.folded import for_training
from esol.ops.dense_crf import mean_field, unary_from_labels
from esol.pipeline.registry import table
from esol.stages.localize import SAMPLED
from esol.stages.psa import PsaConfig, PsaTask
from esol.stages.segment import SegmentConfig

BATCH, PHOTOS = 8, 4
START = 4.0  # seconds that a stage takes before its first step and behind its last, its pictures among them
# Seconds of a stage for each of the seconds that were measured. Fitted to runs on two cores (docs/cost.md) of 400
# photos of 320 pixels and of 498 smaller ones; the learning stages' are of an image, the others' of a photo.
LEARNED = {"classify": 1.7, "decide": 1.7, "expand": 1.7, "shrink": 2.1, "irn": 3.0}  # of a frozen pass
KEPT = {"decide": 0.5, "expand": 0.5, "shrink": 0.9}  # the same where data.features keeps the frozen pass
PREDICTED = 0.43  # of a frozen pass at stride 8, in batches: a pass of a prediction
STEP = 1.15  # of a step of psa or of DeepLab: the same with the reading of its photos
REFINED = {"seed_masks": 0.7, "psa_labels": 0.4, "psa_masks": 1.4, "irn_labels": 0.8, "irn_masks": 1.2}  # of a CRF
HANDLED, SCORED = 0.04, 0.03  # seconds a photo, read and written; against each mask that is drawn, for each of ours
PACKED = 3.0  # of a frozen pass: what localize adds for each source


@dataclass(frozen=True)
class Speed:
    """Seconds an image of a frozen pass at strides 16 and 8, of a step of psa and of DeepLab, and of a photo's CRF."""

    passed: float
    fine: float
    related: float
    learned: float
    refined: float


def measure(config: Config, index: Index) -> Speed:
    """A few steps of the run's networks, with random weights, on photos of its shards; about ten seconds on a CPU."""
    device = torch.device("cpu" if wants_cpu() else "cuda")
    asked = config.engine.precision
    kind = precision_of(asked, device) if asked == "auto" else DTYPES[asked]
    crop = config.data.crop
    train = index.split(config.data.train_split)
    chosen = train[np.linspace(0, len(train) - 1, PHOTOS).astype(int)]  # noise would be a huge lattice
    reader = ShardReader(index, config.data.cache, chosen)
    photos = [decode(reader.image(one), reader.name(one)).to(device) for one in chosen.tolist()]
    images = torch.stack([resize(photos[i % len(photos)], crop, crop) for i in range(BATCH)])
    frozen = build_backbone(replace(config.model, freeze="all"), pretrained=False).to(device)
    for_training(frozen, kind)

    def look() -> None:
        with torch.no_grad(), torch.autocast(device.type, kind, enabled=kind is not None):
            frozen(images).float().sum().item()

    segment = config.section(SegmentConfig)
    learning = BackboneConfig(segment.model.backbone, output_stride=8, freeze=segment.model.freeze)
    net = DeepLab(build_backbone(learning, pretrained=False), 3).to(device)
    for_training(net, kind)
    larger = F.pad(images, (0, 1, 0, 1))

    def look_closely() -> None:
        with torch.no_grad(), torch.autocast(device.type, kind, enabled=kind is not None):
            net(larger).float().sum().item()

    def learn() -> None:
        with torch.autocast(device.type, kind, enabled=kind is not None):
            loss = net(larger).float().square().mean()
        loss.backward()
        net.zero_grad()

    body = build_backbone(replace(config.model, output_stride=8), pretrained=False)
    psa = PsaTask(AffinityNet(body), config.section(PsaConfig)).to(device)
    for_training(psa, kind)
    halves = torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.uint8, device=device)
    halves[:, crop // 2 :] = 1

    def relate() -> None:
        with torch.autocast(device.type, kind, enabled=kind is not None):
            loss = psa({"image": images, "target": halves, "labels": halves[:, 0, :1], "key": []})[0]["loss"]
        loss.backward()
        psa.zero_grad()

    def refine() -> None:
        for photo in photos:
            labels = torch.zeros(photo.shape[1:], dtype=torch.long, device=device)
            labels[: photo.shape[1] // 3] = 1
            mean_field([photo], [[unary_from_labels(labels, 2)]], CrfConfig())[0][0].sum().item()

    passed, fine, related, learned = (_seconds(work) / BATCH for work in (look, look_closely, relate, learn))
    return Speed(passed, fine, related, learned, _seconds(refine) / PHOTOS)


def _seconds(work: Callable[[], None], rounds: int = 3) -> float:
    work()  # the first builds kernels
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)


def seconds(config: Config, index: Index, speed: Speed) -> dict[str, float]:
    """Stage -> about how long it takes."""
    maps = config.section(MapsConfig)
    photos = len(index.split(config.data.mask_split))
    evaluated = len(index.split(config.data.eval_split))
    shown = photos if index.labels is None else int(index.labels[index.split(config.data.mask_split)].any(1).sum())
    sources = sum(stage in config.stages for stage in ("classify", "decide", "expand", "shrink"))
    size = (maps.long_side or config.data.long_side[1]) ** 2 * 0.75 / config.data.crop**2  # of a photo, in crops
    passes = size * sum(scale**2 for scale in maps.scales) * (2 if maps.flip else 1)
    predicted = config.section(PredictionConfig)
    fine = size * sum(scale**2 for scale in predicted.scales) * (2 if predicted.flip else 1)
    drawn = index.members.get("mask.png")
    scored = SCORED if drawn is not None and (drawn[index.split(config.data.score_split), 0] >= 0).any() else 0.0
    took: dict[str, float] = {}
    for name in config.stages:
        own = table()[name].own(config)
        if isinstance(own, TrainConfig):
            epoch = len(index.split(config.data.train_split)) // own.global_batch or 1
            images = Duration.parse(own.duration, name).steps(own.global_batch, epoch) * own.global_batch
            heads = LEARNED | KEPT if config.data.features else LEARNED
            if isinstance(own, SegmentConfig):
                each = STEP * speed.learned
            elif isinstance(own, PsaConfig):
                each = STEP * speed.related
            else:
                each = heads.get(name, 0) * speed.passed
            took[name] = START + images * each
        elif name == "localize":
            judged = min(SAMPLED, shown) * sources * speed.refined
            each = speed.passed * (passes + PACKED * sources) + scored * sources
            took[name] = START + judged + (photos + min(SAMPLED, shown)) * each
        elif isinstance(own, PredictionConfig):
            each = HANDLED + scored + fine * PREDICTED * speed.fine + speed.refined
            took[name] = START + (evaluated if name == "evaluate" else photos) * each
        else:
            took[name] = START + photos * (HANDLED + scored + REFINED.get(name, 0.0) * speed.refined)
    return took
