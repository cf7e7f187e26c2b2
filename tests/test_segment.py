"""DeepLab: its loss against plain loops, labels on its grid, who learns, and prediction over scales and flips."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esol.base.errors import ConfigError
from esol.base.schema import build
from esol.config import BackboneConfig
from esol.data.samples import Batch
from esol.models.backbones import build_backbone
from esol.models.deeplab import DeepLab
from esol.models.regrid import scale_to_grid
from esol.ops.segmentation import blended, logits_by_scale
from esol.pipeline.config_file import from_tree
from esol.pipeline.registry import known_stage
from esol.pipeline.runner import chosen
from esol.stages.segment import SegmentConfig, SegmentTask, labels_on
from esol.training.losses import segmentation_loss
from esol.training.noise import unbalanced, without_highest_losses, without_the_doubted
from esol.training.optim import build_optimizer


def deeplab(name: str = "small", freeze: str = "none") -> DeepLab:
    torch.manual_seed(0)
    return DeepLab(build_backbone(BackboneConfig(name, "none", output_stride=8, freeze=freeze)), 4)


def segment(**options: Any) -> SegmentTask:
    return SegmentTask(deeplab(), build(SegmentConfig, options, "segment"))


def batch(size: int = 49) -> Batch:
    """Two classes and void, one class, background alone, nothing known."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator)
    target = torch.zeros(4, size, size, dtype=torch.uint8)
    target[0, :20, :30], target[0, 25:, 10:], target[0, 20:25] = 1, 3, 255
    target[1, 10:, 10:] = 2
    target[3] = 255
    return {"image": image, "target": target, "labels": torch.zeros(4, 3), "key": list("abcd")}


@pytest.mark.parametrize("balance", [True, False])
def test_loss_is_what_loops_over_pixels_say(balance: bool) -> None:
    b = batch(9)
    logits = torch.randn(4, 4, 9, 9, dtype=torch.float64, requires_grad=True)
    want = []
    for own, labels in zip(logits, b["target"].tolist(), strict=True):
        pixels = [(y, x, labels[y][x]) for y in range(9) for x in range(9) if labels[y][x] != 255]
        each = [(label, -own[:, y, x].log_softmax(0)[label]) for y, x, label in pixels]
        groups = [[v for k, v in each if k == 0], [v for k, v in each if k != 0]] if balance else [[v for _, v in each]]
        means = [torch.stack(g).mean() if g else torch.zeros((), dtype=torch.float64) for g in groups]
        want.append(torch.stack(means).mean())
    found = segmentation_loss(logits, b["target"], balance)
    torch.testing.assert_close(found, torch.stack(want))
    (expected,) = torch.autograd.grad(torch.stack(want).sum(), logits, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), logits)[0], expected)


def test_labels_are_those_of_the_pixels_that_the_grid_looks_at() -> None:
    labels = torch.arange(17 * 25).reshape(1, 17, 25)
    assert torch.equal(labels_on(labels, (3, 4)), labels[:, ::8, ::8])
    assert labels_on(labels, (2, 2)).flatten().tolist() == [0, 24, 16 * 25, 17 * 25 - 1]


def test_the_loss_sums_every_input_and_their_maximum() -> None:
    task, b = segment(inputs=[0.5, 1.0], crop=49), batch()
    loss = task(b)[0]["loss"]
    net = task.handover
    fine, coarse = (net(scale_to_grid(b["image"], scale, 8)) for scale in (1.0, 0.5))
    highest = torch.maximum(fine, F.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=True))
    each = [segmentation_loss(x, labels_on(b["target"], x.shape[2:]), True).mean() for x in (fine, coarse, highest)]
    torch.testing.assert_close(loss, torch.stack(each).sum())
    assert coarse.shape[2:] == (4, 4)  # 25 pixels: the grid of 8k + 1 that is nearest to half of 49
    one = segment(inputs=[1.0])
    torch.testing.assert_close(one(b)[0]["loss"], each[0])


