"""Pairs and random walk against plain loops and a dense matrix in float64."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import esol.ops.random_walk as walk_module
from esol.ops.pairs import boundary_affinity, feature_affinity, pair_labels, pair_offsets
from esol.ops.random_walk import random_walk

SMALL = [(1, 1), (1, 7), (7, 1), (3, 2)]  # smaller than the radius
SIZES = [*SMALL, (13, 17)]


def pairs(radius: int, height: int, width: int) -> Iterator[tuple[int, tuple[int, int], tuple[int, int]]]:
    """All pairs inside the image: k, first pixel, second pixel."""
    for k, (dy, dx) in enumerate(pair_offsets(radius)):
        for y, x in itertools.product(range(height), range(width)):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                yield k, (y, x), (y + dy, x + dx)


def plain_boundary(edge: Tensor, radius: int) -> Tensor:
    rows: dict[tuple[int, int, int], Tensor] = {}
    for k, (y, x), (to_y, to_x) in pairs(radius, *edge.shape[1:]):
        box = itertools.product(range(y, to_y + 1), range(min(x, to_x), max(x, to_x) + 1))
        length = ((to_y - y) ** 2 + (to_x - x) ** 2) ** 0.5
        way = [(b, a) for b, a in box if abs((to_y - y) * (a - x) - (to_x - x) * (b - y)) / length < 1 - 1e-9]
        rows[k, y, x] = 1 - torch.stack([edge[:, b, a] for b, a in way]).amax(0)
    return _filled(rows, edge, radius)


def plain_feature(features: Tensor, radius: int) -> Tensor:
    rows: dict[tuple[int, int, int], Tensor] = {}
    for k, (y, x), (to_y, to_x) in pairs(radius, *features.shape[2:]):
        rows[k, y, x] = (-(features[:, :, y, x] - features[:, :, to_y, to_x]).abs().mean(1)).exp()
    return _filled(rows, features, radius)


def _filled(rows: dict[tuple[int, int, int], Tensor], like: Tensor, radius: int) -> Tensor:
    shape = (len(pair_offsets(radius)), *like.shape[-2:])
    nothing = 0 * like.flatten(1).sum(1)  # a part of the graph even where there is no pair
    flat = [rows.get(place, nothing) for place in itertools.product(*map(range, shape))]
    return torch.stack(flat, 1).view(len(like), *shape)


def plain_walk(maps: Tensor, affinity: Tensor, radius: int, beta: float, steps: int) -> Tensor:
    """As PSA and IRN do it, with the dense matrix, for one image (n, h, w)."""
    count, height, width = maps.shape
    dense = torch.eye(height * width, dtype=torch.float64)
    for k, (y, x), (to_y, to_x) in pairs(radius, height, width):
        i, j = y * width + x, to_y * width + to_x
        dense[i, j] = dense[j, i] = affinity[k, y, x]
    dense = dense**beta
    transition = dense / dense.sum(0, keepdim=True)
    return (maps.double().view(count, -1) @ torch.linalg.matrix_power(transition, steps)).view(maps.shape)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(("radius", "count"), [(1, 0), (3, 12), (5, 34), (10, 152)])
def test_offsets_and_their_opposites_are_all_pixels_nearer_than_the_radius(radius: int, count: int) -> None:
    offsets = pair_offsets(radius)
    square = itertools.product(range(-radius, radius + 1), repeat=2)
    disc = {(y, x) for y, x in square if 0 < y * y + x * x < radius * radius}
    assert len(offsets) == count
    assert {*offsets, *((-y, -x) for y, x in offsets)} == disc
    assert list(offsets) == sorted(offsets)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("radius", [3, 5])
def test_boundary_affinity_and_its_gradient(size: tuple[int, int], radius: int) -> None:
    torch.manual_seed(0)
    edge = torch.rand(2, *size, requires_grad=True)
    wide = edge.detach().double().requires_grad_()
    got, want = boundary_affinity(edge, radius), plain_boundary(wide, radius)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=1e-7, rtol=0)
    upstream = torch.rand_like(want)
    got.backward(upstream.float())
    want.backward(upstream)
    torch.testing.assert_close(edge.grad, wide.grad.float(), atol=1e-4, rtol=1e-5)  # type: ignore[union-attr]


def test_boundary_gradient_goes_to_the_first_of_equals_and_stays_out_of_pairs_outside() -> None:
    edge = torch.ones(1, 2, 2, requires_grad=True)
    boundary_affinity(edge, 2).sum().backward()  # two pairs across, two down, two diagonal: those pass all four pixels
    assert edge.grad is not None
    assert edge.grad.tolist() == [[[-4, -1], [-1, 0]]]


def test_boundary_affinity_keeps_two_bytes_a_pair_and_takes_half_precision() -> None:
    edge = torch.rand(2, 20, 30, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        got = boundary_affinity(edge, 10)
    assert sum(t.nbytes for t in kept) == 2 * got.numel()
    torch.testing.assert_close(got, boundary_affinity(edge.float(), 10))
    got.sum().backward()
    assert edge.grad is not None
    assert edge.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("size", [*SMALL, (6, 9)])
@pytest.mark.parametrize("radius", [3, 5])
def test_feature_affinity_and_its_gradient(size: tuple[int, int], radius: int) -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    again = features.detach().clone().requires_grad_()
    got, want = feature_affinity(features, radius), plain_feature(again, radius)
    torch.testing.assert_close(got, want)
    upstream = torch.rand_like(want)
    got.backward(upstream)
    want.backward(upstream)
    torch.testing.assert_close(features.grad, again.grad)


def test_feature_affinity_in_blocks_of_channels_and_in_half_precision() -> None:
    torch.manual_seed(0)
    features = torch.randn(1, 50, 120, 120, requires_grad=True)  # two blocks
    got = feature_affinity(features, 2)
    want = (-(features[..., 1:, :] - features[..., :-1, :]).abs().mean(1)).exp()
    down = pair_offsets(2).index((1, 0))
    torch.testing.assert_close(got[:, down, :-1], want)
    (ours,) = torch.autograd.grad(got[:, down].sum(), features)
    (theirs,) = torch.autograd.grad(want.sum(), features)
    torch.testing.assert_close(ours, theirs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = feature_affinity(features.bfloat16(), 2)
    assert half.dtype == torch.float32
    assert (half - got).abs().max() < 0.01


@pytest.mark.parametrize("size", SIZES)
def test_pair_labels(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 20, 255])[torch.randint(0, 5, (2, *size))]
    shape = (2, len(pair_offsets(5)), *size)
    background, foreground, different = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    for k, (y, x), (to_y, to_x) in pairs(5, *size):
        for b in range(2):
            pair = {int(labels[b, y, x]), int(labels[b, to_y, to_x])}
            background[b, k, y, x] = pair == {0}
            foreground[b, k, y, x] = len(pair) == 1 and not pair & {0, 255}
            different[b, k, y, x] = len(pair) == 2 and 255 not in pair
    for kind in (torch.int64, torch.uint8):
        got = pair_labels(labels.to(kind), 5)
        assert all(torch.equal(a, b) for a, b in zip(got, (background, foreground, different), strict=True))


def test_ignored_pixels_are_in_no_pair() -> None:
    assert not any(kind.any() for kind in pair_labels(torch.full((1, 9, 9), 255, dtype=torch.uint8), 5))


@pytest.fixture(params=["in slices", "all at once", "in parts"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How a product is computed: in slices on a CPU, all neighbours at once on a GPU, in parts where they are many."""
    if request.param != "in slices":
        monkeypatch.setattr(walk_module, "_pair_by_pair", walk_module._all_at_once)
    if request.param == "in parts":
        monkeypatch.setattr(walk_module, "ROOM", 1500)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("radius", "beta", "steps"), [(5, 10, 256), (3, 8, 256), (5, 2.5, 7), (3, 1, 1), (5, 10, 0)])
