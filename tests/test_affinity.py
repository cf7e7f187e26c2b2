"""AffinityNet and IRNet with their tasks: grids, losses against plain loops, who learns, and that batches split."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esol.base.schema import build
from esol.config import ModelConfig
from esol.data.samples import Batch
from esol.models.affinity_net import AffinityNet
from esol.models.backbones import Backbone, build_backbone
from esol.models.irn_net import IrnNet
from esol.models.phased import PhasedConv2d
from esol.models.regrid import fuse, regrid
from esol.ops import pairs as operators
from esol.ops.pairs import boundary_affinity, pair_labels
from esol.stages import irn as stage
from esol.stages.irn import IrnConfig, IrnTask, displacement_loss
from esol.stages.psa import PsaConfig, PsaTask
from esol.training.optim import build_optimizer
from esol.training.task import Task

LITE0 = "timm:tf_efficientnet_lite0"


def backbone(name: str = "small", stride: int = 16, freeze: str = "all") -> Backbone:
    torch.manual_seed(0)
    model = {"backbone": name, "weights": "none", "output_stride": stride, "freeze": freeze}
    return build_backbone(build(ModelConfig, model))


def psa(freeze: str = "none", **options: Any) -> PsaTask:
    return PsaTask(AffinityNet(backbone(stride=8, freeze=freeze)), build(PsaConfig, {"radius": 3, **options}))


def irn(**options: Any) -> IrnTask:
    return IrnTask(IrnNet(backbone()), build(IrnConfig, {"radius": 4, **options}))


TASKS = {"psa": psa, "irn": irn}


def batch() -> Batch:
    """Coloured squares on noise: two classes and a void border, one class, background only, nothing known."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 80, (4, 3, 41, 50), dtype=torch.uint8, generator=generator)
    target = torch.zeros(4, 41, 50, dtype=torch.uint8)
    for i, top, left, label in ((0, 4, 2, 1), (0, 16, 26, 2), (1, 8, 8, 3)):
        image[i, label - 1, top : top + 20, left : left + 22] += 150
        target[i, top : top + 20, left : left + 22] = label
    target[0, :, 24:26] = 255
    target[3] = 255
    return {"image": image, "target": target, "labels": torch.zeros(4, 3), "key": list("abcd")}


def gradients(task: Task, b: Batch) -> dict[str, Tensor]:
    task.zero_grad()
    task(b)[0]["loss"].backward()
    return {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("stride", "target"), [(16, 4), (8, 4), (4, 4), (2, 4)])
def test_regrid_is_exact_on_a_ramp(stride: int, target: int) -> None:
    rows, columns = torch.arange(0, 50, stride).double(), torch.arange(0, 33, stride).double()
    ramp = (3 * rows[:, None] - 2 * columns)[None, None]
    size = (13, 9)
    seen = int(rows[-1]) // target + 1, int(columns[-1]) // target + 1  # beyond, the last feature is repeated
    want = (3 * torch.arange(0, 50, target)[:, None] - 2 * torch.arange(0, 33, target)).double()
    want = F.pad(want[None, None, : seen[0], : seen[1]], (0, 9 - seen[1], 0, 13 - seen[0]), mode="replicate")
    torch.testing.assert_close(regrid(ramp, stride, target, size), want, rtol=0, atol=1e-12)


