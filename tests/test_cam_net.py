"""Backbones and the CAM network: shapes, what is frozen, weights and their errors."""

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from esol.base.errors import ConfigError, WeightsError
from esol.base.schema import build
from esol.config import ModelConfig
from esol.models.backbones import Backbone, build_backbone
from esol.models.cam_net import CamNet


def backbone(**model: Any) -> Backbone:
    return build_backbone(build(ModelConfig, {"backbone": "small", "weights": "none", **model}))


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize(
    ("name", "channels"), [("small", 128), ("resnet50", 2048), ("resnet101-caffe", 2048), ("timm:regnety_002", 368)]
)
def test_backbone_tells_its_channels_and_stride(name: str, channels: int, stride: int) -> None:
    net = backbone(backbone=name, output_stride=stride)
    assert (net.channels, net.stride) == (channels, stride)
    features = net(torch.zeros(1, 3, 97, 65, dtype=torch.uint8))
    assert features.shape == (1, channels, -(-97 // stride), -(-65 // stride))


def test_stride_16_of_a_resnet_is_irns_and_not_dilated() -> None:
    convolutions = [m for m in backbone(backbone="resnet50").modules() if isinstance(m, torch.nn.Conv2d)]
    assert {m.dilation for m in convolutions} == {(1, 1)}


def test_freezing() -> None:
    learning = {
        level: {
            n.split(".")[1]
            for n, p in backbone(backbone="resnet50", freeze=level).named_parameters()
            if p.requires_grad
        }
        for level in ("none", "stem", "body", "all")
    }
    assert learning == {
        "none": {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"},
        "stem": {"layer3", "layer4"},
        "body": {"layer4"},
        "all": set(),
    }
    assert not backbone(freeze="all")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).requires_grad


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_freezing_a_timm_network_is_the_same_at_every_stride(stride: int) -> None:
    learning = {}
    for level in ("stem", "body"):
        net = backbone(backbone="timm:tf_efficientnet_lite0", freeze=level, output_stride=stride)
        names = [n.removeprefix("body.net.").split(".") for n, p in net.named_parameters() if p.requires_grad]
        learning[level] = {".".join(name[: 1 + (name[0] == "blocks")]) for name in names}
    last = {"blocks.5", "blocks.6", "conv_head", "bn2"}
    assert learning == {"stem": {"blocks.3", "blocks.4", *last}, "body": last}


def test_batch_norm_statistics_never_move() -> None:
    net = backbone(backbone="timm:regnety_002", freeze="none").train()
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" in k or "batches" in k}
    net(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)).mean().backward()
    after = net.state_dict()
    assert before
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_input_is_normalised_inside() -> None:
    net = backbone()
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    want = net.body((image / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert torch.allclose(net(image), want, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "channels", "finest"),
    [
        ("small", (32, 64, 96, 128, 128), 2),
        ("resnet50", (64, 256, 512, 1024, 2048), 4),
        ("timm:regnety_002", (32, 24, 56, 152, 368), 2),
        ("timm:test_resnet", (32, 32, 48, 192, 96), 2),
        ("timm:tf_efficientnet_lite0", (16, 24, 40, 112, 1280), 2),
        ("timm:test_convnext", (24, 32, 48, 64), 4),
    ],
)
def test_pyramid_ends_at_the_features(name: str, channels: tuple[int, ...], finest: int) -> None:
    net = backbone(backbone=name, freeze="all")
    assert tuple(c for c, _ in net.levels) == channels
    assert (net.levels[0][1], net.levels[-1][1]) == (finest, 16)
    image = torch.randint(0, 256, (1, 3, 97, 65), dtype=torch.uint8)
    levels = net.pyramid(image)
    assert torch.equal(levels[-1], net(image))
    assert [level.shape[1] for level in levels] == list(channels)
    assert not any(level.requires_grad for level in levels)


def test_pyramid_learns_and_is_asked_for_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    net = backbone(freeze="none")
    sum(level.mean() for level in net.pyramid(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in net.parameters())
    monkeypatch.delattr("timm.models.regnet.RegNet.forward_intermediates")
    without = backbone(backbone="timm:regnety_002")
    assert without(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 368, 2, 2)
    with pytest.raises(ConfigError, match=r"model\.backbone: timm's RegNet has no forward_intermediates"):
        _ = without.levels


def test_class_maps_with_and_without_w1() -> None:
    for kernel_channels in (0, 16):
        net = CamNet(backbone(), num_classes=3, kernel_channels=kernel_channels)
        image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        x = net.features(image)
        hidden = x if net.kernel is None else F.conv2d(x, net.kernel, padding=1).relu()
        assert torch.allclose(net(image), torch.einsum("ck,bkhw->bc", net.classifier, hidden) / 16, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = net(image)
        assert (logits.dtype, logits.shape) == (torch.float32, (2, 3))


@pytest.mark.parametrize(("suffix", "write"), [("safetensors", save_file), ("pth", torch.save)])
def test_local_weights_are_loaded_without_their_classifier(tmp_path: Path, suffix: str, write: Any) -> None:
    source = backbone(backbone="timm:regnety_002").body.net.state_dict()  # type: ignore[union-attr]
    path = tmp_path / f"weights.{suffix}"
    write({**source, "head.fc.weight": torch.zeros(1000, 368), "head.fc.bias": torch.zeros(1000)}, path)
    loaded = backbone(backbone="timm:regnety_002", weights=str(path)).body.net.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(loaded[k], source[k]) for k in source)


@pytest.mark.parametrize("layout", ["nakashima", "nanda"])
def test_coco_weights_of_deeplabs_public_codes(tmp_path: Path, layout: str) -> None:
    """Against the network written out here, from the keys of either file."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    names = {"conv1": "reduce", "conv2": "conv3x3", "conv3": "increase", "downsample": "shortcut"}

    def unit(x: torch.Tensor, place: str, part: str, channels: int, side: int, relu: bool = True, **how: Any) -> Any:
        if layout == "nakashima":
            conv, norm = (
                f"base.{place}{names.get(part, part) if '.' in place[:-1] else part}.{k}" for k in ("conv", "bn")
            )
        else:
            norm = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "downsample": "downsample.1"}[part]
            conv, norm = f"Scale.{place}{part}{'.0' if part == 'downsample' else ''}", f"Scale.{place}{norm}"
        fan = x.shape[1] * side**2
        weight = torch.randn(channels, x.shape[1], side, side, generator=generator) / fan**0.5
        values = {"weight": torch.rand(channels, generator=generator) / 2 + 0.5}
        values |= {"bias": torch.randn(channels, generator=generator) / 10, "running_mean": torch.zeros(channels)}
        values |= {"running_var": torch.rand(channels, generator=generator) + 0.5}
        state[f"{conv}.weight"] = weight
        state.update({f"{norm}.{key}": value for key, value in values.items()})
        x = F.conv2d(x, weight, **how)
        x = F.batch_norm(x, values["running_mean"], values["running_var"], values["weight"], values["bias"])
        return F.relu(x) if relu else x

    image = torch.randint(0, 256, (1, 3, 33, 40), dtype=torch.uint8, generator=generator)
    x = image.float().flip(1) - torch.tensor([104.008, 116.669, 122.675])[:, None, None]  # BGR
    x = unit(x, "layer1." if layout == "nakashima" else "", "conv1", 64, 7, stride=2, padding=3)
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    stages = ((3, 64, 1, 1), (4, 128, 2, 1), (23, 256, 1, 2), (3, 512, 1, 4))
    for stage, (blocks, width, stride, dilation) in enumerate(stages, 2 if layout == "nakashima" else 1):
        for block in range(blocks):
            place = f"layer{stage}.block{block + 1}." if layout == "nakashima" else f"layer{stage}.{block}."
            first = stride if block == 0 else 1
            y = unit(x, place, "conv1", width, 1, stride=first)
            y = unit(y, place, "conv2", width, 3, padding=dilation, dilation=dilation)
            y = unit(y, place, "conv3", 4 * width, 1, relu=False)
            skip = unit(x, place, "downsample", 4 * width, 1, relu=False, stride=first) if block == 0 else x
            x = F.relu(y + skip)
    head = "base.aspp.c0.weight" if layout == "nakashima" else "Scale.layer5.conv2d_list.0.weight"
    torch.save({**state, head: torch.zeros(21, 2048, 3, 3)}, tmp_path / "coco.pth")
    net = backbone(backbone="resnet101-caffe", weights=str(tmp_path / "coco.pth"), output_stride=8)
    found = net(image).detach()
    assert found.shape == (1, 2048, 5, 6)  # rounded up, also from 40
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


def test_weight_errors_say_file_key_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise URLError("no route")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(WeightsError, match=r"cannot download.*resnet50-0676ba61.pth.*model\.weights="):
        backbone(backbone="resnet50", weights="")
    with pytest.raises(WeightsError, match=r"resnet101-caffe.*no hub has them.*DeepLab's ResNet-101 somewhere"):
        backbone(backbone="resnet101-caffe", weights="")
    with pytest.raises(WeightsError, match=r"model\.weights = /nowhere: no such file; put .*resnet50"):
        backbone(backbone="resnet50", weights="/nowhere")
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"not a tensor file")
    with pytest.raises(WeightsError, match=r"cannot be read as \.safetensors or"):
        backbone(backbone="resnet50", weights=str(path))
    torch.save({"conv1.weight": path}, tmp_path / "code.pth")  # anything but tensors is refused, not run
    with pytest.raises(WeightsError, match=r"code.pth cannot be read as .*Weights only load failed"):
        backbone(backbone="resnet50", weights=str(tmp_path / "code.pth"))
    state = backbone(backbone="timm:regnety_002").body.net.state_dict()  # type: ignore[union-attr]
    state["stem.conv.weight"] = torch.zeros(1)
    state["extra"] = torch.zeros(1)
    del state["s1.b1.conv1.conv.weight"]
    save_file(state, path)
    with pytest.raises(WeightsError) as error:
        backbone(backbone="timm:regnety_002", weights=str(path))
    for part in (
        "lacks s1.b1.conv1.conv.weight",
        "has extra",
        "stem.conv.weight is (1,) instead of (32, 3, 3, 3)",
        str(path),
    ):
        assert part in str(error.value)
    with pytest.raises(WeightsError, match="small backbone"):
        backbone(weights=str(path))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"backbone": "resnet51"}, "timm:<name>"),
        ({"backbone": "timm:resnet18x"}, "did you mean timm:resnet18"),
        ({"backbone": "timm:cait_xxs24_224"}, "model.output_stride = 16"),
    ],
)
def test_unknown_backbones(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backbone(**model)
