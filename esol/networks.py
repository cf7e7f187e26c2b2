"""The networks of a run: built from its config, and as its stages handed them over."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from esol.context import Context
from esol.errors import CheckpointError
from esol.models.backbones import build_backbone
from esol.models.cam_net import CamNet
from esol.models.expansion import Expansion, Shrinkage

WEIGHTS = "model.safetensors"
_Module = TypeVar("_Module", bound=nn.Module)


def build_net(context: Context, pretrained: bool) -> CamNet:
    """The network of the `model` section for the shard set's classes; random weights follow from the seed alone."""
    model = context.config.model
    torch.manual_seed(context.config.seed)
    return CamNet(build_backbone(model, pretrained), len(context.index.classes), model.kernel_channels)


def trained_net(context: Context) -> CamNet:
    """The network as classify handed it over."""
    return _restore(build_net(context, pretrained=False), context.run_dir / "classify")


def trained_expansion(context: Context, net: CamNet) -> Expansion:
    """The Expansion as expand handed it over."""
    return _restore(Expansion(net, context.config.expand), context.run_dir / "expand")


def trained_shrinkage(context: Context, expansion: Expansion) -> Shrinkage:
    """The Shrinkage as shrink handed it over."""
    return _restore(Shrinkage(expansion, context.config.shrink), context.run_dir / "shrink")


def _restore(module: _Module, folder: Path) -> _Module:
    path = folder / WEIGHTS
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be used ({error}): delete {folder} to run the stage again") from error
    return module
