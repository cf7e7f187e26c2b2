"""Dilated depthwise convolutions: as the plain ones, gradients included, under the same names."""

from copy import deepcopy

import pytest
import torch
from compared import assert_same_with_gradients
from torch import nn

from benchmarks.phased import unphase
from esol.base.schema import build
from esol.config import ModelConfig
from esol.models.backbones import build_backbone
from esol.models.phased import PhasedConv2d, phase_dilations


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize(
    ("side", "dilation", "size"), [(5, 4, (28, 28)), (3, 8, (9, 30)), (7, 4, (3, 1)), (3, 2, (9, 8)), (5, 1, (6, 7))]
)
def test_it_is_the_plain_convolution_and_its_gradients(
    side: int, dilation: int, size: tuple[int, int], learns: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, side, 1, dilation * (side // 2), dilation, groups=6).double().requires_grad_(learns)
    assert_same_with_gradients(conv, PhasedConv2d(conv), torch.randn(2, 6, *size, dtype=torch.float64))


@pytest.mark.parametrize("channels", [6, 48])  # without and with blocks of channels
def test_under_autocast_the_gradients_of_the_weights_are_those_of_float32(channels: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 5, 1, 4, 2, groups=channels)
    phased, x = PhasedConv2d(deepcopy(conv)), torch.randn(2, channels, 12, 9)
    conv(x).square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        y = phased(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for own, plain in zip(phased.parameters(), conv.parameters(), strict=True):
        assert own.grad is not None
        assert plain.grad is not None
        assert own.grad.dtype == torch.float32
        assert torch.allclose(own.grad, plain.grad, rtol=0.02, atol=0.02 * float(plain.grad.abs().max()))


def test_only_depthwise_ones_that_gain_are_replaced_and_names_stay() -> None:
    net = nn.Sequential(
        nn.Conv2d(8, 8, 5, padding=8, dilation=4, groups=8, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, 5, padding=8, dilation=4),
        nn.Conv2d(8, 8, 5, stride=2, padding=8, dilation=4, groups=8),
        nn.Conv2d(8, 8, 5, padding=0, dilation=4, groups=8),
    )
    names, drawn = list(net.state_dict()), torch.random.get_rng_state()
    phase_dilations(net)
    assert [type(layer) for layer in net] == [PhasedConv2d, *[nn.Conv2d] * 4]
    assert list(net.state_dict()) == names
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_a_backbone_of_stride_8_has_some_and_its_features_are_what_they_were() -> None:
    model = {"backbone": "timm:tf_efficientnet_lite0", "weights": "none", "output_stride": 8, "freeze": "all"}
    net = build_backbone(build(ModelConfig, model)).eval()
    phased = [module for module in net.modules() if isinstance(module, PhasedConv2d)]
    assert len(phased) == 11  # of 5x5, or dilated
    image = torch.randint(0, 256, (1, 3, 75, 101), dtype=torch.uint8)
    features = net(image)
    unphase(net)
    assert not any(isinstance(module, PhasedConv2d) for module in net.modules())
    assert torch.allclose(net(image), features, rtol=1e-4, atol=1e-5)
