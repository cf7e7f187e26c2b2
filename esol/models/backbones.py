"""Backbones: torchvision ResNets, any timm network, and a small one that trains from scratch."""

from __future__ import annotations

import difflib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from esol.base.errors import ConfigError, WeightsError
from esol.base.named import Named
from esol.config import BackboneConfig
from esol.models.initial_weights import from_caffe, load_initial_weights
from esol.models.phased import phase_dilations
from esol.models.timm_networks import (
    PatchFeatures,
    TimmFeatures,
    TokenFeatures,
    freeze_heads,
    has_patch_stem,
    is_plain,
    own_layout,
    until_block,
)
from esol.models.timm_networks import network as timm_network

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CAFFE_MEAN = (122.675 / 255, 116.669 / 255, 104.008 / 255)  # RGB; DeepLab-v2's networks have no deviation


class Chain(nn.Sequential):
    """Layers in a row; a feature level ends at each child named in `ends`, the last one at the last child."""

    def __init__(self, layers: OrderedDict[str, nn.Module], ends: tuple[str, ...]) -> None:
        super().__init__(layers)
        self.ends = ends

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """The features of every level, finest first."""
        levels = []
        for name, layer in self.named_children():
            x = layer(x)
            if name in self.ends:
                levels.append(x)
        return levels


class Backbone(nn.Module):
    """A feature network that normalises its own input and never updates batch norm statistics.

    channels: of the features; stride: input pixels per feature pixel; mean, std: of its normalisation, on a 0..1 scale.
    levels: (channels, stride) of each level of the pyramid, finest first; the last level is the features.
    freeze: "all" lets nothing learn and stores no activations, with "none" everything learns; fixed: the other values
    that it may have, each with whether a parameter stays as it is then. Batch norm uses its running statistics always;
    its scale and shift learn with the stage they are in, as IRN has it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        body: Chain | TimmFeatures | TokenFeatures | PatchFeatures,
        freeze: str,
        fixed: Mapping[str, Callable[[str], bool]],
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if freeze not in ("none", "all", *fixed):
            raise ConfigError(f"model.freeze = {freeze}: this backbone can have {', '.join(('none', *fixed, 'all'))}")
        phase_dilations(body)
        self.body = body
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)
        for name, parameter in body.named_parameters():
            parameter.requires_grad_(freeze != "all" and (freeze == "none" or not fixed[freeze](name)))
        self.frozen = freeze == "all"
        self.eval()
        side = 64
        try:
            with torch.no_grad():
                features = self(torch.zeros(1, 3, side, side, dtype=torch.uint8))
        except (AssertionError, RuntimeError) as error:
            kind = type(getattr(body, "net", body)).__name__
            raise ConfigError(
                f"model.backbone: {kind} does not take photos of any size ({error}): choose another network"
            ) from error
        if features.ndim != 4 or features.shape[2] != features.shape[3]:
            raise ConfigError(
                f"model.backbone: {type(body).__name__} gives features of shape {tuple(features.shape)}, not "
                "(B, channels, h, w): choose a convolutional one"
            )
        self.channels = features.shape[1]
        self.stride = _stride(side, features)
        self.train()

    def train(self, mode: bool = True) -> Backbone:
        """Sets the mode of everything but batch norm, which stays in eval."""
        super().train(mode and not self.frozen)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        """uint8 or float (B, 3, H, W), RGB 0..255 -> features (B, channels, ceil(H/stride), ceil(W/stride)).

        resnet101-caffe, whose pooling rounds up, has one more where a side is a multiple of the stride.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.body(self._normalised(image))

    def pyramid(self, image: Tensor) -> list[Tensor]:
        """What forward takes -> the features of every level, finest first; ConfigError where there are no levels."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.body.pyramid(self._normalised(image))

    @cached_property
    def levels(self) -> tuple[tuple[int, int], ...]:
        side = 64
        with torch.no_grad():
            features = self.pyramid(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.mean.device))
        return tuple((level.shape[1], _stride(side, level)) for level in features)

    def _normalised(self, image: Tensor) -> Tensor:
        x = (image.to(self.mean.dtype) - self.mean) / self.std
        # Activations in this format are about twice as fast on a CPU; the weights may stay as files have them.
        return x.contiguous(memory_format=torch.channels_last)


def _stride(side: int, features: Tensor) -> int:
    """The power of two: where pooling rounds up there may be one feature more than side / stride."""
    return 2 ** math.ceil(math.log2(side / features.shape[2]))


def _of(parts: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a parameter belongs to one of the parts that a network is made of."""
    return lambda name: name.split(".")[0] in parts


