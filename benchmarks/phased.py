"""Depthwise convolutions of a wide dilation on a CPU: phase by phase against PyTorch's own, in one run, in turns.

    python -m benchmarks.phased

Forward, and with the gradients of input and weights. The last column is how far the latter are from float64's: in bf16
those of PyTorch 2.15 are nonsense on grids of more than 28 pixels. The last row is a whole backbone as PSA and DeepLab
have it, with random weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from benchmarks.common import interleaved, machine, ratio, table
from esol.config import BackboneConfig
from esol.models.backbones import build_backbone
from esol.models.phased import WIDE, PhasedConv2d

SHAPES = ((1152, 5, 4), (1152, 3, 8), (1152, 7, 4), (672, 5, 2), (1152, 3, 4))  # channels, side of the kernel, dilation
ROUNDS = 5


Way = Callable[[Tensor], object]


def timed(way: Way, x: Tensor) -> Callable[[], float]:
    """A call of way(x) that returns its milliseconds; one went before it."""
    way(x)

    def call() -> float:
        begun = time.perf_counter()
        way(x)
        return 1e3 * (time.perf_counter() - begun)

    return call


def row(what: str, dtype: torch.dtype, plain: Way, phased: Way, x: Tensor, wrong: str = "") -> list[object]:
    """One line of the table."""
    found = interleaved({"plain": timed(plain, x), "phased": timed(phased, x)}, ROUNDS)
    medians = [statistics.median(f) for f in found.values()]
    return [what, str(dtype)[6:], *medians, ratio(found, "plain", "phased"), wrong]


def with_gradients(layer: nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Forward, and the gradients of input and weights, which it returns."""

    def step(x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        y = layer(x)
        return torch.autograd.grad(
            y, [x, *layer.parameters()], torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        )

    return step


def error(layer: nn.Module, plain: nn.Conv2d, x: Tensor) -> str:
    """Largest difference of the weights' gradient from that of float64, in percent of the largest one."""
    x = x[:2]
    exact = with_gradients(deepcopy(plain).double())(x.double())[1]
    return f"{100 * float((with_gradients(layer)(x)[1] - exact).abs().max() / exact.abs().max()):.2g}"


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for channels, side, dilation in SHAPES:
            padding = dilation * (side // 2)
            plain = nn.Conv2d(channels, channels, side, 1, padding, dilation, channels, bias=False).to(dtype)
            x = torch.randn(8, channels, 29, 29, dtype=dtype).contiguous(memory_format=torch.channels_last)
            what, phased = f"{channels} channels, {side}x{side}, dilation {dilation}", PhasedConv2d(plain)
            if padding >= WIDE:
                rows.append(row(what, dtype, torch.no_grad()(plain), torch.no_grad()(phased), x))
            wrong = f"{error(plain, plain, x)}, {error(phased, plain, x)}"
            rows.append(row(f"{what}, gradients", dtype, with_gradients(plain), with_gradients(phased), x, wrong))
    config = BackboneConfig("timm:tf_efficientnet_lite0", weights="none", output_stride=8, freeze="all")
    net, bare = build_backbone(config).eval(), build_backbone(config).eval()
    unphase(bare)
    image = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        rows.append(row("EfficientNet-Lite0 at stride 8, eight photos of 224", torch.bfloat16, bare, net, image))
    heads = ("what", "precision", "plain, ms", "phased, ms", "ratio", "error of weights' gradients, %: plain, phased")
    print(f"{machine()}, one thread\n\n{table(heads, rows)}")


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
