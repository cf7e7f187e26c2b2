"""Batch norm folded into convolutions: for inference for good, in training at each step."""

from __future__ import annotations

from copy import deepcopy
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from esol.base.errors import ConfigError
from esol.models.backbones import Backbone
from esol.models.phased import PhasedConv2d

SAME = 1e-3  # of the largest feature of a level: more than rounding, less than any mistake
_Net = TypeVar("_Net", bound=nn.Module)


def for_inference(net: _Net, device: torch.device, kind: torch.dtype | None) -> _Net:
    """The network in eval mode on a device, for forward passes alone: its state is no longer that of a file.

    kind: what autocast computes in, None for float32. Convolutions hold their weights in that type, since autocast
    casts weights that do not learn again at every call. The numbers are the same but for rounding.
    """
    net = net.to(device).eval().requires_grad_(False)
    for backbone in _backbones(net):
        fold_batch_norm(backbone)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, PhasedConv2d)):
            module.to(kind or module.weight.dtype).to(memory_format=torch.channels_last)
    return net


def for_training(net: nn.Module, kind: torch.dtype | None) -> None:
    """Makes the backbones of a network or task ready to be trained or passed through; fold_norms says how."""
    for backbone in _backbones(net):
        fold_norms(backbone, kind)


def _backbones(net: nn.Module) -> list[Backbone]:
    return [module for module in net.modules() if isinstance(module, Backbone)]


@torch.no_grad()
def fold_batch_norm(backbone: Backbone) -> int:
    """Folds every batch norm that follows a convolution into it; returns how many, 0 where the features then differ.

    Which follows which is seen in a forward pass. It is checked by another one, because a convolution's output might
    be used elsewhere too, as in networks whose norms come first; such a network stays as it is.
    """
    body, image = backbone.body, _probe(backbone)
    found = _pairs(backbone, image)
    if not found:
        return 0
    before, original = _features(backbone, image), deepcopy(body)
    names = {module: name for name, module in body.named_modules()}
    for conv, norm in found:
        weight, bias = _fused(conv, norm)
        conv.weight, conv.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        parent, _, own = names[norm].rpartition(".")
        setattr(body.get_submodule(parent), own, _rest(norm))
    if _same(before, _features(backbone, image)):
        return len(found)
    backbone.body = original
    return 0


@torch.no_grad()
def fold_norms(backbone: Backbone, kind: torch.dtype | None) -> int:
    """Folds every batch norm into the convolution before it in a network that is trained, which saves its passes.

    Parameters, state and what is learned stay as they were: a convolution computes with its weights times the norm's
    scale, and gradients reach both through that product. Where neither learns, the product is made now, in the type
    `kind` that autocast computes in (None for float32). To be called when the weights are there, before an engine takes
    them over. Returns how many norms, 0 where the features would differ, as fold_batch_norm has it.
    """
    image = _probe(backbone)
    found = _pairs(backbone, image)
    if not found:
        return 0
    before = _features(backbone, image)
    for conv, norm in found:
        vars(conv)["norm"] = norm  # no part of the convolution, whose parameters and state stay as they are
        conv.forward = MethodType(_folded_forward, conv)
        norm.forward = _rest(norm).forward  # type: ignore[union-attr]
    same = _same(before, _features(backbone, image))
    for conv, norm in found:
        if not same:
            del conv.forward, norm.forward, vars(conv)["norm"]
        elif not any(parameter.requires_grad for parameter in (*conv.parameters(), *norm.parameters())):
            weight, bias = _fused(conv, norm)
            weight = weight.to(kind, memory_format=torch.channels_last)
            conv.register_buffer("folded_weight", weight, persistent=False)
            conv.register_buffer("folded_bias", bias, persistent=False)
    return len(found) if same else 0


def _folded_forward(conv: Any, x: Tensor) -> Tensor:
    """What the convolution's own class computes, with the weights of convolution and norm together."""
    if "folded_weight" in conv._buffers:
        weight, bias = conv.folded_weight, conv.folded_bias
    else:
        weight, bias = _fused(conv, vars(conv)["norm"])
    own = object.__new__(type(conv))  # copy() would do, but torch.compile cannot look into it
    vars(own).update(vars(conv), _parameters={}, weight=weight, bias=bias)
    result: Tensor = type(conv).forward(own, x)
    return result


def _fused(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of convolution and norm together, differentiable in both."""
    inverse = torch.rsqrt(norm.running_var + norm.eps)
    bias = (0 if conv.bias is None else conv.bias) - norm.running_mean
    return conv.weight * (norm.weight * inverse).view(-1, 1, 1, 1), bias * inverse * norm.weight + norm.bias


def _probe(backbone: Backbone) -> Tensor:
    """A photo by which two forms of a network are compared."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, 65, 65), dtype=torch.uint8, generator=random).to(backbone.mean.device)


def _same(features: list[Tensor], others: list[Tensor]) -> bool:
    return all((x - was).abs().max() <= SAME * was.abs().max() for x, was in zip(others, features, strict=True))


def _features(backbone: Backbone, image: Tensor) -> list[Tensor]:
    """The last features, and those of every level where there are levels: they may be taken before a norm."""
    try:
        return [backbone(image), *backbone.pyramid(image)]
    except ConfigError:
        return [backbone(image)]


def _pairs(backbone: Backbone, image: Tensor) -> list[tuple[Any, Any]]:
    """Convolutions whose output goes into a batch norm as it is, with that norm."""
    made: list[tuple[Tensor, nn.Module]] = []  # tensors are held, so that none takes another's place
    found: list[tuple[Any, Any]] = []

    def after(module: nn.Module, inputs: Any, output: Tensor) -> None:
        made.append((output, module))

    def before(module: nn.Module, inputs: Any) -> None:
        found.extend((conv, module) for output, conv in made if output is inputs[0])

    hooks = []
    for module in backbone.body.modules():
        if isinstance(module, (nn.Conv2d, PhasedConv2d)):
            hooks.append(module.register_forward_hook(after))
        elif isinstance(module, nn.BatchNorm2d) and _rest(module) is not None:
            hooks.append(module.register_forward_pre_hook(before))
    backbone(image)
    for hook in hooks:
        hook.remove()
    return found


def _rest(norm: nn.BatchNorm2d) -> nn.Module | None:
    """What a batch norm does besides: nothing, or the activation of timm's; None for one of another kind."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    if type(norm).__name__ == "BatchNormAct2d" and isinstance(norm.drop, nn.Identity):
        return norm.act  # type: ignore[return-value]
    return None
