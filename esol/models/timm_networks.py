"""Networks of timm's up to their heads: convolutional ones, plain ViTs, and Swin and ConvNeXt with their levels.

Some cut a photo into patches. A patch has an even side and no pixel in its middle, so that "feature (i, j) looks at
pixel (i * stride, j * stride)" is no matter of padding by whole pixels. Here the photo stands in the middle of a grid
of ceil(H / stride) x ceil(W / stride) cells, its last rows and columns repeated on both sides. At multiples of the
stride that is the photo itself, at multiples plus one every cell's middle is the pixel that the house expects, and the
mirror image has the mirrored grid.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from esol.base.errors import ConfigError, StrideError

LEVELS = 4  # of a plain ViT: the outputs of blocks that are evenly spaced, the last block's are the features


def on_patches(image: Tensor, stride: int, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, C, ceil(H / stride) * patch, ceil(W / stride) * patch): stride pixels become a patch wide.

    Bilinear, with a wider triangle where it shrinks. Where stride and patch are equal and divide both sides, the same
    numbers.
    """
    for axis in (2, 3):
        length = image.shape[axis]
        cells = (length + stride - 1) // stride
        place = torch.arange(cells * patch, dtype=torch.float64, device=image.device)
        place = (place + 0.5) * (stride / patch) - 0.5 - (cells * stride - length) / 2
        image = _at(image, axis, place, max(stride / patch, 1.0))
    return image


def on_level(level: Tensor, stride: int, coarsest: int, size: tuple[int, int]) -> Tensor:
    """A level (B, C, h, w) of the grid for the coarsest stride, on the grid for its own stride: (B, C, *cells).

    size: H and W of the photo. Between cells it is bilinear: middles of fine cells lie beside those of coarse ones.
    """
    for axis, length in zip((2, 3), size, strict=True):
        cells, coarse = (length + stride - 1) // stride, (length + coarsest - 1) // coarsest
        shift = ((coarse * coarsest - length) - (cells * stride - length)) / (2 * stride)
        place = torch.arange(cells, dtype=torch.float64, device=level.device) + shift
        level = _at(level, axis, place, 1.0)
    return level


def _at(x: Tensor, axis: int, place: Tensor, reach: float) -> Tensor:
    """x along an axis at fractional places: means of what is nearer than reach, the ends repeated."""
    # Taps and indices, whatever the size, and no branch: what torch.export notes of it then holds for every size.
    first, shape = (place - reach).ceil(), [-1 if own == axis else 1 for own in range(4)]
    weights = [(1 - (first + tap - place).abs() / reach).clamp_min(0) for tap in range(int(2 * reach) + 1)]
    whole = torch.stack(weights).sum(0)
    total: Tensor | None = None
    for tap, weight in enumerate(weights):
        index = (first + tap).clamp(0, x.shape[axis] - 1).long()
        part = x.index_select(axis, index) * (weight / whole).to(x.dtype).view(shape)
        total = part if total is None else total + part
    assert total is not None
    return total


class TimmFeatures(nn.Module):
    """A timm network up to its head."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """The features that the head would pool."""
        return self.net.forward_features(x)  # type: ignore[operator]

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """The features of every level, finest first; the last are forward's, which some networks widen once more."""
        if not hasattr(self.net, "forward_intermediates"):
            raise ConfigError(
                f"model.backbone: timm's {type(self.net).__name__} has no forward_intermediates, and so no "
                "feature levels for psa and irn: choose another network or leave these stages out"
            )
        last, levels = self.net.forward_intermediates(x)  # type: ignore[operator]
        return [*levels[:-1], last]


