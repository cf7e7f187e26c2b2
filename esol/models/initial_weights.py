"""A backbone's initial weights: a file's or a hub's, fitted to the network's names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from esol.base.errors import WeightsError
from esol.config import BackboneConfig

_CAFFE_PARTS = {"reduce": ("conv1", "bn1"), "conv3x3": ("conv2", "bn2"), "increase": ("conv3", "bn3")}
_CAFFE_PARTS |= dict.fromkeys(("shortcut", "proj"), ("downsample.0", "downsample.1"))
_CAFFE_KEY = re.compile(r"layer([2-5])\.block(\d+)\.(\w+)\.(conv|bn)\.(\w+)")


def from_caffe(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DeepLab-v2's two public PyTorch files to torchvision's names, the first convolution from BGR to RGB.

    deeplab-pytorch (Nakashima): layer1.conv1.conv.weight, layer2.block1.reduce.bn.weight, aspp.c0.weight, below "base."
    or "scale."; pytorch-deeplab-resnet (Nanda): torchvision's names below "Scale.", layer5 is the ASPP.
    """
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^(module\.)?(base\.|scale\.|Scale\.)?", "", key)
        if match := _CAFFE_KEY.fullmatch(key):
            part = _CAFFE_PARTS.get(match[3], (match[3], match[3]))[match[4] == "bn"]
            key = f"layer{int(match[1]) - 1}.{int(match[2]) - 1}.{part}.{match[5]}"
        elif match := re.fullmatch(r"layer1\.conv1\.(conv|bn)\.(\w+)", key):
            key = f"{'conv1' if match[1] == 'conv' else 'bn1'}.{match[2]}"
        elif key.startswith("layer5."):
            key = f"aspp.{key}"
        renamed[key] = value
    if "conv1.weight" in renamed:
        renamed["conv1.weight"] = renamed["conv1.weight"].flip(1)
    return renamed


def load_initial_weights(
    net: nn.Module,
    config: BackboneConfig,
    expected: str,
    download: Callable[[], dict[str, Tensor]],
    *heads: str,
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Loads the local file, or downloads; what follows the features (keys that start with `heads`) is left out."""
    if config.weights:
        where = config.weights
        weights = _read(Path(config.weights), expected)
    else:
        where = expected
        try:
            weights = download()
        except Exception as error:  # hubs raise dozens of types
            raise WeightsError(
                f"cannot download the weights of model.backbone = {config.backbone} ({type(error).__name__}: {error}). "
                f"Put {expected} somewhere and give model.weights=/path/to/it (.safetensors or .pth), or none"
            ) from error
    if rename is not None:
        weights = rename(weights)
    wanted = net.state_dict()
    weights = {key: value for key, value in weights.items() if not key.startswith(heads)}
    weights.update({key: wanted[key] for key in wanted.keys() - weights.keys() if key.endswith("num_batches_tracked")})
    wrong = [f"lacks {key}" for key in wanted if key not in weights]
    wrong += [f"has {key}, which the network has not" for key in weights if key not in wanted]
    wrong += [
        f"{key} is {tuple(weights[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in weights and weights[key].shape != wanted[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(
            f"model.weights: {where} does not fit model.backbone = {config.backbone}: {'; '.join(wrong[:3])}{more}. "
            f"Expected is {expected}"
        )
    net.load_state_dict(weights)


def _read(path: Path, expected: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix in (".pth", ".pt"):  # torchvision's own format
            return torch.load(path, map_location="cpu", weights_only=True)
        return load_file(path)
    except FileNotFoundError as error:
        raise WeightsError(f"model.weights = {path}: no such file; put {expected} there") from error
    except (OSError, SafetensorError, RuntimeError, UnpicklingError) as error:
        raise WeightsError(
            f"model.weights = {path} cannot be read as .safetensors or .pth: {error}; expected is {expected}"
        ) from error
