"""What a run will need, looked at before its first step: a mistake is said now, not hours later."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from esol.base.errors import CheckpointError, ConfigError, DataError, EsolError, StrideError, WeightsError
from esol.config import BackboneConfig, Config
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.engines.base import Engine, gather_text
from esol.models.backbones import build_backbone
from esol.pipeline.registry import Stage, table

_KINDS = (CheckpointError, ConfigError, DataError, StrideError, WeightsError)
_MAP, _MASK = 0.2, 0.05  # bytes a pixel of packed class maps, for each class, and of packed label maps: both at least
_MODEL_KEY = re.compile(rf"\bmodel\.({'|'.join(f.name for f in fields(BackboneConfig))})\b")  # not model.safetensors
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
    names: Collection[str],
    world_size: int,
    beat: Callable[[str], None] = lambda doing: None,
) -> list[EsolError]:
    """An error for each thing that the stages will want and that is not there, found without writing anything.

    beat: told what is being done, for a watchdog.
    """
    stages = [stage for name, stage in table().items() if name in names]
    found: list[EsolError] = []
    for stage in stages:
        beat(f"what {stage.name} will want")
        found += stage.lacks(config, index, world_size)
    found = list({str(error): error for error in found}.values())  # several stages want the same
    found += _weights(config, stages, beat)
    return found or list(_disk(config, index, stages))


def _weights(config: Config, stages: list[type[Stage]], beat: Callable[[str], None]) -> Iterator[EsolError]:
    """Initial weights: local files are read and fitted, what a hub has is fetched."""
    wanted = dict(weights for stage in stages if (weights := stage.weights(config)))
    for section, model in wanted.items():
        beat(f"the initial weights of {section}")
        try:
            with torch.random.fork_rng(devices=[]):  # the other ranks do not draw here
                build_backbone(model)
        except EsolError as error:
            yield type(error)(_MODEL_KEY.sub(rf"{section}.\1", str(error)))


def _disk(config: Config, index: Index, stages: list[type[Stage]]) -> Iterator[EsolError]:
    """Room for what the stages write, at least; what is there already is not written again."""
    place = Path(config.run_dir).absolute()
    while not place.exists():
        place = place.parent
    free, wanted = shutil.disk_usage(place).free, wanted_bytes(config, index, stages)
    if wanted > free:
        yield ConfigError(
            f"run_dir = {config.run_dir} has {free / 2**30:.1f} GiB of disk left, and "
            f"{', '.join(stage.name for stage in stages)} will write {wanted / 2**30:.1f} GiB at least: make room, or "
            "set run_dir to another disk"
        )


def wanted_bytes(config: Config, index: Index, stages: list[type[Stage]]) -> int:
    """What the stages will write, at least: packed class maps, packed label maps, weights, two checkpoints."""
    data = config.data
    masked = np.union1d(index.split(data.mask_split), index.split(data.score_split)) if stages else np.array([], int)
    pixels, labelled = _mean_photo(config, index, masked)
    photos = {"labels": len(masked), "masks": len(masked)}
    if any(stage.makes == "predictions" for stage in stages):
        photos["predictions"] = len(index.split(data.eval_split))
    total = sum(_MASK * pixels * photos.get(stage.makes, 0) for stage in stages)
    total += sum(_MAP * labelled * len(masked) for stage in stages if stage.makes == "maps")
    sizes = [_parameters(weights[1]) for stage in stages if (weights := stage.weights(config))]
    total += sum(sizes) + 2 * 2 * max(sizes, default=0)  # a checkpoint has the momentum as well
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