class TokenFeatures(nn.Module):
    """A plain ViT up to its head, at a stride: the photo is scaled so that the network's patches are as far apart.

    Class and register tokens are left out of the features. All levels have the one stride; their blocks' outputs go
    through the network's last norm, as DINOv2's dense heads have them.
    """

    def __init__(self, net: nn.Module, stride: int) -> None:
        super().__init__()
        self.net, self.stride = net, stride
        self.patch = int(net.patch_embed.feat_ratio())  # type: ignore[union-attr,operator]
        self.prefix = int(net.num_prefix_tokens)  # type: ignore[arg-type]
        depth = len(net.blocks)  # type: ignore[arg-type]
        self.ends = sorted({depth * (i + 1) // LEVELS - 1 for i in range(LEVELS)} - {-1})

    def forward(self, x: Tensor) -> Tensor:
        """Normalised (B, 3, H, W) -> what timm's forward_features says of the patches, (B, C, h, w)."""
        x = on_patches(x, self.stride, self.patch)
        tokens = self.net.forward_features(x)[:, self.prefix :]  # type: ignore[operator]
        return tokens.unflatten(1, (x.shape[2] // self.patch, x.shape[3] // self.patch)).permute(0, 3, 1, 2)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """The features of every level, the last are forward's."""
        x = on_patches(x, self.stride, self.patch)
        levels = self.net.forward_intermediates(x, indices=self.ends, norm=True, intermediates_only=True)  # type: ignore[operator]
        return [level.contiguous(memory_format=torch.channels_last) for level in levels]


class PatchFeatures(nn.Module):
    """A network of timm's up to its head whose levels are made of patches of patches; stride: of the last level."""

    def __init__(self, net: nn.Module, strides: list[int]) -> None:
        super().__init__()
        self.net, self.strides = net, strides
        self.last = getattr(net, "output_fmt", "NCHW") == "NHWC"  # channels are the last dimension

    def forward(self, x: Tensor) -> Tensor:
        """Normalised (B, 3, H, W) -> the features that the head would pool, (B, C, h, w)."""
        return self._turned(self.net.forward_features(on_patches(x, self.strides[-1], self.strides[-1])))  # type: ignore[operator]

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """The features of every level, finest first; the last are forward's."""
        size, coarsest = (x.shape[2], x.shape[3]), self.strides[-1]
        last, levels = self.net.forward_intermediates(on_patches(x, coarsest, coarsest))  # type: ignore[operator]
        own = [on_level(level, stride, coarsest, size) for level, stride in zip(levels, self.strides, strict=True)]
        return [*own[:-1], self._turned(last)]

    def _turned(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if self.last else x


def network(name: str, stride: int) -> nn.Module:
    """timm's network of that name, with random weights and without a classifier, for features of that stride.

    Transformers are told to take photos of any size. StrideError where the network cannot have the stride.
    """
    net, where = _any_size(name), f"model.backbone = 'timm:{name}'"
    if net is None:
        return _convolutional(name, stride, where)
    if not is_plain(net) and stride != (own := net.feature_info[-1]["reduction"]):
        raise StrideError(
            f"{where} has features of stride {own} alone, not of model.output_stride = {stride}: set that to {own} for "
            "class maps; for DeepLab, which has 8, choose another network, such as timm:convnext_tiny or a plain ViT"
        )
    return net


def _any_size(name: str) -> Any:
    """The network if it is a transformer that can be told to take photos of any size, else None."""
    import timm

    options: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False})
    for option in options:
        try:
            return timm.create_model(name, num_classes=0, drop_path_rate=0.0, **option)
        except TypeError:  # no such option: a network of another kind, or an older timm
            continue
    return None


def _convolutional(name: str, stride: int, where: str) -> nn.Module:
    import timm

    options: dict[str, Any] = {} if stride == 32 else {"output_stride": stride}
    try:
        return timm.create_model(name, num_classes=0, **options)
    except (TypeError, NotImplementedError, AssertionError) as error:
        raise StrideError(
            f"{where} cannot be built at model.output_stride = {stride}: {error}; try 32 or another network"
        ) from error


def is_plain(net: nn.Module) -> bool:
    """Whether it is a plain ViT that takes any size: tokens of a grid, and some without a place, from end to end."""
    return hasattr(net, "dynamic_img_size") and hasattr(net, "num_prefix_tokens")


def has_patch_stem(net: nn.Module) -> bool:
    """Whether a network with levels begins with patches that do not overlap."""
    first = next((module for module in net.modules() if isinstance(module, nn.Conv2d)), None)
    patches = first is not None and first.kernel_size == first.stride and first.padding == (0, 0)
    return patches and first.stride > (1, 1) and hasattr(net, "forward_intermediates")  # type: ignore[union-attr]


def until_block(net: nn.Module, share: float) -> set[str]:
    """The parameters of a plain ViT before its blocks, and those of so large a share of the blocks."""
    blocks = tuple(f"blocks.{i}." for i in range(int(len(net.blocks) * share)))  # type: ignore[arg-type]
    before = ("patch_embed.", "pos_embed", "cls_token", "reg_token", "dist_token", "norm_pre.", "rope.")
    return {name for name, _ in net.named_parameters() if name.startswith((*before, *blocks))}


def freeze_heads(net: nn.Module) -> None:
    """Nothing learns that the features do not depend on: DistributedDataParallel would wait for its gradients."""
    for part in ("head", "fc_norm", "attn_pool"):
        if isinstance(own := getattr(net, part, None), nn.Module):
            own.requires_grad_(False)


def own_layout(net: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    """timm's own way from the names in files of a transformer's authors, or of older versions of timm, to its own."""
    convert: Any = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    return partial(convert, model=net) if convert and hasattr(net, "patch_embed") else None
