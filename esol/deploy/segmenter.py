"""A trained DeepLab as one file: safetensors whose header says how to build the network and how to predict with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from esol.base.errors import CheckpointError, ConfigError
from esol.base.files import atomic_write
from esol.base.schema import build
from esol.config import BackboneConfig, EvaluateConfig
from esol.models.backbones import build_backbone
from esol.models.deeplab import DeepLab
from esol.pipeline import store

FORMAT = "esol-deeplab 2"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class ModelInfo:
    """What the file's header holds.

    classes: names without background; backbone, rates: of the network; evaluate: how it predicts; photo_side: median
    long side of the photos that it learned from, in pixels; masks: the stage whose masks it learned from, "truth" for
    true ones; initial_weights: what it started from, in words.
    """

    classes: tuple[str, ...]
    backbone: str
    rates: tuple[int, ...]
    evaluate: EvaluateConfig
    photo_side: int
    masks: str
    initial_weights: str


def write_model(path: Path, state: Mapping[str, Tensor], info: ModelInfo) -> None:
    """Writes weights and header; the same weights and info give the same bytes."""
    # one entry: safetensors writes several in an order that differs from call to call
    header = {"esol": json.dumps(describe(info))}
    atomic_write(path, save({key: value.contiguous() for key, value in state.items()}, header))


def describe(info: ModelInfo) -> dict[str, Any]:
    """What the header says."""
    return {"format": FORMAT, **asdict(info)}


def load_model(place: str | Path) -> tuple[DeepLab, ModelInfo]:
    """The network, in eval mode on the CPU, of a run directory, an exported folder or a .safetensors file.

    A run directory predicts as its evaluate stage did, before that has run as segment's header says. CheckpointError
    where there is no such model.
    """
    place = Path(place)
    run = store.is_run(place)
    older = run and store.made_by_another_version(place / "segment")  # its weights and header are as they were
    segment = store.need(place, "segment") if run and not older else None
    path = place / "segment" / WEIGHTS if run else place / WEIGHTS if place.is_dir() else place
    info = read_info(path)
    evaluated = store.read_manifest(place / "evaluate") if run else None
    if segment and evaluated and evaluated.consumed["segment"] == segment.output:
        info = replace(info, evaluate=evaluated.ran_with.evaluate)
    model = BackboneConfig(info.backbone, output_stride=8, freeze="all")
    net = DeepLab(build_backbone(model, pretrained=False), len(info.classes) + 1, info.rates)
    try:
        net.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    return net.eval(), info


def read_info(path: Path) -> ModelInfo:
    """The header alone; CheckpointError where the file is no model of ours."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: give the run directory of a finished segment stage, a folder that esol export wrote, "
            "or a .safetensors file of either"
        ) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    try:
        about: dict[str, Any] = json.loads(header["esol"])
        if (found := about.pop("format")) != FORMAT:
            raise CheckpointError(f"{path} has format {found!r}, this program reads {FORMAT!r}")
        evaluate = build(EvaluateConfig, about["evaluate"], "evaluate")
        values = {**about, "evaluate": evaluate, "classes": tuple(about["classes"]), "rates": tuple(about["rates"])}
        return ModelInfo(**values)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} is no DeepLab that esol wrote (its header: {error!r})") from error
