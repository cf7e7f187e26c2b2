"""Affinities without training: cosines of frozen features, a ViT's attention, boxes, and the stage."""

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esol.config import BackboneConfig, WalkConfig
from esol.models.attention import MOST, PatchAttention
from esol.models.backbones import build_backbone
from esol.ops.frozen_affinity import cosine_affinity, doubly_stochastic, normalised_cut
from esol.ops.pairs import pair_offsets
from esol.ops.pseudo_labels import attended_scores, boxed, walked_scores
from esol.pipeline.likeness import likeness, parted, telling
from esol.pipeline.masks import mask_stages
from esol.pipeline.registry import table
from esol.stages.affinity_masks import AffinityMasks, AffinityMasksConfig
from esol.stages.vote import _voters


def test_cosines_against_the_formula() -> None:
    levels = [torch.randn(5, 4, 6) + 3, torch.randn(2, 4, 6)]
    found = cosine_affinity(levels, 3)
    for k, (dy, dx) in enumerate(pair_offsets(3)):
        for y in range(4):
            for x in range(6):
                other, want = (y + dy, x + dx), 0.0
                if 0 <= other[0] < 4 and 0 <= other[1] < 6:
                    away = [own - own.mean((1, 2), keepdim=True) for own in levels]
                    each = [F.cosine_similarity(own[:, y, x], own[:, other[0], other[1]], dim=0) for own in away]
                    want = max(0.0, float(sum(each)) / 2)
                assert found[k, y, x] == pytest.approx(want, abs=1e-5)


def test_attention_becomes_symmetric_and_its_sums_one() -> None:
    attention = (torch.randn(60, 60, generator=torch.Generator().manual_seed(0)) * 3).softmax(1)
    found = doubly_stochastic(attention)
    assert torch.equal(found, found.T)
    assert (found.sum(1) - 1).abs().max() < 1e-3
    plain = (attention + attention.T).double()  # rows and columns in turn, as Sinkhorn has it
    for _ in range(500):
        plain = plain / plain.sum(1, keepdim=True)
        plain = plain / plain.sum(0, keepdim=True)
    assert (found - plain).abs().max() < 1e-3


def test_the_normalised_cut_against_the_formula() -> None:
    affinity, labels = torch.rand(len(pair_offsets(3)), 5, 7), torch.randint(0, 3, (5, 7)) * 2
    cut, association = dict.fromkeys((0, 2, 4), 0.0), dict.fromkeys((0, 2, 4), 0.0)
    for k, (dy, dx) in enumerate(pair_offsets(3)):
        for y, x in np.ndindex(5, 7):
            if 0 <= y + dy < 5 and 0 <= x + dx < 7:
                ends = (int(labels[y, x]), int(labels[y + dy, x + dx]))
                for own in ends:
                    association[own] += float(affinity[k, y, x])
                    cut[own] += float(affinity[k, y, x]) * (ends[0] != ends[1])
    want = np.mean([cut[own] / association[own] for own in cut])
    assert normalised_cut(affinity, labels, 3) == pytest.approx(want)
    assert normalised_cut(affinity, labels * 0, 3) == 1  # a map that parts nothing


@torch.no_grad()
def test_a_whole_object_parts_less_of_what_is_alike_than_its_head_does() -> None:
    """Contrast has it the other way round where the head has the strongest edges, as heads of animals do."""
    torch.manual_seed(0)
    photo, body, head = torch.randint(90, 110, (3, 96, 128)), torch.zeros(96, 128), torch.zeros(96, 128)
    body[24:72, 24:104], head[24:72, 24:48] = 1, 1
    photo = torch.where(body > 0, photo + 60, photo)
    photo = torch.where(head > 0, photo + 60, photo).to(torch.uint8)
    backbone = build_backbone(BackboneConfig("small", "none", freeze="all"))
    alike = likeness(backbone, photo)
    assert parted(alike, body) < parted(alike, head)


def test_boxes_around_what_is_above_the_threshold() -> None:
    maps = torch.zeros(2, 5, 6)
    maps[0, 1, 2] = maps[0, 3, 4] = 1
    maps[1, 4, 0] = 0.2  # never reaches the threshold: its own highest value stands in
    walked = torch.rand(3, 5, 6) + 0.1
    found = boxed(walked, maps, 0.5)
    want = torch.zeros(2, 5, 6, dtype=torch.bool)
    want[0, 1:4, 2:5], want[1, 4, 0] = True, True
    assert torch.equal(found[0], walked[0])
    assert torch.equal(found[1:], walked[1:] * want)
    assert boxed(walked, maps, 0) is walked


