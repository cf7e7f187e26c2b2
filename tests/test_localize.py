"""Class maps against a plain loop, their alignment, and seeds."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esol.base.schema import build
from esol.config import ModelConfig
from esol.models.backbones import build_backbone
from esol.models.cam_net import CamNet
from esol.models.heads import Decision, Expansion, Heads, Shrinkage
from esol.ops.class_maps import class_maps
from esol.ops.seeds import best_class, seed


def networks() -> Heads:
    torch.manual_seed(0)
    net = CamNet(build_backbone(build(ModelConfig, {"backbone": "small", "output_stride": 8})), 3, 16).eval()
    decision = Decision(net, clip=0.5)
    torch.nn.init.normal_(decision.kernel, std=0.1)
    expansion = Expansion(decision, clip=0.8, bound=1)
    torch.nn.init.normal_(expansion.offset.conv.bias, std=0.5)  # type: ignore[arg-type]
    shrinkage = Shrinkage(expansion, clip=0.6, bound=1)
    torch.nn.init.normal_(shrinkage.offset.conv.bias, std=0.5)  # type: ignore[arg-type]
    heads = Heads()
    for source, head in (("cam", net), ("decide", decision), ("expand", expansion), ("shrink", shrinkage)):
        heads.add(source, head)
    return heads


def only(net: CamNet) -> Heads:
    heads = Heads()
    heads.add("cam", net)
    return heads


def image(batch: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)


def test_equals_a_loop_over_scales_and_mirror_images_of_each_stage_alone() -> None:
    heads = networks()
    net, decision, expansion, shrinkage = (heads[source] for source in heads)
    photo, labels = image(1, 49, 65), torch.tensor([[1.0, 0.0, 1.0]])
    got = class_maps(photo, labels, heads, scales=(1, 2), flip=True)[0]
    alone: dict[str, Any] = {
        "cam": net.class_maps,
        "decide": decision.class_maps,
        "expand": lambda x: expansion.class_maps(expansion.features(x)),
        "shrink": lambda x: shrinkage.class_maps(expansion.features(x)),
    }
    assert set(got) == set(alone)
    for stage, head in alone.items():
        total = torch.zeros(2, 49, 65)
        for size in ((49, 65), (97, 129)):
            x = F.interpolate(photo.float(), size, mode="bilinear", antialias=True)
            with torch.no_grad():
                for mirror in (False, True):
                    maps = head(net.features(x.flip(3) if mirror else x)).relu()
                    maps = maps.flip(3) if mirror else maps
                    total += F.interpolate(maps[:, [0, 2]], (49, 65), mode="bilinear", align_corners=True)[0]
        want = total / (total.amax((1, 2), keepdim=True) + 1e-5)
        assert got[stage].classes.tolist() == [0, 2]
        assert torch.allclose(got[stage].full, want, atol=1e-4), stage
        assert got[stage].low.shape == (2, 13, 17)
        assert torch.allclose(got[stage].low, got[stage].full[:, ::4, ::4], atol=0.1)


def test_a_batch_gives_what_its_images_give_alone_and_bfloat16_runs() -> None:
    heads = networks()
    photos, labels = image(3, 40, 56), torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 1]])
    together = class_maps(photos, labels, heads, scales=(1.0, 1.5))
    for i, want in enumerate(together):
        alone = class_maps(photos[i : i + 1], labels[i : i + 1], heads, scales=(1.0, 1.5))[0]
        for stage, maps in want.items():
            assert torch.equal(maps.classes, alone[stage].classes)
            torch.testing.assert_close(maps.full, alone[stage].full, atol=1e-4, rtol=0)
    assert together[1]["cam"].full.shape == (0, 40, 56)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = class_maps(photos, labels, heads, scales=(1.0, 1.5))
    assert half[0]["shrink"].full.dtype == torch.float32
    assert (half[0]["shrink"].full - together[0]["shrink"].full).abs().mean() < 0.05


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (50, 71)])
def test_mirrored_photo_gives_the_mirrored_map_and_a_spot_stays_in_place(size: tuple[int, int]) -> None:
    net = networks().net
    net.kernel = None
    net.classifier = torch.nn.Parameter(torch.ones(1, 128))
    for layer in net.backbone.body.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.constant_(layer.weight, 0.1)  # a blur
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda x: x  # type: ignore[method-assign, assignment]
    photo = torch.zeros(1, 3, *size, dtype=torch.uint8)
    spot = (size[0] // 3, size[1] // 4)
    photo[:, :, spot[0] - 3 : spot[0] + 4, spot[1] - 3 : spot[1] + 4] = 255
    net.backbone.mean.zero_()
    kwargs: dict[str, Any] = {"scales": (1.0,), "flip": False}
    label = torch.ones(1, 1)
    straight = class_maps(photo, label, only(net), **kwargs)[0]["cam"].full[0]
    mirrored = class_maps(photo.flip(3), label, only(net), **kwargs)[0]["cam"].full[0]
    assert torch.allclose(straight, mirrored.flip(1), atol=0.02)
    weight = straight / straight.sum()
    row = float((weight.sum(1) * torch.arange(size[0])).sum())
    column = float((weight.sum(0) * torch.arange(size[1])).sum())
    assert abs(row - spot[0]) < 2.5  # stride 8: unaligned maps are off by 3.5
    assert abs(column - spot[1]) < 2.5


def test_long_side_sets_the_size_of_scale_one() -> None:
    net = networks().net
    seen: list[tuple[int, ...]] = []
    net.backbone.body.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    class_maps(image(1, 60, 120), torch.ones(1, 3), only(net), scales=(1.0, 0.05), flip=False, long_side=240)
    assert seen == [(121, 241), (9, 9)]


def test_seeds() -> None:
    maps, classes = torch.tensor([[[0.2, 0.5, 0.9]], [[0.1, 0.6, 0.3]]]), torch.tensor([1, 4])
    winner, score = best_class(maps, classes)
    assert winner.tolist() == [[1, 4, 1]]
    assert seed(maps, classes, 0.5).tolist() == [[0, 5, 2]]
    assert seed(maps, classes, 0.6).tolist() == [[0, 0, 2]]  # a tie is background
    assert seed(maps[:0], classes[:0], 0.0).tolist() == [[0, 0, 0]]
    assert score.shape == (1, 3)
