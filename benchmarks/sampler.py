"""The sampler against torchvision.ops.deform_conv2d: errors in float64, time forward + backward to the offsets only.

python benchmarks/sampler.py [--device cuda] [--repeats 5] [--threads 2]   prints markdown tables.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from esol.models.sampler import deform_conv

SHAPES = [(8, 1280, 256, 14), (4, 2048, 256, 32)]
SIZES = [(14, 14), (13, 32), (7, 5), (1, 9)]
OFFSETS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": lambda o: o * 0,
    "small (deviation 0.7)": lambda o: o * 0.7,
    "whole numbers": lambda o: (o * 3).round(),
    "over the border (deviation 8)": lambda o: o * 8,
    "a third far outside (1e4)": lambda o: torch.where(o > 0.43, o * 1e4, o),
}


def theirs(x: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """The reference."""
    return torchvision.ops.deform_conv2d(x, offset, weight, padding=1)


def machine(device: str) -> str:
    """One line that says where the numbers come from."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu()
    return (
        f"{name}, {torch.get_num_threads()} threads, {datetime.date.today()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    )


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def errors(device: str) -> None:
    """Largest relative error in float64 over odd sizes, by kind of offset."""
    print("| offsets | forward | gradient of the offsets |\n|---|---|---|")
    for name, shape in OFFSETS.items():
        forward, backward = 0.0, 0.0
        for height, width in SIZES:
            x = torch.randn(2, 64, height, width, dtype=torch.float64, device=device)
            weight = torch.randn(32, 64, 3, 3, dtype=torch.float64, device=device)
            offset = shape(torch.randn(2, 18, height, width, dtype=torch.float64, device=device)).requires_grad_()
            ours, want = deform_conv(x, weight, offset), theirs(x, weight, offset)
            upstream = torch.randn_like(ours)
            grads = [torch.autograd.grad(y, offset, upstream)[0] for y in (ours, want)]
            forward = max(forward, _relative(ours, want))
            backward = max(backward, _relative(*grads))
        print(f"| {name} | {forward:.1e} | {backward:.1e} |")


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-3)).item()


def timing(device: str, repeats: int) -> None:
    """Median seconds of both, taken turn by turn in this process; x and the kernel are frozen."""
    print("| shape | torchvision | project, then sample | ratio | lowest ratio |\n|---|---|---|---|---|")
    for batch, before, after, side in SHAPES:
        x = torch.randn(batch, before, side, side, device=device)
        weight = torch.randn(after, before, 3, 3, device=device) / (3 * before**0.5)
        offset = (0.7 * torch.randn(batch, 18, side, side, device=device)).requires_grad_()
        seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
        for turn in range(repeats + 1):
            for name, function in (("theirs", theirs), ("ours", deform_conv)):
                took = _time(function, x, weight, offset, device)
                if turn:  # the first warms up
                    seconds[name].append(took)
        ratios = [a / b for a, b in zip(seconds["theirs"], seconds["ours"], strict=True)]
        slow, fast = (statistics.median(seconds[name]) for name in ("theirs", "ours"))
        print(
            f"| {before} -> {after}, {side}x{side}, batch {batch} | {slow * 1000:.1f} ms | {fast * 1000:.1f} ms "
            f"| {statistics.median(ratios):.1f}x | {min(ratios):.1f}x |"
        )


def _time(function: Callable[..., Tensor], x: Tensor, weight: Tensor, offset: Tensor, device: str) -> float:
    start = time.perf_counter()
    (gradient,) = torch.autograd.grad(function(x, weight, offset).sum(), offset)
    if device == "cuda":
        torch.cuda.synchronize()
    assert gradient.shape == offset.shape
    return time.perf_counter() - start


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(machine(options.device), "\n")
    errors(options.device)
    print()
    timing(options.device, options.repeats)


if __name__ == "__main__":
    main()