def test_scores_follow_the_affinities() -> None:
    """Two halves that nothing joins: a seed fills its own, and a photo without classes has no scores."""
    maps = torch.zeros(1, 8, 8)
    maps[0, 3, 1] = 1
    half = torch.zeros(8, 8)
    half[:, 4:] = 1
    joined = (half.flatten()[:, None] == half.flatten()).float()
    features = torch.stack((1 - half, half))
    sizes = [(8, 8), (8, 8)]
    config = WalkConfig(alpha=4.0, steps=60, radius=3)
    for found in (
        attended_scores([maps, maps[:0]], lambda i: (doubly_stochastic(joined), 8), sizes, config),
        walked_scores([maps, maps[:0]], lambda i: cosine_affinity([features], 3), sizes, config),
    ):
        assert found[1].shape == (0, 8, 8)
        assert found[0][0, :, 4:].max() == 0
        assert found[0][0, :, :4].min() > 0
        assert found[0][0, :, :4].std() < 0.01


def vit() -> PatchAttention:
    torch.manual_seed(0)
    return PatchAttention(build_backbone(BackboneConfig("timm:test_vit", "none", freeze="all")).eval(), 3)


@torch.no_grad()
def test_attention_is_the_softmax_of_the_last_blocks() -> None:
    """Against queries and keys by hand, of the whole photo and in two threads at a time."""
    own, image = vit(), torch.randint(0, 256, (3, 65, 97), dtype=torch.uint8)
    net: Any = own.backbone.body.net
    kept: list[Tensor] = []
    hooks = [block.attn.register_forward_pre_hook(lambda m, x: kept.append(x[0])) for block in net.blocks[-3:]]
    found, width = own(image)
    for hook in hooks:
        hook.remove()
    want = torch.zeros(1)
    for block, x in zip(net.blocks[-3:], kept, strict=True):
        attn = block.attn
        q, k, _ = attn.qkv(x).reshape(1, -1, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        want = want + (q @ k.transpose(2, 3) * attn.scale).softmax(3)[0].mean(0)[1:, 1:] / 3
    assert width == 7
    torch.testing.assert_close(found, want)

    photos = [torch.randint(0, 256, (3, 33 + 16 * i, 49), dtype=torch.uint8) for i in range(6)]
    alone, together = [own(one)[0] for one in photos], {}
    threads = [threading.Thread(target=lambda i=i: together.update({i: own(photos[i])[0]})) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.allclose(together[i], alone[i], atol=1e-6) for i in range(6))


@torch.no_grad()
def test_a_large_photo_is_made_smaller_for_its_attention() -> None:
    found, width = vit()(torch.zeros(3, 2000, 1000, dtype=torch.uint8))
    assert len(found) <= 1.1 * MOST
    assert len(found) % width == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["small", "timm:tf_efficientnet_lite0", "timm:test_vit"])
def test_the_stage_scores_photos_of_any_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage: Any = AffinityMasks.__new__(AffinityMasks)
    stage.config = AffinityMasksConfig(box=0.4)
    stage.context = SimpleNamespace(
        config=SimpleNamespace(seed=0, model=BackboneConfig(name, "none")),
        index=SimpleNamespace(classes=("a", "b")),
        ready=lambda net: net.eval(),
        engine=SimpleNamespace(autocast=lambda: torch.autocast("cpu", torch.bfloat16)),
    )
    backbone = build_backbone(BackboneConfig(name, "none", freeze="all"))
    monkeypatch.setattr("esol.stages.affinity_masks.initial_backbone", lambda config, classes, freeze: backbone)
    monkeypatch.setattr("esol.pipeline.masks.StageShards", lambda context, name: None)
    stage.open()
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((70, 51), (33, 80))]
    maps = [{"stride4": np.random.default_rng(0).random((2, 18, 13), np.float32)}, {"stride4": np.zeros((0, 9, 20))}]
    scores = stage.scores_of(images, maps)
    assert [own.shape for own in scores] == [(2, 70, 51), (0, 33, 80)]
    assert 0 <= scores[0].min() < scores[0].max() <= 1


def test_levels_that_say_what_is_alike() -> None:
    assert telling([2, 4, 8, 16, 16]) == [1, 2, 3]
    assert telling([4, 8, 16, 32]) == [0, 1, 2]
    assert telling([32]) == [0]


def test_it_is_a_mask_stage_that_runs_only_where_it_is_named() -> None:
    assert "affinity_masks" in mask_stages()
    assert "affinity_masks" not in _voters()
    assert not table()["affinity_masks"].default