def test_walk_equals_the_dense_matrix(size: tuple[int, int], radius: int, beta: float, steps: int) -> None:
    torch.manual_seed(0)
    spike = torch.zeros(1, *size)
    spike[0, -1, -1] = 1
    maps = torch.cat((torch.rand(2, *size), spike))
    for edge in (torch.rand(1, *size), torch.rand(1, *size) * 0.1, torch.zeros(1, *size)):
        affinity = boundary_affinity(edge, radius)
        [got] = random_walk([maps], affinity, radius, beta, steps)
        want = plain_walk(maps, affinity[0], radius, beta, steps)
        for ours, theirs in zip(got, want, strict=True):
            assert error(ours, theirs) < 2e-5


@pytest.mark.usefixtures("way")
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("radius", [3, 5])
def test_photos_side_by_side_walk_as_alone_and_again_the_same(radius: int, request: pytest.FixtureRequest) -> None:
    """Of other grids, classes and steps; to the bit in slices, where nobody's sum depends on who stands beside him."""
    torch.manual_seed(0)
    sizes, counts, steps = [*SIZES, (17, 13), (4, 30)], (2, 1, 3, 0, 7, 4, 2), (256, 3, 0, 9, 100, 256, 1)
    maps = [torch.rand(count, *size) for count, size in zip(counts, sizes, strict=True)]
    affinity = [boundary_affinity(torch.rand(1, *size) * 0.3, radius)[0] for size in sizes]
    together = random_walk(maps, affinity, radius, 8, steps)
    alone = [random_walk([m], [a], radius, 8, s)[0] for m, a, s in zip(maps, affinity, steps, strict=True)]
    again = random_walk(maps, affinity, radius, 8, steps)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    if "in slices" in request.node.name:
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    for got, want in zip(together, alone, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("count", [0, 1, 81])
def test_walk_takes_any_number_of_classes_and_keeps_constants(count: int) -> None:
    torch.manual_seed(0)
    maps = torch.rand(2, count, 1, 1).expand(2, count, 8, 12)
    got = random_walk([*maps], [*boundary_affinity(torch.rand(2, 8, 12), 3)], 3, 10)  # in parts: 68 pairs are slower
    assert torch.equal(torch.stack(got), maps)


@pytest.mark.usefixtures("way")
def test_walk_without_affinity_changes_nothing_and_never_leaves_the_range_of_its_map() -> None:
    torch.manual_seed(0)
    maps, affinity = torch.rand(2, 20, 21), boundary_affinity(torch.rand(1, 20, 21) * 0.3, 5)[0]
    torch.testing.assert_close(random_walk([maps], [affinity * 0], 5, 10), [maps], atol=1e-6, rtol=0)
    spike = torch.zeros_like(maps)
    spike[..., 3, 3] = 1
    assert random_walk([spike], [affinity], 5, 10)[0].min() >= 0


@pytest.mark.usefixtures("way")
def test_walk_looks_at_no_pair_that_leaves_the_image() -> None:
    torch.manual_seed(0)
    maps, affinity = torch.rand(2, 6, 7), boundary_affinity(torch.rand(1, 6, 7), 3)[0]
    outside = boundary_affinity(torch.zeros(1, 6, 7), 3)[0] == 0
    got, same = (random_walk([maps, maps], [own] * 2, 3, 4) for own in (affinity, affinity + outside))
    assert all(torch.equal(a, b) for a, b in zip(got, same, strict=True))


def test_walk_names_what_does_not_fit() -> None:
    maps, affinity = torch.rand(2, 6, 7), torch.rand(12, 6, 7)
    with pytest.raises(ValueError, match="radius 5"):
        random_walk([maps], [affinity], 5, 10)
    with pytest.raises(ValueError, match="beta must be above 0"):
        random_walk([maps], [affinity], 3, 0)
