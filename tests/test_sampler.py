"""The sampler against torchvision's operator and the ordinary convolution."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

from esol.models.sampler import OffsetBranch, Taps, deform_conv

OFFSETS = {
    "zero": lambda o: o * 0,
    "small": lambda o: o * 0.7,
    "whole": lambda o: (o * 3).round(),
    "over the border": lambda o: o * 5,
    "far outside": lambda o: o * 1e6,
    "just outside": lambda o: o.sign() * (3 - 1e-7),
}


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().abs().max() / want.detach().abs().max().clamp_min(1e-3))


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 5), (14, 14), (13, 32)])
@pytest.mark.parametrize("kind", list(OFFSETS))
def test_equals_torchvision_in_value_and_every_gradient(size: tuple[int, int], kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    offset = OFFSETS[kind](torch.randn(2, 18, *size, dtype=torch.float64)).requires_grad_()
    ours, theirs = deform_conv(x, weight, offset), deform_conv2d(x, offset, weight, padding=1)
    upstream = torch.randn_like(ours)
    assert _relative(ours, theirs) <= 1e-10
    got = torch.autograd.grad(ours, (offset, x, weight), upstream)
    want = torch.autograd.grad(theirs, (offset, x, weight), upstream)
    for a, b in zip(got, want, strict=True):
        assert _relative(a, b) <= 1e-10


def test_compiled_it_equals_torchvision_in_value_and_every_gradient() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    offset = (3 * torch.randn(2, 18, 7, 5, dtype=torch.float64)).requires_grad_()
    traced = torch.compile(deform_conv, backend="aot_eager", fullgraph=True, dynamic=False)
    ours, theirs = traced(x, weight, offset, Taps()), deform_conv2d(x, offset, weight, padding=1)
    upstream = torch.randn_like(ours)
    got, want = (torch.autograd.grad(result, (offset, x, weight), upstream) for result in (ours, theirs))
    for a, b in zip((ours, *got), (theirs, *want), strict=True):
        assert _relative(a, b) <= 1e-10


@pytest.mark.parametrize("size", [5, 14, 33, 63])
def test_zero_offsets_give_the_ordinary_convolution_and_the_same_offset_gradient_in_float32(size: int) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(2, 8, size, size), torch.randn(4, 8, 3, 3)
    offset = torch.zeros(2, 18, size, size, requires_grad=True)
    ours = deform_conv(x, weight, offset)
    assert _relative(ours, F.conv2d(x, weight, padding=1)) < 1e-4
    upstream = torch.randn_like(ours)
    (got,) = torch.autograd.grad(ours, offset, upstream)
    (want,) = torch.autograd.grad(deform_conv2d(x, offset, weight, padding=1), offset, upstream)
    assert _relative(got, want) < 1e-3  # one position rounded into the neighbouring cell would be off by about 1


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_runs_under_autocast_with_positions_in_float32(kind: torch.dtype) -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(2, 8, 40, 40), torch.randn(4, 8, 3, 3)
    offset = torch.full((2, 18, 40, 40), 0.3, requires_grad=True)
    want = deform_conv(x, weight, offset)
    with torch.autocast("cpu", dtype=kind):
        got = deform_conv(x, weight, offset)
    assert got.dtype == kind
    assert _relative(got.float(), want) < 0.03  # at column 39, bfloat16 positions would be off by up to 0.1 pixels
    got.float().square().mean().backward()
    assert offset.grad is not None
    assert offset.grad.dtype == torch.float32


def test_offset_branch_starts_at_zero_and_stays_within_its_bound() -> None:
    x = torch.randn(1, 4, 5, 5)
    branch, free = OffsetBranch(4, bound=1.5), OffsetBranch(4, bound=0)
    assert branch(x).shape == (1, 18, 5, 5)
    assert branch(x).abs().max() == 0
    for module in (branch, free):
        torch.nn.init.constant_(module.conv.bias, 100.0)  # type: ignore[arg-type]
    assert branch(x).abs().max() <= 1.5
    assert torch.equal(free(x), torch.full((1, 18, 5, 5), 100.0))


def test_a_frozen_weight_is_taken_apart_anew_whenever_it_changes() -> None:
    torch.manual_seed(3)
    x, offset = torch.randn(1, 4, 6, 7), torch.randn(1, 18, 6, 7)
    weight = torch.nn.Parameter(torch.randn(5, 4, 3, 3), requires_grad=False)

    def check() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            half = deform_conv(x, weight, offset)
        assert half.dtype == torch.bfloat16
        assert _relative(half.float(), deform_conv(x, weight.clone(), offset)) < 0.05
        assert torch.equal(deform_conv(x, weight, offset), deform_conv(x, weight.clone(), offset))

    check()
    weight.mul_(2)
    check()
    weight.data = torch.randn(5, 4, 3, 3)
    with torch.inference_mode():  # what is made in it can be in no gradient afterwards
        deform_conv(x, weight, offset)
    assert torch.autograd.grad(deform_conv(x.requires_grad_(), weight, offset).sum(), x)[0].abs().sum() > 0
    x.requires_grad_(False)
    check()
    weight.requires_grad_(True)
    (gradient,) = torch.autograd.grad(deform_conv(x, weight, offset).sum(), weight)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        weight.add_(1)
        check()
    assert torch.equal(copy.deepcopy(weight), weight)