def test_any_split_of_a_batch_gives_the_same_gradient() -> None:
    task, b = segment(inputs=[1.0, 0.75]), batch()
    task(b)[0]["loss"].backward()
    whole = [p.grad.clone() for p in task.parameters() if p.grad is not None]
    task.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        half: Any = {name: value[part] for name, value in b.items()}
        (task(half)[0]["loss"] / 2).backward()
    for a, p in zip(whole, (p for p in task.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(p.grad, a, rtol=1e-4, atol=1e-6)


def test_batch_norm_is_frozen_and_aspp_learns_faster_its_biases_without_decay() -> None:
    config = build(SegmentConfig, {"lr": 0.01, "head_lr": 5})
    task = SegmentTask(deeplab("resnet50"), config)
    before = copy.deepcopy(task.state_dict())
    optimizer = build_optimizer(task, config)
    groups = {g["name"]: g for g in optimizer.param_groups}
    assert {n: (g["lr_multiplier"], g["weight_decay"]) for n, g in groups.items()} == {
        "backbone": (1.0, 5e-4),
        "aspp": (5.0, 5e-4),
        "aspp_bias": (10.0, 0.0),
    }
    task.train()
    b = batch(33)
    task(b)[0]["loss"].backward()
    optimizer.step()
    after = task.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {name for name in before if ".bn" in name or "downsample.1" in name}
    assert len(norms) > 200
    assert not changed & norms
    assert changed == {name for name, p in task.named_parameters() if p.requires_grad}


def test_one_image_learned_by_heart_is_predicted_at_every_scale() -> None:
    torch.manual_seed(0)
    b = batch()
    b = {**b, "image": b["image"][:1], "target": b["target"][:1]}  # type: ignore[typeddict-item]
    target = b["target"][0]
    b["image"][0] = torch.where(target == 255, 128, target.int() * 60).to(torch.uint8)
    task = segment(inputs=[1.0, 0.75, 0.5])
    optimizer = torch.optim.Adam(task.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = task(b)[0]["loss"]
        loss.backward()
        optimizer.step()
    known = target != 255
    for combine in ("mean", "max"):
        found = probabilities(b["image"], task.handover.eval(), scales=(1.0, 1.5), flip=False, combine=combine)  # type: ignore[arg-type]
        assert found.shape == (1, 4, 49, 49)
        torch.testing.assert_close(found.sum(1), torch.ones(1, 49, 49))
        assert (found[0].argmax(0) == target)[known].float().mean() > 0.85


def probabilities(image: Tensor, net: DeepLab, combine: Any = "mean", **options: Any) -> Tensor:
    found = logits_by_scale(image, net, combine=combine, **options)
    return torch.stack([blended(own, (image.shape[2], image.shape[3]), combine) for own in found])


def test_prediction_mirrors_with_the_photo_and_averages_what_each_scale_says() -> None:
    net = deeplab().eval()
    image = torch.randint(0, 256, (2, 3, 30, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"scales": (0.75, 1.0)}
    straight = probabilities(image, net, **options)
    torch.testing.assert_close(probabilities(image.flip(3), net, **options).flip(3), straight)
    torch.testing.assert_close(probabilities(image[1:], net, **options), straight[1:])

    def one(scale: float, mirrored: bool) -> Tensor:
        x = scale_to_grid(image.flip(3) if mirrored else image, scale, 8)
        up = F.interpolate(net(x), (30, 50), mode="bilinear", align_corners=True).softmax(1)
        return up.flip(3) if mirrored else up

    want = torch.stack([one(s, m) for s in (0.75, 1.0) for m in (False, True)]).mean(0)
    torch.testing.assert_close(straight, want.detach())
    assert probabilities(image[:, :, :1, :1], net, scales=(0.5,)).shape == (2, 4, 1, 1)


def test_segment_reads_the_masks_that_the_run_has() -> None:
    def source(stages: list[str], masks: str = "auto", rounds: int = 1, name: str = "segment") -> tuple[str, ...]:
        segment = {"masks": masks, "rounds": rounds}
        config = from_tree({"run_dir": "r", "data": {"root": "d"}, "stages": stages, "segment": segment})
        chosen(config, None)
        return known_stage(name).consumes(config)

    seeds = ["classify", "localize", "seed_masks", "segment"]
    assert source(seeds) == ("seed_masks",)
    both = [*seeds, "psa_labels", "psa", "psa_masks"]
    assert source(both) == ("seed_masks", "psa_masks")  # auto: the judge chooses from all
    assert source(both, "psa_masks") == ("psa_masks",)
    assert source(["segment"], "truth") == ()
    assert source(both, rounds=3) == ("seed_masks", "psa_masks", "round_1_masks", "round_2_masks")
    assert source(both, rounds=3, name="round_2") == ("seed_masks", "psa_masks", "round_1_masks")
    assert source(both, "seed_masks", 2, "round_1_masks") == ("round_1", "seed_masks")
    with pytest.raises(ConfigError, match=r"segment.rounds = 2: true masks get no better by rounds; use 1"):
        source(["segment"], "truth", 2)
    with pytest.raises(ConfigError, match=r"segment.masks = 'round_1_masks': must be one of auto, vote_masks"):
        source(both, "round_1_masks", 2)
    with pytest.raises(ConfigError, match="segment needs psa_masks; add it to stages"):
        source(seeds, "psa_masks")
    with pytest.raises(ConfigError, match=r"segment.model.output_stride = 16: DeepLab-v2 has 8"):
        build(SegmentConfig, {"model": {"output_stride": 16}}, "segment")


def noisy(seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (2, 4, 6, 7), labels with void, and what the two photos show: classes 1 and 3, and class 2."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 4, 6, 7, generator=generator)
    labels = torch.randint(0, 4, (2, 6, 7), generator=generator, dtype=torch.uint8)
    labels[0, 2], labels[1, 3:] = 255, 0
    return logits, labels, torch.tensor([[1.0, 0, 1], [0, 1, 0]])


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_the_pixels_of_the_highest_loss_are_left_out_of_background_and_objects(share: float) -> None:
    logits, labels, _ = noisy()
    found = without_highest_losses(logits, labels, torch.tensor(share))
    want = labels.clone()
    for own, image, kept in zip(logits.double().log_softmax(1), labels.tolist(), want, strict=True):
        for background in (True, False):
            pixels = [
                (y, x) for y in range(6) for x in range(7) if image[y][x] != 255 and (image[y][x] == 0) == background
            ]
            pixels.sort(key=lambda p: own[image[p[0]][p[1]], p[0], p[1]])  # the least likely first
            for y, x in pixels[: int(share * len(pixels))]:
                kept[y, x] = 255
    assert torch.equal(found, want)
    assert torch.equal(found, labels) == (share == 0)


@pytest.mark.parametrize("correct", [True, False])
def test_a_sure_network_is_believed_within_the_labels_of_the_photo(correct: bool) -> None:
    logits, labels, shown = noisy()
    found = without_the_doubted(logits, labels, shown, torch.tensor(0.8), correct)
    changes = 0
    for b, classes in enumerate(([0, 1, 3], [0, 2])):
        for y in range(6):
            for x in range(7):
                chance = logits[b, classes, y, x].softmax(0)
                best, label = classes[int(chance.argmax())], int(labels[b, y, x])
                doubted = label not in (255, best) and float(chance.max()) > 0.8
                changes += doubted
                assert int(found[b, y, x]) == ((best if correct else 255) if doubted else label)
    assert changes > 5


def test_masks_are_believed_at_first_and_less_and_less() -> None:
    """With segment.noise: the loss of before until `after`, then one over other labels; gradients are finite."""
    plain, b = segment(inputs=[1.0, 0.5]), batch()
    b["labels"] = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0]])
    task = segment(inputs=[1.0, 0.5], noise={"after": 0.5, "filter": 0.3, "doubt": "ignore", "sure": [0.5, 0.3]})
    task.load_state_dict(plain.state_dict())
    before = plain(b)[0]["loss"]
    early, middle, late = (task({**b, "done": torch.tensor(done)})[0]["loss"] for done in (0.4, 0.55, 0.9))
    assert early == before
    assert late < middle < early
    late.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


def test_unbalanced_logits_have_the_odds_of_the_image() -> None:
    """Where two classes are told apart by nothing, the answer is their share among the labels."""
    labels = torch.zeros(2, 4, 5, dtype=torch.uint8)
    labels[0, 0], labels[0, 1], labels[1] = 1, 255, 1
    found = unbalanced(torch.zeros(2, 2, 4, 5), labels).softmax(1)[:, 1, 0, 0]
    torch.testing.assert_close(found, torch.tensor([5 / 15, 0.999]))
