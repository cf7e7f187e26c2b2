"""Networks ready for inference say what they said, with fewer operations."""

from copy import deepcopy
from typing import Literal

import pytest
import torch
from torch import nn

from esol.config import BackboneConfig
from esol.models.backbones import Backbone, build_backbone
from esol.models.deeplab import DeepLab
from esol.models.folded import fold_batch_norm, fold_norms, for_inference


def network(name: str, stride: int, freeze: Literal["none", "stem", "body", "all"] = "all") -> Backbone:
    """With batch norms that do something."""
    torch.manual_seed(0)
    net = build_backbone(BackboneConfig(name, weights="none", output_stride=stride, freeze=freeze)).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return net


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@pytest.mark.parametrize(
    ("name", "stride"), [("resnet50", 16), ("timm:tf_efficientnet_lite0", 8), ("timm:regnety_002", 32)]
)
def test_every_batch_norm_goes_and_the_features_of_all_levels_stay(name: str, stride: int) -> None:
    net, image = network(name, stride), torch.randint(0, 256, (2, 3, 49, 81), dtype=torch.uint8)
    before, count = net.pyramid(image), norms(net)
    assert fold_batch_norm(net) == count > 30
    assert norms(net) == 0
    for own, was in zip(net.pyramid(image), before, strict=True):
        assert float((own - was).abs().max()) < 1e-4 * float(was.abs().max())


class Shared(nn.Module):
    """A convolution's output that goes into the norm and past it, as where norms come first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return x + self.norm(x).relu()

    def pyramid(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self(x)]


class Tapped(Shared):
    """A level that is taken before the norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).relu()

    def pyramid(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.conv(x), self(x)]


@pytest.mark.parametrize("kind", [Shared, Tapped])
def test_a_network_whose_features_would_change_stays_as_it_is(kind: type[Shared]) -> None:
    shared = kind()
    shared.norm.weight.data.fill_(3)
    net = Backbone(shared, "all", {})  # type: ignore[arg-type]
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    before = net(image)
    assert fold_batch_norm(net) == 0
    assert torch.equal(net(image), before)
    assert fold_batch_norm(network("small", 8)) == 0  # has none


def test_weights_are_in_the_type_that_autocast_computes_in_and_answers_stay_as_near_to_float32() -> None:
    net, image = DeepLab(network("timm:tf_efficientnet_lite0", 8), 5), torch.rand(1, 3, 65, 97) * 255
    with torch.no_grad():
        exact = net(image)
        with torch.autocast("cpu", torch.bfloat16):
            cast_each_time = net(image)
            ready = for_inference(net, torch.device("cpu"), torch.bfloat16)
            once = ready(image)
    assert {layer.weight.dtype for layer in ready.modules() if isinstance(layer, nn.Conv2d)} == {torch.bfloat16}
    assert float((once - exact).abs().mean()) < 1.1 * float((cast_each_time - exact).abs().mean())


@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize(("name", "stride"), [("resnet50", 16), ("timm:tf_efficientnet_lite0", 8)])
def test_a_network_in_training_learns_the_same(name: str, stride: int, learning: bool) -> None:
    net = network(name, stride, "none").double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(learning)
    folded = deepcopy(net)
    assert fold_norms(folded, None) == norms(net) > 30
    assert folded.state_dict().keys() == net.state_dict().keys()
    assert dict(folded.named_parameters()).keys() == dict(net.named_parameters()).keys()
    image, gradients = torch.randint(0, 256, (2, 3, 33, 49), dtype=torch.uint8), []
    for own in (net, deepcopy(folded)):  # a copy computes with weights of its own
        own.pyramid(image)[-1].square().mean().backward()
        gradients.append({n: p.grad for n, p in own.named_parameters() if p.requires_grad})
    assert all(p.grad is None for p in folded.parameters())
    assert gradients[0].keys() == gradients[1].keys()
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-8, atol=1e-12)


def test_weights_that_do_not_learn_are_folded_and_cast_once() -> None:
    net = network("resnet50", 16, "stem")
    image = torch.randint(0, 256, (1, 3, 33, 49), dtype=torch.uint8)
    before = net(image)
    assert fold_norms(net, torch.bfloat16) == norms(net)
    held = {name.rpartition(".")[0] for name, _ in net.named_buffers() if name.endswith("folded_weight")}
    assert held == {name[:-7] for name, p in net.named_parameters() if p.dim() == 4 and not p.requires_grad}
    assert {own.dtype for name, own in net.named_buffers() if name.endswith("folded_weight")} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert float((net(image) - before).abs().max().detach()) < 0.1 * float(before.abs().max().detach())


def test_a_network_whose_features_would_change_is_trained_as_it_is() -> None:
    shared = Shared()
    shared.norm.weight.data.fill_(3)
    net = Backbone(shared, "all", {})  # type: ignore[arg-type]
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    before = net(image)
    assert fold_norms(net, None) == 0
    assert torch.equal(net(image), before)
    assert not list(shared.conv.buffers())
