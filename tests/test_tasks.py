"""Tasks: losses against plain references, who gets a gradient, and that batches split."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

from esol.base.errors import ConfigError
from esol.base.schema import build
from esol.config import ModelConfig
from esol.data.samples import Batch
from esol.models.backbones import build_backbone
from esol.models.cam_net import CamNet
from esol.models.heads import Decision, Expansion, Shrinkage, clip_features
from esol.stages.classify import ClassifyConfig, ClassifyTask
from esol.stages.decide import DecideConfig, DecideTask
from esol.stages.expand import ExpandConfig, ExpandTask
from esol.stages.shrink import ShrinkConfig, ShrinkTask
from esol.training.losses import absence_weights, area_loss, classification_loss
from esol.training.task import Task


def cam_net(freeze: str = "none", kernel_channels: int = 16) -> CamNet:
    torch.manual_seed(0)
    net = CamNet(build_backbone(build(ModelConfig, {"backbone": "small", "freeze": freeze})), 4, kernel_channels)
    net.classifier.data.mul_(30)  # maps worth a gradient
    return net


def moved(module: Expansion | Shrinkage) -> Any:
    """With offsets that are not whole, where every gradient is defined."""
    torch.nn.init.normal_(module.offset.conv.weight, std=0.02)
    torch.nn.init.normal_(module.offset.conv.bias, std=0.3)  # type: ignore[arg-type]
    return module


def batch(size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (size, 3, 64, 64), dtype=torch.uint8, generator=generator)
    labels = (torch.rand(size, 4, generator=generator) > 0.5).float()
    labels[-1] = 0  # an image without any class
    return {"image": image, "labels": labels, "key": [str(i) for i in range(size)]}


def tasks(kind: str, **options: Any) -> Task:
    if kind == "classify":
        return ClassifyTask(cam_net(), build(ClassifyConfig, options))
    if kind == "decide":
        return DecideTask(cam_net(), build(DecideConfig, options))
    expand = ExpandTask(cam_net(), build(ExpandConfig, options if kind == "expand" else {}))
    moved(expand.handover)
    if kind == "expand":
        return expand
    shrink = ShrinkTask(cam_net(), expand.handover, build(ShrinkConfig, options))
    moved(shrink.handover)
    return shrink


ALL = [
    ("classify", {}),
    ("decide", {}),
    ("expand", {}),
    ("expand", {"classes": "present", "bound": 0, "clip": 0.3}),
    ("expand", {"game": True}),
    ("shrink", {}),
    ("shrink", {"area_term": "decide", "area": 2.0}),
    ("shrink", {"kernel": "identity", "area_term": "max", "clip": 0.5, "learn_kernel": False}),
]


def gradients(task: Task, b: Batch) -> dict[str, Tensor]:
    task.zero_grad()
    task(b)[0]["loss"].backward()
    return {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "options"), ALL)
def test_only_declared_parameters_learn_and_all_of_them_do(kind: str, options: dict[str, Any]) -> None:
    task = tasks(kind, **options).train()
    got = {n for n, g in gradients(task, batch()).items() if g.abs().max() > 0}
    declared = [p for group in task.parameter_groups() for p in group.parameters]
    assert len(declared) == len({id(p) for p in declared})
    assert got == {n for n, p in task.named_parameters() if any(p is d for d in declared)}
    assert got == {n for n, p in task.named_parameters() if p.requires_grad}
    if kind != "classify":
        offsets = {"handover.offset.conv.weight", "handover.offset.conv.bias"} if kind != "decide" else set()
        heads = {"handover.kernel", "handover.classifier"}
        learning = kind != "expand" or options.get("game", False)
        want = offsets | (heads if learning else set())
        assert got == (want - {"handover.kernel"} if options.get("learn_kernel") is False else want)
        assert not task.net.training  # type: ignore[union-attr]


@pytest.mark.parametrize(("kind", "options"), ALL)
def test_gradient_of_a_batch_is_the_mean_over_any_split(kind: str, options: dict[str, Any]) -> None:
    task, whole = tasks(kind, **options), batch()
    full = gradients(task, whole)
    parts = [
        gradients(task, {**whole, "image": i, "labels": y})
        for i, y in zip(whole["image"].split(1), whole["labels"].split(1), strict=True)
    ]
    for name, gradient in full.items():
        mean = torch.stack([part[name] for part in parts]).mean(0)
        assert torch.allclose(gradient, mean, atol=2e-5 * float(gradient.abs().max()) + 1e-9), name


@pytest.mark.parametrize(("kind", "options"), ALL)
def test_runs_in_bfloat16_with_float32_losses(kind: str, options: dict[str, Any]) -> None:
    task = tasks(kind, **options)
    want = task(batch())[0]["loss"].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, report = task(batch())
    losses["loss"].backward()
    assert all(v.dtype == torch.float32 and v.ndim == 0 for v in (*losses.values(), *report.values()))
    assert losses["loss"].item() == pytest.approx(want, rel=0.05, abs=0.02)
    assert not any(v.requires_grad for v in report.values())


def test_losses_against_plain_references() -> None:
    torch.manual_seed(2)
    logits, maps = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, 5, 6, dtype=torch.float64)
    labels = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.float64)
    want = F.multilabel_soft_margin_loss(logits, labels, reduction="none")
    assert torch.allclose(classification_loss(logits, labels), want)
    terms = F.softplus(-logits)
    assert torch.allclose(classification_loss(logits, labels, "present")[0], (terms[0, 0] + terms[0, 2]) / 2)
    assert classification_loss(logits, labels, "present")[2] == 0
    absence = torch.tensor([1.0, 0.0, 0.5, 0.25], dtype=torch.float64)
    weights = torch.tensor([[1, 0, 1, 0.25], [1, 0, 0.5, 1], [1, 0, 0.5, 0.25]], dtype=torch.float64)
    each = F.softplus(torch.where(labels > 0, -logits, logits))
    assert torch.allclose(classification_loss(logits, labels, absence=absence), (weights * each).sum(1) / 6)
    m = maps[1, 3]
    assert torch.allclose(area_loss(maps, labels)[1], ((m - m.min()) / (m.max() - m.min() + 1e-5)).mean())
    assert torch.allclose(area_loss(maps, labels, "max")[1], (m.relu() / (m.max() + 1e-5)).mean())
    n = (m - m.min()) / (m.max() - m.min() + 1e-5)
    assert torch.allclose(area_loss(maps, labels, "decide")[1], (4 * n - 4 * n.square()).mean())
    assert area_loss(maps, labels)[2] == 0


def test_absence_weighs_at_most_five_times_what_presence_weighs_over_a_set() -> None:
    shown, photos = torch.tensor([0, 1, 10, 20, 60, 120]), 120
    weights = absence_weights(shown, photos)
    assert weights.tolist() == pytest.approx([0, 5 / 119, 50 / 110, 1, 1, 1])
    assert (weights * (photos - shown) <= 5 * shown + 1e-4).all()
    assert torch.allclose(absence_weights(2 * shown, 2 * photos), weights)  # every photo twice
    # six classes, a label a photo, as often as each other: the mean over all classes, to the last digit
    logits, labels = torch.randn(6, 6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    six = classification_loss(logits, labels, absence=absence_weights(torch.full((6,), 50), 300))
    assert torch.allclose(six, classification_loss(logits, labels))


def test_classes_that_occur_nowhere_change_no_loss_and_no_gradient() -> None:
    torch.manual_seed(3)
    logits, labels = torch.randn(3, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[:3]
    more = torch.cat((logits, torch.randn(3, 60, dtype=torch.float64)), 1)
    absence = absence_weights(torch.tensor([5, 2, 3, 1]), 11).double()

    def loss_and_gradient(logits: Tensor, labels: Tensor, absence: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.clone().requires_grad_()
        loss = classification_loss(logits, labels, absence=absence).mean()
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    few = loss_and_gradient(logits, labels, absence)
    many = loss_and_gradient(more, F.pad(labels, (0, 60)), F.pad(absence, (0, 60)))
    assert torch.allclose(few[0], many[0])
    assert torch.allclose(F.pad(few[1], (0, 60)), many[1])


def test_decide_expand_and_shrink_equal_the_formula_with_torchvisions_operator_in_float64() -> None:
    b = batch()
    expand = ExpandTask(cam_net(), build(ExpandConfig, {"alpha": 2.0, "clip": 0.6, "bound": 1.5}))
    shrink = ShrinkTask(
        cam_net(), moved(copy.deepcopy(expand.handover)), build(ShrinkConfig, {"area": 0.3, "clip": 0.7})
    )
    moved(expand.handover), moved(shrink.handover)
    expand.double(), shrink.double()

    def offsets(module: Expansion | Shrinkage, x: Tensor) -> Tensor:
        conv, r = module.offset.conv, module.offset.bound
        return r * torch.tanh(F.conv2d(x, conv.weight, conv.bias, padding=1) / r)

    x = expand.net.features(b["image"]).detach()
    decide = DecideTask(cam_net(), build(DecideConfig, {"area": 0.7, "clip": 0.4})).double()
    d = decide.handover
    f = torch.einsum("kcij,bcijhw->bkhw", d.kernel, F.unfold(x, 3, padding=1).view(4, 128, 3, 3, *x.shape[2:])).relu()
    maps = torch.einsum("ck,bkhw->bchw", d.classifier, torch.minimum(f, 0.4 * f.amax((2, 3), True)))
    want = F.multilabel_soft_margin_loss(maps.mean((2, 3)), b["labels"].double())
    want = want + 0.7 * area_loss(maps, b["labels"], "decide").mean()
    got = decide(b)[0]["loss"]
    for parameter in d.parameters():
        torch.testing.assert_close(
            *(torch.autograd.grad(v, parameter, retain_graph=True)[0] for v in (got, want)), rtol=1e-8, atol=1e-12
        )

    e = expand.handover
    f = deform_conv2d(x, offsets(e, x), e.kernel, padding=1).relu()
    logits = torch.einsum("ck,bkhw->bc", e.classifier, torch.minimum(f, 0.6 * f.amax((2, 3), True))) / 16
    want = -2.0 * F.multilabel_soft_margin_loss(logits, b["labels"].double())
    got = expand(b)[0]["loss"]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    weight = e.offset.conv.weight
    torch.testing.assert_close(*(torch.autograd.grad(v, weight)[0] for v in (got, want)), rtol=1e-8, atol=1e-12)

    s, e = shrink.handover, shrink.expansion
    f = deform_conv2d(x, offsets(e, x), e.kernel, padding=1).relu().detach()
    f = clip_features(f, 0.7)
    maps = torch.einsum("ck,bkhw->bchw", s.classifier, deform_conv2d(f, offsets(s, f), s.kernel, padding=1).relu())
    want = F.multilabel_soft_margin_loss(maps.mean((2, 3)), b["labels"].double())
    want = want + 0.3 * area_loss(maps, b["labels"]).mean()
    got = shrink(b)[0]["loss"]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    for parameter in shrink.handover.parameters():
        torch.testing.assert_close(
            *(torch.autograd.grad(v, parameter, retain_graph=True)[0] for v in (got, want)), rtol=1e-8, atol=1e-12
        )


def test_stages_start_where_the_one_before_ended() -> None:
    net = cam_net()
    x = net.features(batch()["image"]).detach()
    decision = Decision(net, clip=0)
    assert torch.allclose(decision.class_maps(x), net.class_maps(x), atol=1e-4)
    torch.nn.init.normal_(decision.kernel, std=0.1)
    decided = ExpandTask(net, build(ExpandConfig, {"clip": 0}), decision).handover
    assert torch.allclose(decided.class_maps(decided.features(x)), decision.class_maps(x), atol=1e-4)
    expansion = Expansion(net, clip=0, bound=1)
    assert torch.allclose(expansion.class_maps(expansion.features(x)), net.class_maps(x), atol=1e-4)
    shrinkage = Shrinkage(expansion, clip=0, bound=1, start="identity")
    assert torch.allclose(shrinkage.class_maps(expansion.features(x)), net.class_maps(x), atol=1e-4)


def test_game_lets_offsets_climb_while_the_kernel_descends() -> None:
    plain, game = tasks("expand", alpha=0.5), tasks("expand", alpha=0.5, game=True)
    game.load_state_dict(plain.state_dict())
    climb, both = gradients(plain, batch()), gradients(game, batch())
    name = "handover.offset.conv.weight"
    assert torch.allclose(climb[name], both[name], atol=1e-6)
    kernel = game.handover.kernel
    before = game(batch())[0]["loss"]
    kernel.data -= 0.01 * both["handover.kernel"]  # type: ignore[operator]
    assert game(batch())[0]["loss"] < before


def test_clipping() -> None:
    f = torch.tensor([[[[0.0, 2.0], [8.0, 10.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    assert clip_features(f, 0.5)[0, 0].tolist() == [[0.0, 2.0], [5.0, 5.0]]
    assert torch.equal(clip_features(f, 0), f)
    assert clip_features(f, 0.5)[0, 1].abs().max() == 0


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="kernel_channels"):
        ExpandTask(cam_net(kernel_channels=0), build(ExpandConfig, {}))
    with pytest.raises(ConfigError, match="kernel_channels"):
        DecideTask(cam_net(kernel_channels=0), build(DecideConfig, {}))
    expansion = Expansion(cam_net(), clip=0.2, bound=1)
    with pytest.raises(ConfigError, match=r"shrink\.kernel = copy: W1 goes from 128 to 16"):
        Shrinkage(expansion, clip=0.1, bound=1, start="copy")
    same = Expansion(cam_net(kernel_channels=128), clip=0.2, bound=1)
    assert torch.equal(Shrinkage(same, clip=0.1, bound=1, start="copy").kernel, same.kernel)
