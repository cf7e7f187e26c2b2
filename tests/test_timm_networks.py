"""Plain ViTs, Swin and ConvNeXt of timm: against timm's own forward passes, on every grid that the house has."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from esol.base.errors import ConfigError, StrideError, WeightsError
from esol.base.schema import build
from esol.config import ModelConfig
from esol.models.affinity_net import AffinityNet
from esol.models.backbones import Backbone, build_backbone
from esol.models.cam_net import CamNet
from esol.models.deeplab import DeepLab
from esol.models.folded import for_inference, for_training
from esol.models.irn_net import IrnNet
from esol.models.timm_networks import on_level, on_patches

SMALL: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {  # networks of these kinds, but for their size
    "small_swin": (SwinTransformer, {"embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 3, 4)}),
    "small_distilled": (VisionTransformerDistilled, {}),
    "small_dinov2": (VisionTransformer, {"patch_size": 14, "no_embed_class": True, "reg_tokens": 4}),
    "small_eva02": (Eva, {"patch_size": 14, "use_rot_pos_emb": True, "ref_feat_shape": 16, "swiglu_mlp": True}),
}
TOKENS = ["test_vit", "test_vit3", *list(SMALL)[1:]]  # test_vit3 pools by attention, which is no part of the features
LEVELS = ["small_swin", "test_convnext"]


def _register(name: str) -> None:
    kind, options = SMALL[name]
    sizes = options if "depths" in options else {"embed_dim": 48, "depth": 4, "num_heads": 2, **options}

    def make(pretrained: bool = False, **more: Any) -> nn.Module:
        net: Any = kind(**sizes, **{key: more[key] for key in more if not key.startswith(("pretrained", "cache"))})
        net.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "classifier": "head"}
        return net

    make.__name__ = name
    register_model(make)


for small in SMALL:
    _register(small)


def backbone(name: str, **model: Any) -> Backbone:
    torch.manual_seed(0)
    section = {"backbone": f"timm:{name}", "weights": "none", "freeze": "none", **model}
    return build_backbone(build(ModelConfig, section))


def photo(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)


def theirs(net: Backbone, name: str, **options: Any) -> Any:
    """timm's network as timm makes it, with the same weights."""
    own = timm.create_model(name, num_classes=0, **options).eval()
    own.load_state_dict(net.body.net.state_dict())  # type: ignore[union-attr, arg-type]
    return own


def normalised(net: Backbone, image: Tensor) -> Tensor:
    about = net.body.net.pretrained_cfg  # type: ignore[union-attr, union-attr]
    mean, std = (torch.tensor(about[key]).view(1, 3, 1, 1) * 255 for key in ("mean", "std"))  # type: ignore[index, call-overload]
    return (image.float() - mean) / std


@torch.no_grad()
@pytest.mark.parametrize("name", TOKENS)
def test_a_plain_vit_is_timms_of_the_photo_at_its_scale(name: str) -> None:
    """At the network's own size and stride as timm makes it, elsewhere as timm has it for any size."""
    patch = 14 if name in ("small_dinov2", "small_eva02") else 16
    net = backbone(name, output_stride=16).eval()
    whole, free = theirs(net, name), theirs(net, name, dynamic_img_size=True)
    side = whole.patch_embed.grid_size[0] * 16
    image, prefix = photo(side, side), whole.num_prefix_tokens
    x = normalised(net, image)
    scaled = x if patch == 16 else on_patches(x, 16, 14)
    want = whole.forward_features(scaled)[:, prefix:]
    torch.testing.assert_close(net(image).flatten(2).transpose(1, 2), want, rtol=0, atol=1e-6)

    fine = backbone(name, output_stride=8).eval()
    image = photo(65, 100)
    scaled = on_patches(normalised(net, image), 8, patch)
    assert scaled.shape == (2, 3, 9 * patch, 13 * patch)
    want, levels = free.forward_intermediates(scaled, indices=fine.body.ends, norm=True)  # type: ignore[union-attr, arg-type]
    found = fine.pyramid(image)
    for level, own in zip(found, levels, strict=True):
        torch.testing.assert_close(level, own, rtol=0, atol=1e-6)
    want = want[:, prefix:].transpose(1, 2).unflatten(2, (9, 13))
    torch.testing.assert_close(fine(image), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[-1], fine(image), rtol=0, atol=0)
    assert fine.levels == ((fine.channels, 8),) * 4


