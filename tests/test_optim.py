"""Parameter groups and the learning rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esol.config import TrainConfig
from esol.training.optim import build_optimizer, learning_rate
from esol.training.task import ParameterGroup, Task


class Groups(Task):
    """Three learning tensors, one frozen; groups as given by parameter names."""

    def __init__(self, **groups: list[str]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.ones(2)) for _ in range(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.groups = groups

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup(name, [getattr(self, n) for n in names], 10.0 if name == "fast" else 1.0, name != "fast")
            for name, names in self.groups.items()
        ]


@pytest.mark.parametrize(("name", "cls"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_groups_carry_multiplier_and_decay(name: str, cls: type) -> None:
    config = TrainConfig(optimizer=name, lr=0.3, momentum=0.8, weight_decay=0.01)  # type: ignore[arg-type]
    task = Groups(slow=["a", "b"], fast=["c"], empty=[])
    optimizer = build_optimizer(task, config)
    assert type(optimizer) is cls
    found = [(g["name"], g["lr_multiplier"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert found == [("slow", 1.0, 0.01, 2), ("fast", 10.0, 0.0, 1)]
    if name == "sgd":
        assert {g["momentum"] for g in optimizer.param_groups} == {0.8}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"slow": ["a", "b"]}, "in no group of Groups: c"),
        ({"slow": ["a", "b", "c"], "fast": ["b"]}, "b is in two parameter groups, the second is fast"),
        ({"slow": ["a", "b", "c", "frozen"]}, "group slow: frozen does not learn"),
    ],
)
def test_wrong_groups_are_named(groups: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(Groups(**groups), TrainConfig())


def test_learning_rate_is_irns_polynomial() -> None:
    config = TrainConfig(lr=0.1, poly_power=0.9, warmup=0)
    for step in (0, 1, 500, 999):
        assert learning_rate(step, 1000, config) == pytest.approx(0.1 * (1 - step / 1000) ** 0.9)


def test_learning_rate_is_for_lr_batch_images_and_scales_with_the_batch() -> None:
    assert learning_rate(0, 9, TrainConfig(lr=0.1, lr_batch=16, global_batch=8)) == pytest.approx(0.05)
    assert learning_rate(0, 9, TrainConfig(lr=0.1, lr_batch=16, global_batch=64)) == pytest.approx(0.4)
    adam = TrainConfig(lr=0.1, lr_batch=16, global_batch=64, optimizer="adamw")  # noise grows with the square root
    assert learning_rate(0, 9, adam) == pytest.approx(0.2)


def test_learning_rate_warms_up_then_decays_or_stays() -> None:
    config = TrainConfig(lr=1.0, poly_power=1.0, warmup=4)
    assert [learning_rate(s, 8, config) for s in range(8)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25])
    assert learning_rate(7, 8, TrainConfig(lr=0.2, poly_power=0)) == 0.2
    assert learning_rate(1, 2, TrainConfig(lr=1.0, warmup=10)) == 0.2  # all warm-up
