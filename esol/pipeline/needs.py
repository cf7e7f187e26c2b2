"""What a run will need, looked at before its first step: a mistake is said now, not hours later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import torch

from esol.base.errors import CheckpointError, ConfigError, DataError, EsolError, WeightsError
from esol.config import MASK_STAGES, BackboneConfig, Config, TrainConfig
from esol.data.index import Index
from esol.data.plan import Plan, share_of
from esol.data.reader import ShardReader
from esol.engines.base import Engine, gather_text
from esol.models.backbones import build_backbone

_KINDS = (CheckpointError, ConfigError, DataError, WeightsError)
_CAM_STAGES = ("classify", "decide", "expand", "shrink")
_MAP, _MASK = 0.2, 0.05  # bytes a pixel of packed class maps, for each class, and of packed label maps: both at least
_SAMPLED = 200  # photos whose size and labels are looked at


def check(config: Config, index: Index, engine: Engine, plan: Callable[[], Collection[str]]) -> None:
    """Raises on every rank what the main one finds: by plan, which says what stages will run, and by `missing`."""
    kind, text = "", ""
    if engine.is_main:
        try:
            lacking = missing(config, index, plan(), engine.world_size, engine.beat)
            if lacking:
                kind, text = type(lacking[0]).__name__, "\n  ".join(map(str, lacking))
        except EsolError as error:
            kind, text = type(error).__name__, str(error)
    kind, _, text = gather_text(engine, f"{kind}\0{text}" if text else "")[0].partition("\0")
    if text:
        raise next((k for k in _KINDS if k.__name__ == kind), EsolError)(text)


def missing(
    config: Config,
    index: Index,
    stages: Collection[str],
    world_size: int,
    beat: Callable[[str], None] = lambda doing: None,
) -> list[EsolError]:
    """An error for each thing that the stages will want and that is not there, found without writing anything.

    beat: told what is being done, for a watchdog.
    """
    found = [*_labels(config, index, stages), *_batches(config, index, stages, world_size)]
    found += _weights(config, stages, beat)
    beat("the saliency maps and masks that the stages will want")
    found += _members(config, index, stages)
    return found or list(_disk(config, index, stages))


def _labels(config: Config, index: Index, stages: Collection[str]) -> Iterator[EsolError]:
    """Some photo of the training split must show something."""
    name = config.data.train_split
    if not set(_CAM_STAGES) & set(stages) or index.labels is None:
        return
    split = index.split(name)
    if len(split) and not index.labels[split].any():
        yield DataError(
            f"data.train_split = {name}: none of its {len(split)} photos in {index.root} has a label, so that there is "
            "nothing to learn; give labels to those that show an object, and leave the others' empty"
        )


def _batches(config: Config, index: Index, stages: Collection[str], world_size: int) -> Iterator[EsolError]:
    """Global batches that the processes can share and the split can fill."""
    for name in stages:
        section = getattr(config, name, None)
        if not isinstance(section, TrainConfig):
            continue
        try:
            ordinals = index.split(config.data.train_split if name in _CAM_STAGES else config.data.mask_split)
            share_of(0, world_size, section.global_batch, config.engine.micro_batch)
            Plan(ordinals, index.shard_of[ordinals], config.seed, section.global_batch)
        except EsolError as error:
            yield type(error)(f"{name}: {error}")


def _weights(config: Config, stages: Collection[str], beat: Callable[[str], None]) -> Iterator[EsolError]:
    """Initial weights: local files are read and fitted, what a hub has is fetched."""
    wanted: dict[str, BackboneConfig] = {}
    if any(name in stages for name in ("classify", "psa", "irn")):
        wanted["model"] = config.model
    if "segment" in stages:
        wanted["segment.model"] = config.segment.model
    for section, model in wanted.items():
        beat(f"the initial weights of {section}")
        try:
            with torch.random.fork_rng(devices=[]):  # the other ranks do not draw here
                build_backbone(model)
        except EsolError as error:
            yield type(error)(str(error).replace("model.", f"{section}."))


def _members(config: Config, index: Index, stages: Collection[str]) -> Iterator[EsolError]:
    """Saliency maps and true masks of every photo that a stage will want them of."""
    cue, data = config.saliency, config.data
    masked = np.union1d(index.split(data.mask_split), index.split(data.score_split)) if stages else np.array([], int)
    if any(name in stages for name in MASK_STAGES):
        if cue.source == "shards":
            yield from _without(index, "saliency.png", masked, "saliency.source = shards")
        elif cue.source == "folder":
            folder = Path(cue.folder)
            if not folder.is_dir():
                yield DataError(f"saliency.folder = {folder}: there is no such folder")
            else:
                there = {path.name for path in folder.iterdir()}
                lacking = [str(key) for key in index.keys[masked] if f"{key}.png" not in there]
                if lacking:
                    yield DataError(
                        f"saliency.folder = {folder} lacks {len(lacking)} of {len(masked)} maps, "
                        f"the first is {lacking[0]}.png"
                    )
        elif cue.source == "spectral-residual":
            try:
                import cv2.saliency  # noqa: F401
            except ImportError as error:
                yield ConfigError(
                    f'saliency.source = spectral-residual needs OpenCV ({error}): pip install "esol[saliency]"'
                )
    if "segment" in stages and config.segment.masks == "truth":
        yield from _without(index, "mask.png", index.split(data.mask_split), "segment.masks = truth")


def _without(index: Index, member: str, ordinals: np.ndarray, why: str) -> Iterator[EsolError]:
    table = index.members.get(member)
    lacking = ordinals if table is None else ordinals[table[ordinals, 0] < 0]
    if len(lacking):
        yield DataError(
            f"{why}, but {len(lacking)} of {len(ordinals)} photos in {index.root} have no {member}, "
            f"the first is {index.keys[lacking[0]]}"
        )


def _disk(config: Config, index: Index, stages: Collection[str]) -> Iterator[EsolError]:
    """Room for what the stages write, at least; what is there already is not written again."""
    place = Path(config.run_dir).absolute()
    while not place.exists():
        place = place.parent
    free, wanted = shutil.disk_usage(place).free, wanted_bytes(config, index, stages)
    if wanted > free:
        yield ConfigError(
            f"run_dir = {config.run_dir} has {free / 2**30:.1f} GiB of disk left, and {', '.join(stages)} will write "
            f"{wanted / 2**30:.1f} GiB at least: make room, or set run_dir to another disk"
        )


def wanted_bytes(config: Config, index: Index, stages: Collection[str]) -> int:
    """What the stages will write, at least: packed class maps, packed label maps, weights, two checkpoints."""
    data = config.data
    masked = np.union1d(index.split(data.mask_split), index.split(data.score_split)) if stages else np.array([], int)
    pixels, labelled = _mean_photo(config, index, masked)
    total = 0.0
    if "localize" in stages:
        total += _MAP * labelled * len(masked)
    total += sum(_MASK * pixels * len(masked) for name in stages if name.endswith(("_masks", "_labels")))
    if "evaluate" in stages:
        total += _MASK * pixels * len(index.split(data.eval_split))
    networks = {"classify": config.model, "psa": config.model, "irn": config.model, "segment": config.segment.model}
    sizes = {name: _parameters(model) for name, model in networks.items() if name in stages}
    total += sum(sizes.values()) + 2 * 2 * max(sizes.values(), default=0)  # a checkpoint has the momentum as well
    return int(total)


def _mean_photo(config: Config, index: Index, ordinals: np.ndarray) -> tuple[float, float]:
    """Mean pixels, and pixels times labels, of some of the photos; 0 where the shards cannot be read now."""
    reader = ShardReader(index, config.data.cache)
    if not len(ordinals) or "json" not in index.members or "://" in index.root:
        return 0.0, 0.0
    found = []
    for ordinal in ordinals[np.linspace(0, len(ordinals) - 1, min(_SAMPLED, len(ordinals))).astype(int)]:
        try:
            about = json.loads(reader.read(int(ordinal), "json"))
            pixels = int(about["width"]) * int(about["height"])
            found.append((pixels, pixels * len(about["labels"])))
        except (DataError, ValueError, KeyError, TypeError):  # said where the sample is needed
            continue
    return tuple(np.mean(found, 0).tolist()) if found else (0.0, 0.0)


def _parameters(model: BackboneConfig) -> int:
    """Bytes of a backbone's weights."""
    with torch.random.fork_rng(devices=[]):
        net = build_backbone(model, pretrained=False)
    return sum(4 * parameter.numel() for parameter in net.parameters())