def test_fuse_is_the_convolution_of_the_concatenation() -> None:
    strides, size = [4, 8, 16, 16], (13, 9)
    x = [torch.randn(2, 3, -(-50 // s), -(-33 // s), dtype=torch.float64) for s in strides]
    conv = torch.nn.Conv2d(12, 5, 1).double()
    want = conv(torch.cat([regrid(f, s, 4, size) for f, s in zip(x, strides, strict=True)], 1))
    torch.testing.assert_close(fuse(conv, x, strides, 4, size), want)


@pytest.mark.parametrize("name", ["resnet50", "small", LITE0, "timm:test_convnext"])
def test_grids_of_any_size_and_backbone(name: str) -> None:
    psa_net, irn_net = AffinityNet(backbone(name, 8)).eval(), IrnNet(backbone(name, 16)).eval()
    with torch.no_grad():
        for height, width in ((65, 97), (50, 33), (9, 5)):
            image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
            assert psa_net(image).shape == (1, 448, -(-height // 8), -(-width // 8))
            grid = -(-height // 4), -(-width // 4)
            assert [tuple(x.shape) for x in irn_net(image)] == [(1, 1, *grid), (1, 2, *grid)]


@pytest.mark.parametrize("name", ["resnet50", "small", LITE0])
def test_every_level_looks_at_its_own_pixels(name: str) -> None:
    """With symmetric kernels a mirror image has mirrored features; a pixel more at the border shifts none."""
    for net in (AffinityNet(backbone(name, 8)), IrnNet(backbone(name, 16))):
        net.eval()
        for layer in net.modules():
            if isinstance(layer, torch.nn.Conv2d | PhasedConv2d):
                layer.weight.data = layer.weight.data + layer.weight.data.flip(3)
                layer.weight.data /= layer.weight.data.square().mean().sqrt() * (layer.weight[0].numel() / 2) ** 0.5
        image = torch.randint(0, 256, (1, 3, 65, 97), dtype=torch.uint8)
        with torch.no_grad():
            straight, mirrored, less = (_one(net(x)) for x in (image, image.flip(3), image[..., :64, :96]))
        scale = float(straight.std())
        assert scale > 0
        torch.testing.assert_close(mirrored.flip(3), straight, rtol=0, atol=1e-3 * scale)
        corner = (..., slice(straight.shape[2] // 2), slice(straight.shape[3] // 2))
        assert (less[corner] - straight[corner]).std() < 0.3 * scale  # twice that where lite0's levels shift


def _one(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else torch.cat(output, 1)


def pairs_of(labels: list[list[int]], radius: int) -> dict[str, list[tuple[tuple[int, int], tuple[int, int]]]]:
    """All pairs (i, j) of pixels nearer than the radius, j after i, by kind."""
    pixels = [(y, x) for y in range(len(labels)) for x in range(len(labels[0]))]
    found: dict[str, list[Any]] = {"bg": [], "fg": [], "neg": []}
    for n, i in enumerate(pixels):
        for j in pixels[n + 1 :]:
            a, b = labels[i[0]][i[1]], labels[j[0]][j[1]]
            if (i[0] - j[0]) ** 2 + (i[1] - j[1]) ** 2 < radius**2 and 255 not in (a, b):
                found["neg" if a != b else "fg" if a else "bg"].append((i, j))
    return found


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


def test_affinity_loss_against_a_loop() -> None:
    b, task = batch(), psa().double()
    features = task.handover(b["image"])
    parts = []
    for f, labels in zip(features, b["target"][:, ::8, ::8].tolist(), strict=True):
        logs = {}
        for kind, pairs in pairs_of(labels, 3).items():
            a = [torch.exp(-(f[:, *i] - f[:, *j]).abs().mean()) for i, j in pairs]
            logs[kind] = mean([-torch.log((1 - v if kind == "neg" else v) + 1e-5) for v in a])
        parts.append(torch.stack([logs["bg"], logs["fg"], logs["neg"]]))
    assert parts[0].min() > 0
    assert parts[2][1:].tolist() == [0, 0]
    assert parts[3].tolist() == [0, 0, 0]
    background, foreground, negative = torch.stack(parts).mean(0)
    want = background / 4 + foreground / 4 + negative / 2
    losses = task(b)[0]
    torch.testing.assert_close(losses["loss"], want)
    torch.testing.assert_close(losses["negative"], negative)
    weight = task.handover.join.weight
    torch.testing.assert_close(*(torch.autograd.grad(v, weight, retain_graph=True)[0] for v in (losses["loss"], want)))


@pytest.mark.parametrize("size", [(13, 17), (3, 4), (1, 1)])
@pytest.mark.parametrize("radius", [2, 5, 10])
def test_pairs_at_once_are_those_offset_by_offset(monkeypatch: pytest.MonkeyPatch, size: Any, radius: int) -> None:
    """What a GPU computes, here on the CPU: labels, boundaries, displacements, and their gradients."""
    torch.manual_seed(0)
    target = torch.tensor([0, 0, 1, 2, 255], dtype=torch.uint8)[torch.randint(0, 5, (2, *size))]
    edge, displacement = (torch.rand(2, *size) * 8).round() / 8, 3 * torch.randn(2, 2, *size, dtype=torch.float64)
    found = []
    for together in (False, True):
        for module in (operators, stage):
            monkeypatch.setattr(module, "at_once", lambda values, together=together: together)
        kinds = pair_labels(target, radius)
        inputs = edge.clone().requires_grad_(), displacement.clone().requires_grad_()
        affinity = boundary_affinity(inputs[0], radius)
        losses = [displacement_loss(inputs[1], kinds[0], radius, apart) for apart in (False, True)]
        weights = torch.arange(affinity.numel()).view(affinity.shape) % 7.0
        gradients = torch.autograd.grad((affinity * weights).sum() + losses[0].sum() - 2 * losses[1].sum(), inputs)
        found.append([kind.double() for kind in (*kinds, affinity, *losses, *gradients)])
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_irn_loss_against_a_loop() -> None:
    b, task = batch(), irn(radius=3).train()
    edge, displacement = task.handover(b["image"])
    parts = []
    for e, d, labels in zip(
        edge[:, 0].double().sigmoid(), displacement.double(), b["target"][:, ::4, ::4].tolist(), strict=True
    ):
        kinds = pairs_of(labels, 3)
        logs = {}
        for kind, pairs in kinds.items():
            a = [1 - torch.stack([e[y, x] for y, x in way(i, j)]).max() for i, j in pairs]
            logs[kind] = mean([-torch.log((1 - v if kind == "neg" else v) + 1e-5) for v in a])
        move = {k: [d[:, *i] - d[:, *j] for i, j in kinds[k]] for k in ("fg", "bg")}
        apart = [torch.tensor(j) - torch.tensor(i) for i, j in kinds["fg"]]
        towards = mean([(m - v).abs().mean() for m, v in zip(move["fg"], apart, strict=True)])
        parts.append(
            torch.stack(
                [(logs["bg"] + logs["fg"]) / 2, logs["neg"], towards, mean([m.abs().mean() for m in move["bg"]])]
            )
        )
    assert parts[0].min() > 0
    assert parts[3].tolist() == [0, 0, 0, 0]
    want = torch.stack(parts).mean(0)
    losses = task(b)[0]
    names = ("positive", "negative", "displacement_fg", "displacement_bg")
    torch.testing.assert_close(torch.stack([losses[n] for n in names]).double(), want, rtol=1e-5, atol=1e-6)
    for branch in (task.handover.edge.out, task.handover.displacement.out):
        got, plain = (
            torch.autograd.grad(v, branch.weight, retain_graph=True)[0] for v in (losses["loss"], want.sum() / 2)
        )
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


def way(i: tuple[int, int], j: tuple[int, int]) -> list[tuple[int, int]]:
    """Pixels of the pair's bounding box nearer than 1 to its line."""
    (y, x), (dy, dx) = i, (j[0] - i[0], j[1] - i[1])
    box = [(p, q) for p in range(min(y, j[0]), max(y, j[0]) + 1) for q in range(min(x, j[1]), max(x, j[1]) + 1)]
    return [(p, q) for p, q in box if abs(dy * (q - x) - dx * (p - y)) / (dy**2 + dx**2) ** 0.5 < 1]


def test_displacements_to_a_common_centroid_cost_nothing() -> None:
    grid = torch.stack(torch.meshgrid(torch.arange(9.0), torch.arange(7.0), indexing="ij"))[None]
    pairs = torch.ones(1, 24, 9, 7, dtype=torch.bool)
    assert displacement_loss(torch.tensor([4.0, 3.0]).view(1, 2, 1, 1) - grid, pairs, 4, apart=True) == 0
    assert displacement_loss(torch.full_like(grid, 2.5), pairs, 4, apart=False) == 0
    assert displacement_loss(grid, pairs, 4, apart=True) > 1


@pytest.mark.parametrize("kind", TASKS)
def test_gradient_of_a_batch_is_the_mean_over_any_split(kind: str) -> None:
    task, whole = TASKS[kind]().double(), batch()  # absolute differences turn round at rounding errors
    full = gradients(task, whole)
    parts = [
        gradients(task, {**whole, "image": i, "target": t})
        for i, t in zip(whole["image"].split(1), whole["target"].split(1), strict=True)
    ]
    for name, gradient in full.items():
        split = torch.stack([part[name] for part in parts]).mean(0)
        assert torch.allclose(gradient, split, atol=1e-6 * float(gradient.abs().max())), name


@pytest.mark.parametrize("kind", TASKS)
def test_runs_in_bfloat16_with_float32_losses(kind: str) -> None:
    task = TASKS[kind]()
    want = task(batch())[0]["loss"].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = task(batch())
    losses["loss"].backward()
    assert all(v.dtype == torch.float32 and v.ndim == 0 for v in losses.values())
    assert losses["loss"].item() == pytest.approx(want, rel=0.05)


def test_only_declared_parameters_learn_and_all_of_them_do() -> None:
    frozen, free = psa(freeze="all"), psa(freeze="none")
    wanted = {
        frozen: {"head": 10.0},
        free: {"backbone": 1.0, "backbone_bias": 2.0, "head": 10.0},
        irn(): {"edge": 1.0, "displacement": 10.0},
    }
    for task, groups in wanted.items():
        assert {g.name: g.lr_multiplier for g in task.parameter_groups()} == groups
        build_optimizer(task, task.config)  # every parameter that learns is in one group
        got = {n for n, g in gradients(task.train(), batch()).items() if g.abs().max() > 0}
        assert got == {n for n, p in task.named_parameters() if p.requires_grad}
        assert any(n.startswith("handover.backbone") for n in got) == (task is free)
    names = {p: n for n, p in free.named_parameters()}
    for group in free.parameter_groups():
        assert group.weight_decay == (group.name != "backbone_bias")
        assert all(names[p].endswith(".bias") == (group.name == "backbone_bias") for p in group.parameters)
    with pytest.raises(ValueError, match="freeze = all"):
        IrnNet(backbone(freeze="stem"))


@pytest.mark.parametrize(("kind", "lr"), [("psa", 0.01), ("irn", 0.1)])
def test_the_losses_fall(kind: str, lr: float) -> None:
    task = TASKS[kind]().train()
    groups = [{"params": g.parameters, "lr": lr * g.lr_multiplier} for g in task.parameter_groups()]
    optimizer, history = torch.optim.SGD(groups), []
    for _ in range(20):
        losses = task(batch())[0]
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]


def test_displacement_mean_is_subtracted_in_eval_only() -> None:
    net = IrnNet(backbone()).train()
    image = batch()["image"]
    before = net(image)[1]
    net.displacement_mean.copy_(torch.tensor([3.0, -2.0]))
    assert torch.equal(net(image)[1], before)
    loaded = copy.deepcopy(net)
    loaded.load_state_dict(net.state_dict())
    torch.testing.assert_close(loaded.eval()(image)[1], before - torch.tensor([3.0, -2.0]).view(2, 1, 1))
