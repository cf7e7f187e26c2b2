"""The networks of a run: built from its config, and as its stages handed them over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from esol.config import ModelConfig
from esol.context import Context
from esol.errors import CheckpointError
from esol.models.affinity_net import AffinityNet
from esol.models.backbones import Backbone, build_backbone
from esol.models.cam_net import CamNet
from esol.models.expansion import Expansion, Shrinkage
from esol.models.irn_net import IrnNet

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


def affinity_net(context: Context) -> AffinityNet:
    """A new AffinityNet, at output stride 8 as PSA has it."""
    return AffinityNet(_initial_backbone(context, replace(context.config.model, output_stride=8)))


def irn_net(context: Context) -> IrnNet:
    """A new IRNet; its backbone never learns."""
    return IrnNet(_initial_backbone(context, replace(context.config.model, freeze="all")))


def trained_affinity_net(context: Context) -> AffinityNet:
    """AffinityNet as psa handed it over."""
    model = replace(context.config.model, output_stride=8)
    return _restore(AffinityNet(build_backbone(model, pretrained=False)), context.run_dir / "psa")


def trained_irn_net(context: Context) -> IrnNet:
    """IRNet as irn handed it over."""
    model = replace(context.config.model, freeze="all")
    return _restore(IrnNet(build_backbone(model, pretrained=False)), context.run_dir / "irn")


def _initial_backbone(context: Context, model: ModelConfig) -> Backbone:
    """As model.weights has it; where there are none, as classify trained it."""
    torch.manual_seed(context.config.seed)
    if model.weights != "none":
        return build_backbone(model, pretrained=True)
    backbone = build_backbone(model, pretrained=False)
    backbone.load_state_dict(trained_net(context).backbone.state_dict())
    torch.manual_seed(context.config.seed)  # building the trained network has drawn from it
    return backbone


def _restore(module: _Module, folder: Path) -> _Module:
    path = folder / WEIGHTS
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be used ({error}): delete {folder} to run the stage again") from error
    return module
