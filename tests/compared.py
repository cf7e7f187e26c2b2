"""Two modules of the same weights, held against each other."""

import torch
from torch import Tensor, nn


def assert_same_with_gradients(plain: nn.Module, own: nn.Module, given: Tensor) -> None:
    """Results and the gradients of input and all parameters that learn, in float64."""
    found = []
    for module in (plain, own):
        x = given.clone().requires_grad_()
        y = module(x)
        assert y.dtype == torch.float64
        wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
        parts = torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape)).sum(), wanted)
        found.append([y.detach(), *parts])
    for expected, ours in zip(*found, strict=True):
        assert ours.shape == expected.shape
        assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-9)
