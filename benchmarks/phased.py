"""Depthwise convolutions of a wide dilation on a CPU: phase by phase against PyTorch's own, in one run, in turns.

python -m benchmarks.phased
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common import machine, table
from esol.config import BackboneConfig
from esol.models.backbones import build_backbone
from esol.models.phased import PhasedConv2d

SHAPES = ((1152, 5, 4), (1152, 3, 8), (1152, 7, 4), (672, 5, 2), (1152, 3, 4))  # channels, side of the kernel, dilation
ROUNDS = 5


def seconds(ways: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Median of each way's seconds, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            if turn:  # the first one warms up
                taken[name].append(time.perf_counter() - begun)
    return {name: statistics.median(each) for name, each in taken.items()}


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for channels, side, dilation in SHAPES:
            plain = nn.Conv2d(channels, channels, side, 1, dilation * (side // 2), dilation, channels, bias=False)
            plain = plain.to(dtype)
            phased = PhasedConv2d(plain)
            x = torch.randn(8, channels, 28, 28, dtype=dtype).contiguous(memory_format=torch.channels_last)
            took = seconds({"plain": lambda c=plain, x=x: c(x), "phased": lambda c=phased, x=x: c(x)})  # type: ignore[misc]
            what = f"{channels} channels, {side}x{side}, dilation {dilation}, padding {plain.padding[0]}"
            rows.append([what, str(dtype)[6:], *(1e3 * t for t in took.values()), took["plain"] / took["phased"]])
    config = BackboneConfig("timm:tf_efficientnet_lite0", weights="none", output_stride=8, freeze="all")
    net, bare = build_backbone(config).eval(), build_backbone(config).eval()
    unphase(bare)
    image = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        took = seconds({"plain": lambda: bare(image), "phased": lambda: net(image)})
    what = "EfficientNet-Lite0 at stride 8, eight photos of 224"
    rows.append([what, "bfloat16", *(1e3 * t for t in took.values()), took["plain"] / took["phased"]])
    print(f"{machine()}, one thread\n\n{table(('what', 'precision', 'plain, ms', 'phased, ms', 'ratio'), rows)}")


def unphase(net: nn.Module) -> None:
    """Puts PyTorch's own convolutions back."""
    for parent in list(net.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, PhasedConv2d):
                channels, side = len(module.weight), module.weight.shape[-1]
                conv = nn.Conv2d(
                    channels, channels, side, 1, module.padding, module.dilation, channels, module.bias is not None
                )
                conv.load_state_dict(module.state_dict())
                setattr(parent, name, conv)


if __name__ == "__main__":
    main()
