"""The networks of a run: built from its config, and as its stages handed them over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from esol.base.errors import CheckpointError
from esol.base.files import sha256
from esol.config import BackboneConfig, Config, ModelConfig
from esol.deploy.segmenter import WEIGHTS
from esol.models.affinity_net import AffinityNet
from esol.models.backbones import Backbone, build_backbone
from esol.models.cam_net import CamNet
from esol.models.deeplab import DeepLab
from esol.models.expansion import Decision, Expansion, Shrinkage
from esol.models.irn_net import IrnNet

_Module = TypeVar("_Module", bound=nn.Module)

CamNets = tuple[CamNet, Decision | None, Expansion | None, Shrinkage | None]
"""What class maps are made with, in the order of the stages."""


def build_net(config: Config, num_classes: int, pretrained: bool) -> CamNet:
    """The network of the `model` section; random weights follow from the seed alone."""
    torch.manual_seed(config.seed)
    return CamNet(build_backbone(config.model, pretrained), num_classes, config.model.kernel_channels)


def trained_net(config: Config, num_classes: int) -> CamNet:
    """The network as classify handed it over."""
    return _restore(build_net(config, num_classes, pretrained=False), config, "classify")


def trained_decision(config: Config, net: CamNet) -> Decision:
    """The Decision as decide handed it over."""
    return _restore(Decision(net, config.decide), config, "decide")


def trained_expansion(config: Config, net: CamNet) -> Expansion:
    """The Expansion as expand handed it over."""
    return _restore(Expansion(net, config.expand), config, "expand")


def trained_shrinkage(config: Config, expansion: Expansion) -> Shrinkage:
    """The Shrinkage as shrink handed it over."""
    return _restore(Shrinkage(expansion, config.shrink), config, "shrink")


def trained_cam(config: Config, num_classes: int, device: torch.device, until: str = "shrink") -> CamNets:
    """All networks that class maps are made with, as far as the run's stages up to `until` have them, for inference."""
    stages = ("classify", "decide", "expand", "shrink")
    had = [stage for stage in stages[: stages.index(until) + 1] if stage in config.stages]
    net = trained_net(config, num_classes).to(device).eval()
    decision = trained_decision(config, net).to(device).eval() if "decide" in had else None
    expansion = trained_expansion(config, net).to(device).eval() if "expand" in had else None
    shrinkage = None
    if "shrink" in had and expansion is not None:
        shrinkage = trained_shrinkage(config, expansion).to(device).eval()
    return net, decision, expansion, shrinkage


def affinity_net(config: Config, num_classes: int) -> AffinityNet:
    """A new AffinityNet, at output stride 8 as PSA has it."""
    model = replace(config.model, output_stride=8)
    return AffinityNet(_initial_backbone(config, model, num_classes))


def irn_net(config: Config, num_classes: int) -> IrnNet:
    """A new IRNet; its backbone never learns."""
    model = replace(config.model, freeze="all")
    return IrnNet(_initial_backbone(config, model, num_classes))


def trained_affinity_net(config: Config) -> AffinityNet:
    """AffinityNet as psa handed it over."""
    model = replace(config.model, output_stride=8)
    return _restore(AffinityNet(build_backbone(model, pretrained=False)), config, "psa")


def trained_irn_net(config: Config) -> IrnNet:
    """IRNet as irn handed it over."""
    model = replace(config.model, freeze="all")
    return _restore(IrnNet(build_backbone(model, pretrained=False)), config, "irn")


def deeplab(config: Config, num_classes: int) -> DeepLab:
    """A new DeepLab, its backbone as segment.model has it."""
    torch.manual_seed(config.seed)
    return DeepLab(build_backbone(config.segment.model), num_classes + 1, config.segment.rates)


def trained_deeplab(config: Config, num_classes: int) -> DeepLab:
    """DeepLab as segment handed it over."""
    net = DeepLab(build_backbone(config.segment.model, pretrained=False), num_classes + 1, config.segment.rates)
    return _restore(net, config, "segment")


def initial_weights(model: BackboneConfig) -> str:
    """What a network started from, for people: the data it was trained on and the file, if it was a file."""
    if model.weights == "none":
        return "random"
    path = Path(model.weights)
    name = f"{path.name} {sha256(path)[:8]}" if path.is_file() else "the library's own"
    return f"{model.pretrained_on} ({model.backbone}, {name})"


def _initial_backbone(config: Config, model: ModelConfig, num_classes: int) -> Backbone:
    """As model.weights has it; where there are none, as classify trained it."""
    torch.manual_seed(config.seed)
    if model.weights != "none":
        return build_backbone(model, pretrained=True)
    backbone = build_backbone(model, pretrained=False)
    backbone.load_state_dict(trained_net(config, num_classes).backbone.state_dict())
    torch.manual_seed(config.seed)  # building the trained network has drawn from it
    return backbone


def _restore(module: _Module, config: Config, stage: str) -> _Module:
    folder = Path(config.run_dir, stage)
    path = folder / WEIGHTS
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be used ({error}): delete {folder} to run the stage again") from error
    return module
