"""What networks start from, and what the training stages of a run handed over."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from esol.base.errors import CheckpointError
from esol.base.files import sha256
from esol.config import BackboneConfig, Config

WEIGHTS = "model.safetensors"  # of a stage that makes weights, in its folder
_Module = TypeVar("_Module", bound=nn.Module)


def restore(module: _Module, config: Config, stage: str) -> _Module:
    """The module as a stage of the run handed it over; CheckpointError where that cannot be used."""
    folder = Path(config.run_dir, stage)
    path = folder / WEIGHTS
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be used ({error}): delete {folder} to run the stage again") from error
    return module


def initial_weights(model: BackboneConfig) -> str:
    """What a network started from, for people: the data it was trained on and the file, if it was a file."""
    if model.weights == "none":
        return "random"
    path = Path(model.weights)
    name = f"{path.name} {sha256(path)[:8]}" if path.is_file() else "the library's own"
    return f"{model.pretrained_on} ({model.backbone}, {name})"