_OF_A_RESNET = {
    "stem": _of(("conv1", "bn1", "layer1", "layer2")),
    "body": _of(("conv1", "bn1", "layer1", "layer2", "layer3")),
}

Build = Callable[[BackboneConfig, bool], Backbone]
BACKBONES: Named[Build] = Named("backbone")
"""By name, or by what stands before a colon: builds the network of a section, with its weights where the second
argument says so; raises what build_backbone raises."""


def build_backbone(config: BackboneConfig, pretrained: bool = True) -> Backbone:
    """The backbone that the `model` section names: resnet50, resnet101, resnet101-caffe, small, timm:<name>, or a
    plugin's.

    pretrained False leaves the weights random, for a network whose trained state is loaded right after.
    WeightsError where the weights cannot be had or do not fit; ConfigError for an unknown name.
    """
    name, colon, _ = config.backbone.partition(":")
    if colon and f"{name}:" in BACKBONES:
        name += ":"
    elif config.backbone not in BACKBONES:
        known = [f"{own}<name>" if own.endswith(":") else own for own in BACKBONES]
        raise ConfigError(f"model.backbone = {config.backbone!r}: must be one of {', '.join(known)}")
    return BACKBONES[name](config, pretrained)


@BACKBONES.add("small")
def _small(config: BackboneConfig, pretrained: bool) -> Backbone:
    if pretrained and config.weights not in ("", "none"):
        raise WeightsError(f"model.weights = {config.weights}: the small backbone has no weights; use none")
    fixed = {"stem": _of(("0", "1", "3", "4")), "body": _of(("0", "1", "3", "4", "6", "7", "9", "10"))}
    return Backbone(small(config.output_stride), config.freeze, fixed)


