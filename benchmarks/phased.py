"""Depthwise convolutions of a wide dilation on a CPU: phase by phase against PyTorch's own, in one run, in turns.

    python -m benchmarks.phased

The last row is a whole backbone as PSA and DeepLab have it, with random weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common import interleaved, machine, ratio, table
from esol.config import BackboneConfig
from esol.models.backbones import build_backbone
from esol.models.phased import PhasedConv2d

SHAPES = ((1152, 5, 4), (1152, 3, 8), (1152, 7, 4), (672, 5, 2), (1152, 3, 4))  # channels, side of the kernel, dilation
ROUNDS = 5


def timed(way: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], float]:
    """A call of way(x) that returns its milliseconds; one went before it."""
    way(x)

    def call() -> float:
        begun = time.perf_counter()
        way(x)
        return 1e3 * (time.perf_counter() - begun)

    return call


def row(what: str, dtype: torch.dtype, plain: nn.Module, phased: nn.Module, x: Tensor) -> list[object]:
    """One line of the table."""
    found = interleaved({"plain": timed(plain, x), "phased": timed(phased, x)}, ROUNDS)
    return [what, str(dtype)[6:], *(statistics.median(f) for f in found.values()), ratio(found, "plain", "phased")]


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for channels, side, dilation in SHAPES:
            padding = dilation * (side // 2)
            plain = nn.Conv2d(channels, channels, side, 1, padding, dilation, channels, bias=False).to(dtype)
            x = torch.randn(8, channels, 28, 28, dtype=dtype).contiguous(memory_format=torch.channels_last)
            what = f"{channels} channels, {side}x{side}, dilation {dilation}, padding {padding}"
            rows.append(row(what, dtype, plain, PhasedConv2d(plain), x))
    config = BackboneConfig("timm:tf_efficientnet_lite0", weights="none", output_stride=8, freeze="all")
    net, bare = build_backbone(config).eval(), build_backbone(config).eval()
    unphase(bare)
    image = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        rows.append(row("EfficientNet-Lite0 at stride 8, eight photos of 224", torch.bfloat16, bare, net, image))
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