@torch.no_grad()
@pytest.mark.parametrize("name", LEVELS)
def test_levels_of_swin_and_convnext_are_timms_at_multiples_of_the_stride(name: str) -> None:
    net = backbone(name, output_stride=32).eval()
    options = {"strict_img_size": False} if "swin" in name else {}
    own, image = theirs(net, name, **options), photo(96, 64)
    want, levels = own.forward_intermediates(normalised(net, image))
    last = want.permute(0, 3, 1, 2) if "swin" in name else want
    assert torch.allclose(net(image), last, atol=1e-6)
    for found, level in zip(net.pyramid(image), [*levels[:-1], last], strict=True):
        assert torch.allclose(found, level, atol=1e-6)
    assert [stride for _, stride in net.levels] == [4, 8, 16, 32]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "stride"), [("test_vit", 8), ("test_vit", 16), ("small_eva02", 8), *((name, 32) for name in LEVELS)]
)
@pytest.mark.parametrize("size", [(64, 96), (65, 97), (70, 99), (5, 40)])
def test_sizes_of_all_levels(name: str, stride: int, size: tuple[int, int]) -> None:
    net = backbone(name, output_stride=stride).eval()
    assert net.stride == stride
    levels = net.pyramid(photo(*size))
    for level, (channels, own) in zip(levels, net.levels, strict=True):
        assert level.shape == (2, channels, -(-size[0] // own), -(-size[1] // own))
    assert torch.equal(levels[-1], net(photo(*size)))


@pytest.mark.parametrize(("stride", "patch"), [(8, 16), (8, 14), (16, 16), (16, 14), (32, 16), (32, 32)])
def test_cells_are_centred_on_the_pixels_of_the_grid_and_mirror(stride: int, patch: int) -> None:
    """A ramp's value in the middle of a cell says which pixel the cell looks at."""
    for length, first in ((stride * 5 + 1, 0.0), (stride * 5, (stride - 1) / 2)):
        ramp = torch.arange(float(length)).view(1, 1, 1, -1).expand(1, 1, length, -1)
        seen = on_patches(ramp, stride, patch)
        cells = -(-length // stride)
        assert seen.shape[2:] == (cells * patch,) * 2
        middle = seen[0, 0, 0].unflatten(0, (cells, patch)).mean(1)
        torch.testing.assert_close(middle[1:-1], first + stride * torch.arange(1.0, cells - 1), rtol=0, atol=1e-3)
        noise = torch.rand(1, 1, length, length)
        torch.testing.assert_close(on_patches(noise.flip(3), stride, patch).flip(3), on_patches(noise, stride, patch))
    image = torch.rand(1, 3, 4 * stride, 2 * stride)
    assert torch.equal(on_patches(image, stride, stride), image)


def test_levels_look_at_the_pixels_of_their_own_grid() -> None:
    """A level whose features say where their cells are, on a photo of a grid's size: feature j is at pixel 4 j."""
    length = 32 * 3 + 1
    cells = torch.arange(4 * 8.0)  # of stride 4, on a grid of 4 cells of stride 32
    pixel = (cells * 4 + 1.5 - (4 * 32 - length) / 2).view(1, 1, 1, -1).expand(1, 1, 32, -1)
    found = on_level(pixel, 4, 32, (length, length))
    torch.testing.assert_close(found[0, 0, 0], 4 * torch.arange(25.0))


@torch.no_grad()
def test_features_mirror_where_the_network_knows_no_left() -> None:
    """With patches that are their own mirror image and no position embeddings, at sizes on and beside the grid."""
    net = backbone("test_vit", output_stride=8).eval()
    own: Any = net.body.net
    own.pos_embed.zero_()
    weight = own.patch_embed.proj.weight
    weight.copy_((weight + weight.flip(3)) / 2)
    for size in ((65, 97), (60, 91)):
        image = photo(*size)
        torch.testing.assert_close(net(image.flip(3)).flip(3), net(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*TOKENS[:2], *LEVELS])
def test_everything_learns_that_the_features_depend_on(name: str) -> None:
    """DistributedDataParallel waits for the gradient of each parameter that may learn."""
    net = backbone(name, output_stride=32).train()
    net(photo(64, 64)).square().mean().backward()
    learning = {n for n, p in net.named_parameters() if p.requires_grad}
    assert {n for n, p in net.named_parameters() if p.grad is not None} == learning
    assert any("head" in n or "attn_pool" in n or "fc_norm" in n for n, _ in net.named_parameters()) == (
        name in ("test_vit3", "test_convnext")
    )


def test_stem_of_a_vit_is_half_of_it() -> None:
    net = backbone("small_eva02", freeze="stem")
    frozen = {n.removeprefix("body.net.") for n, p in net.named_parameters() if not p.requires_grad}
    assert {"pos_embed", "cls_token", "patch_embed.proj.weight"} <= frozen
    half = {f"blocks.{i}" for i in range(2)}
    assert {".".join(n.split(".")[:2]) for n in frozen if n.startswith("blocks")} == half
    assert not any(p.requires_grad for p in backbone("test_vit", freeze="all").parameters())


@pytest.mark.parametrize(("name", "stride"), [("test_vit", 8), ("test_convnext", 8), ("small_swin", 32)])
def test_networks_of_the_house_stand_on_them(name: str, stride: int) -> None:
    image = photo(65, 65)
    body = backbone(name, output_stride=stride)
    nets: list[nn.Module] = [CamNet(body, 3, 16), AffinityNet(body)]
    if stride == 8:
        nets.append(DeepLab(body, 4))
    shapes = [(2, 3), (2, 448, 9, 9), (2, 4, 9, 9)]
    for net, shape in zip(nets, shapes, strict=False):
        with torch.autocast("cpu", torch.bfloat16):
            found = net.train()(image)
        assert found.shape == shape
        found.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
    irn = IrnNet(backbone(name, output_stride=stride, freeze="all"))
    edge, displacement = irn(image)
    assert (edge.shape, displacement.shape) == ((2, 1, 17, 17), (2, 2, 17, 17))
    (edge.mean() + displacement.mean()).backward()
    assert all(p.grad is None for p in irn.backbone.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_vit", *LEVELS])
def test_bf16_is_near_float32_and_ready_networks_say_the_same(name: str) -> None:
    net, image = backbone(name, output_stride=32, freeze="all").eval(), photo(97, 65)
    want = net(image)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(image)
    assert (found.float() - want).abs().max() < 0.05 * want.abs().max()
    for_training(net, None)
    assert torch.allclose(net(image), want, atol=1e-5)
    assert torch.allclose(for_inference(net, torch.device("cpu"), None)(image), want, atol=1e-5)


def test_errors_name_what_there_is_and_what_to_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StrideError, match=r"'timm:small_swin' has features of stride 32 alone, not of .*stride = 8"):
        backbone("small_swin", output_stride=8)
    with pytest.raises(ConfigError, match=r"VisionTransformerRelPos does not take photos of any size .* choose"):
        backbone("test_vit_relpos", output_stride=32)
    path = tmp_path / "dinov2.safetensors"
    with pytest.raises(WeightsError, match=rf"{path}: no such file; put model.safetensors of timm/test_vit"):
        backbone("test_vit", weights=str(path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("timm.models._builder.load_pretrained", _nowhere)
    with pytest.raises(WeightsError, match=r"Put model.safetensors of timm/test_vit.* model.weights=/path/to"):
        backbone("test_vit", weights="")


def _nowhere(*_: Any, **__: Any) -> None:
    raise OSError("no network")


def test_weights_of_a_file_in_timms_names_and_in_dinov2s(tmp_path: Path) -> None:
    """DINOv2's authors have registers beside a class token with a position, and a token for masks."""
    name = "small_dinov2"
    net = backbone(name)
    state = {k: v.clone() for k, v in net.body.net.state_dict().items()}  # type: ignore[union-attr]
    state = {k: torch.rand_like(v) for k, v in state.items()}
    save_file(state, tmp_path / "timm.safetensors")
    position = torch.rand(1, 1, 48)
    authors = {k: v for k, v in state.items() if k not in ("reg_token", "cls_token", "pos_embed")}
    authors |= {"register_tokens": state["reg_token"], "cls_token": state["cls_token"] - position}
    authors |= {"pos_embed": torch.cat((position, state["pos_embed"]), 1), "mask_token": torch.zeros(1, 48)}
    torch.save(authors, tmp_path / "authors.pth")
    for file in ("timm.safetensors", "authors.pth"):
        found = backbone(name, weights=str(tmp_path / file)).body.net.state_dict()  # type: ignore[union-attr]
        assert found.keys() == state.keys()
        for key in state:
            torch.testing.assert_close(found[key], state[key])