def small(output_stride: int) -> Chain:
    """Five 3x3 convolutions with group norm, 3 -> 32 -> 64 -> 96 -> 128 -> 128 channels; trains from scratch."""
    widths = (32, 64, 96, 128, 128)
    strides = {8: (2, 2, 2, 1, 1), 16: (2, 2, 2, 2, 1), 32: (2, 2, 2, 2, 2)}[output_stride]
    layers: list[nn.Module] = []
    previous = 3
    for width, stride in zip(widths, strides, strict=True):
        layers += [nn.Conv2d(previous, width, 3, stride, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU(inplace=True)]
        previous = width
    named = OrderedDict((str(i), layer) for i, layer in enumerate(layers))
    return Chain(named, tuple(str(i) for i in range(2, len(layers), 3)))


@BACKBONES.add("resnet50")
@BACKBONES.add("resnet101")
def _resnet(config: BackboneConfig, pretrained: bool) -> Backbone:
    from torchvision import models

    # Stride 8 dilates, as in DeepLab. Stride 16 is IRN's strides (2, 2, 2, 1): the last stage at stride 1, not dilated.
    net = getattr(models, config.backbone)(
        replace_stride_with_dilation=(False, True, True) if config.output_stride == 8 else None
    )
    if config.output_stride == 16:
        net.layer4[0].conv2.stride = net.layer4[0].downsample[0].stride = (1, 1)
    layers = OrderedDict((k, m) for k, m in net.named_children() if k not in ("avgpool", "fc"))
    body = Chain(layers, ("maxpool", "layer1", "layer2", "layer3", "layer4"))
    source = getattr(models, f"ResNet{config.backbone[6:]}_Weights").IMAGENET1K_V1  # what IRN starts from
    if pretrained and config.weights != "none":
        expected = f"torchvision's {source.url.rsplit('/', 1)[-1]}"
        load_initial_weights(body, config, expected, lambda: source.get_state_dict(progress=False), "fc.")
    return Backbone(body, config.freeze, _OF_A_RESNET)


@BACKBONES.add("resnet101-caffe")
def _caffe_resnet(config: BackboneConfig, pretrained: bool) -> Backbone:
    """DeepLab-v2's ResNet-101, what files "with COCO initialisation" are for.

    Unlike torchvision's it strides in the first 1x1 convolution of a stage, dilates all blocks of a dilated stage,
    rounds up when pooling, and wants no division by a deviation.
    """
    from torchvision import models

    net = models.resnet101()
    net.maxpool.ceil_mode = True
    strides = {8: (2, 1, 1), 16: (2, 2, 1), 32: (2, 2, 2)}[config.output_stride]
    dilation = 1
    for stage, stride in zip((net.layer2, net.layer3, net.layer4), strides, strict=True):
        dilation *= 2 // stride
        stage[0].conv1.stride = stage[0].downsample[0].stride = (stride, stride)
        for block in stage:
            block.conv2.stride, block.conv2.dilation, block.conv2.padding = (1, 1), (dilation,) * 2, (dilation,) * 2
    body = Chain(
        OrderedDict((k, m) for k, m in net.named_children() if k not in ("avgpool", "fc")),
        ("maxpool", "layer1", "layer2", "layer3", "layer4"),
    )
    if pretrained and config.weights != "none":
        load_initial_weights(
            body, config, "a PyTorch file of DeepLab's ResNet-101", _no_caffe_hub, "fc.", "aspp.", rename=from_caffe
        )
    return Backbone(body, config.freeze, _OF_A_RESNET, CAFFE_MEAN, (1 / 255,) * 3)


def _no_caffe_hub() -> dict[str, Tensor]:
    raise FileNotFoundError("no hub has them")


@BACKBONES.add("timm:")
def _timm(config: BackboneConfig, pretrained: bool) -> Backbone:
    import timm

    name = config.backbone.removeprefix("timm:")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"; did you mean timm:{close[0]}?" if close else ""
        raise ConfigError(f"model.backbone = {config.backbone!r}: timm {timm.__version__} has no such network{hint}")
    net: Any = timm_network(name, config.output_stride)
    about = net.pretrained_cfg
    if pretrained and config.weights != "none":
        expected = f"model.safetensors of {about.get('hf_hub_id') or name} on timm's hub"
        heads = about.get("classifier") or "head"
        heads = (heads,) if isinstance(heads, str) else heads
        load_initial_weights(
            net,
            config,
            expected,
            lambda: timm.create_model(name, pretrained=True, num_classes=0).state_dict(),
            *(f"{head}." for head in heads),
            rename=own_layout(net),
        )
    backbone = _of_timm(net, name, config)
    freeze_heads(net)
    return backbone


def _of_timm(net: Any, name: str, config: BackboneConfig) -> Backbone:
    """What freeze keeps, and how the photo comes on the network's grid, by what timm says of the network."""
    about = net.pretrained_cfg
    if is_plain(net):
        parts = {"stem": 0.5, "body": 0.75}
        fixed = {part: {f"net.{n}" for n in until_block(net, share)}.__contains__ for part, share in parts.items()}
        return Backbone(TokenFeatures(net, config.output_stride), config.freeze, fixed, about["mean"], about["std"])
    # Its levels say what each stage comes to without dilation: in order, since dilated ones all have stride 8.
    info = net.feature_info if isinstance(net.feature_info, list) else net.feature_info.info
    names = [parameter for parameter, _ in net.named_parameters()]
    ends = [max((i for i, n in enumerate(names) if n.startswith(f"{level['module']}.")), default=-1) for level in info]
    # the stem ends with the first level that reaches stride 8, which is what IRN freezes of a ResNet
    reached = next((i for i, level in enumerate(info) if level["reduction"] >= 8), 0)
    last = {"stem": ends[reached] if ends else -1, "body": ends[-2] if len(ends) > 1 else -1}
    if last.get(config.freeze, 0) < 0:
        raise ConfigError(
            f"model.freeze = {config.freeze}: timm does not say what the {config.freeze} of {name} is; use all or none"
        )
    fixed = {part: {f"net.{n}" for n in names[: end + 1]}.__contains__ for part, end in last.items()}
    body = PatchFeatures(net, [stage["reduction"] for stage in info]) if has_patch_stem(net) else TimmFeatures(net)
    return Backbone(body, config.freeze, fixed, about["mean"], about["std"])
