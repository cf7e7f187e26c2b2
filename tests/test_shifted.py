"""Convolutions of a wide dilation to few channels: as PyTorch's own, gradients included."""

import pytest
import torch
from compared import assert_same_with_gradients
from torch import nn

from esol.models.shifted import ShiftedConv2d


@pytest.mark.parametrize(("size", "dilation"), [((29, 31), 6), ((9, 30), 12), ((3, 1), 4), ((7, 7), 1)])
def test_it_is_the_plain_convolution_and_its_gradients(size: tuple[int, int], dilation: int) -> None:
    torch.manual_seed(0)
    own = ShiftedConv2d(6, 4, 3, dilation).double()
    plain = nn.Conv2d(6, 4, 3, padding=dilation, dilation=dilation).double()
    plain.load_state_dict(own.state_dict())
    assert_same_with_gradients(plain, own, torch.randn(2, 6, *size, dtype=torch.float64))


def test_in_bf16_it_is_no_further_from_float32_than_the_plain_one() -> None:
    torch.manual_seed(0)
    own, x = ShiftedConv2d(64, 7, 3, 6), torch.randn(2, 64, 29, 29)
    exact = own(x)
    plain = nn.Conv2d(64, 7, 3, padding=6, dilation=6)
    plain.load_state_dict(own.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        errors = [float((module(x) - exact).abs().mean().detach()) for module in (own, plain)]
    assert errors[0] < 1.1 * errors[1]
    assert errors[0] < 1e-2 * float(exact.abs().mean().detach())
