"""Dense CRF against a plain-loop lattice in float64, exact Gaussian kernels, and pydensecrf."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esol.config import CrfConfig
from esol.ops import dense_crf
from esol.ops.dense_crf import DenseCrf, refined, unary_from_labels, unary_from_probabilities
from esol.ops.lattice import spatial_kernel

PARAMETERS: dict[str, tuple[int, dict[str, float]]] = {  # labels, kernels
    "irn": (3, {}),
    "psa": (4, {"bilateral_sxy": 80, "bilateral_srgb": 13}),
    "deeplab": (21, {"gaussian_sxy": 1, "bilateral_sxy": 67, "bilateral_srgb": 3, "bilateral_compat": 4}),
    "81 classes": (81, {}),
}


def photo(height: int, width: int, seed: int = 0, noise: float = 4.0) -> Tensor:
    """Smooth colours plus noise, uint8 (3, H, W)."""
    random = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.rand(1, 3, 4, 5, generator=random) * 255, (height, width), mode="bicubic")[0]
    return (smooth + noise * torch.randn(3, height, width, generator=random)).clamp(0, 255).byte()


def energies(labels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth random scores as energies, (L, H, W)."""
    random = torch.Generator().manual_seed(100 + seed)
    scores = F.interpolate(torch.randn(1, labels, 6, 7, generator=random), (height, width), mode="bicubic")[0]
    return unary_from_probabilities((4 * scores).softmax(0))


def features(image: Tensor, sxy: float, srgb: float) -> np.ndarray:
    """(n, 5): x, y and colour in units of their deviations; (n, 2) where srgb is 0."""
    y, x = np.mgrid[: image.shape[1], : image.shape[2]]
    place = np.stack((x, y)).reshape(2, -1) / sxy
    return (np.concatenate((place, image.flatten(1).numpy() / srgb)) if srgb else place).T


def exact(f: np.ndarray) -> np.ndarray:
    """The Gaussian of unit deviation between all pairs of features, (n, n), normalised on both sides."""
    return normalised(np.exp(-((f[:, None] - f[None]) ** 2).sum(2) / 2))


def lattice(f: np.ndarray) -> np.ndarray:
    """The same as the permutohedral lattice filters it: one feature and one lattice point at a time."""
    n, d = f.shape
    basis = np.zeros((d + 1, d))
    for j in range(d):
        basis[: j + 1, j], basis[j + 1, j] = 1, -(j + 1)
    basis *= (d + 1) * math.sqrt(2 / 3) / np.linalg.norm(basis, axis=0)
    splat: dict[tuple[int, ...], np.ndarray] = {}
    for pixel, elevated in enumerate(f @ basis.T):
        base = (d + 1) * np.round(elevated / (d + 1))
        excess = round(base.sum()) // (d + 1)
        order = np.argsort(base - elevated, kind="stable")  # the largest residue first
        base[order[d + 1 - excess :] if excess > 0 else order[:-excess]] -= math.copysign(d + 1, excess)
        residue = elevated - base
        order = np.argsort(-residue, kind="stable")
        sorted_ = residue[order] / (d + 1)
        for k in range(d + 1):
            corner = base + k
            corner[order[d + 1 - k :]] -= d + 1
            weight = sorted_[d - k] - sorted_[d - k + 1] if k else 1 - sorted_[0] + sorted_[d]
            splat.setdefault(tuple(corner.astype(int)), np.zeros(n))[pixel] += weight
    values = splat
    for axis in range(d + 1):
        step = np.array([-d if i == axis else 1 for i in range(d + 1)])
        both = {p: [tuple(np.array(p) + sign * step) for sign in (-1, 1)] for p in values}
        values = {p: v + 0.5 * sum(values[q] for q in both[p] if q in values) for p, v in values.items()}
    return normalised(sum(np.outer(splat[p], values[p]) for p in splat))


def normalised(k: np.ndarray) -> np.ndarray:
    norm = 1 / np.sqrt(k.sum(1))
    return norm[:, None] * k * norm


def mean_field(energy: Tensor, kernels: list[tuple[float, np.ndarray]], iterations: int = 10) -> Tensor:
    """Plain float64 loop."""
    unary = energy.double().flatten(1)
    q = (-unary).softmax(0)
    for _ in range(iterations):
        q = (-unary + sum(compat * (q @ torch.from_numpy(k).T) for compat, k in kernels)).softmax(0)
    return q.view(energy.shape)


@pytest.mark.parametrize(("gaussian_sxy", "sxy", "srgb"), [(3.1, 8.3, 21.7), (2, 20, 40)])
def test_equals_a_plain_float64_loop_over_the_lattice_and_comes_close_to_exact_gaussians(
    gaussian_sxy: float, sxy: float, srgb: float
) -> None:
    image, energy = photo(20, 24), energies(3, 20, 24)
    pairs = [features(image, gaussian_sxy, 0), features(image, sxy, srgb)]
    crf = DenseCrf(image, gaussian_sxy=gaussian_sxy, bilateral_sxy=sxy, bilateral_srgb=srgb)
    for iterations in (1, 10):
        want = mean_field(energy, [(3, lattice(pairs[0])), (10, lattice(pairs[1]))], iterations)
        torch.testing.assert_close(crf.infer([energy], iterations)[0].double(), want, atol=1e-5, rtol=0)
    want = mean_field(energy, [(3, exact(pairs[0])), (10, exact(pairs[1]))])
    assert (crf.infer([energy])[0] - want).abs().mean() < 0.03
    agreement = (crf.infer([energy])[0].argmax(0) == want.argmax(0)).double().mean()
    assert agreement > 0.96 > 0.9 > (energy.argmin(0) == want.argmax(0)).double().mean()  # the last: no CRF at all


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_agrees_with_pydensecrf(name: str) -> None:
    reference = pytest.importorskip("pydensecrf.densecrf", reason="the reference, pydensecrf2, is not installed")
    labels, given = PARAMETERS[name]
    kernels = {"gaussian_sxy": 3, "bilateral_sxy": 50, "bilateral_srgb": 5, "bilateral_compat": 10} | given
    for seed, (height, width) in enumerate([(60, 80), (47, 61)]):
        image, energy = photo(height, width, seed), energies(labels, height, width, seed)
        theirs = reference.DenseCRF2D(width, height, labels)
        theirs.setUnaryEnergy(energy.flatten(1).numpy())
        theirs.addPairwiseGaussian(kernels["gaussian_sxy"], 3)
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        theirs.addPairwiseBilateral(
            kernels["bilateral_sxy"], kernels["bilateral_srgb"], pixels, kernels["bilateral_compat"]
        )
        want = torch.from_numpy(np.array(theirs.inference(10))).view(labels, height, width)
        got = DenseCrf(image, **given).infer([energy])[0]
        assert (got.argmax(0) == want.argmax(0)).double().mean() >= 0.999
        assert (got - want).abs().mean() < 1e-5


def test_label_sets_side_by_side_give_what_they_give_one_by_one() -> None:
    crf = DenseCrf(photo(40, 50))
    sets = [energies(labels, 40, 50, seed) for seed, labels in enumerate((2, 1, 4, 21))]
    for one, got in zip(sets, crf.infer(sets), strict=True):
        torch.testing.assert_close(got, crf.infer([one])[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(got.sum(0), torch.ones(40, 50))
    assert crf.infer([]) == []


def test_same_input_same_bytes() -> None:
    image, sets = photo(40, 50), [energies(3, 40, 50), energies(20, 40, 50)]
    first = DenseCrf(image).infer(sets)
    spatial_kernel.cache_clear()
    strided = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    second = DenseCrf(strided).infer([one.permute(2, 0, 1).contiguous().permute(1, 2, 0) for one in sets])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_switched_off_kernels_and_no_iterations() -> None:
    image, energy = photo(30, 40), energies(3, 30, 40)
    start = (-energy).softmax(0)
    assert torch.equal(DenseCrf(image).infer([energy], iterations=0)[0], start)
    assert torch.equal(DenseCrf(image, gaussian_compat=0, bilateral_compat=0).infer([energy])[0], start)
    spatial = DenseCrf(image, bilateral_compat=0).infer([energy])[0]
    assert torch.equal(spatial, DenseCrf(255 - image, bilateral_compat=0).infer([energy])[0])
    full, colour = DenseCrf(image).infer([energy])[0], DenseCrf(image, gaussian_compat=0).infer([energy])[0]
    assert min((full - spatial).abs().max(), (full - colour).abs().max(), (spatial - start).abs().max()) > 0.01


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1)])
@pytest.mark.parametrize("labels", [1, 2, 81])
def test_tiny_images(size: tuple[int, int], labels: int) -> None:
    energy = energies(labels, *size)
    got = DenseCrf(photo(*size)).infer([energy])[0]
    assert got.shape == (labels, *size)
    torch.testing.assert_close(got.sum(0), torch.ones(size))
    if size == (1, 1):  # alone among its neighbours: each kernel passes q on
        q = (-energy).softmax(0)
        for _ in range(10):
            q = (-energy + 13 * q).softmax(0)
        torch.testing.assert_close(got, q, atol=1e-5, rtol=0)


def test_a_constant_image_smooths_a_speckle_away_and_keeps_equal_energies_equal() -> None:
    image, labels = torch.full((3, 30, 40), 128, dtype=torch.uint8), torch.zeros(30, 40, dtype=torch.int64)
    labels[15, 20] = 1
    crf = DenseCrf(image)
    speckle, equal = crf.infer([unary_from_labels(labels, 2), torch.ones(4, 30, 40)])
    assert speckle.argmax(0).sum() == 0
    torch.testing.assert_close(equal, torch.full((4, 30, 40), 0.25))


def test_unaries() -> None:
    labels = torch.tensor([[0, 2, 255]])
    mine, other, unsure = -math.log(0.7), -math.log(0.15), math.log(3)
    want = torch.tensor([[[mine, other, unsure]], [[other, other, unsure]], [[other, mine, unsure]]])
    torch.testing.assert_close(unary_from_labels(labels, 3), want)
    torch.testing.assert_close(unary_from_labels(torch.tensor([[0, 255]]), 1, 0.9), torch.tensor([[[0.1053605, 0.0]]]))
    soft = unary_from_probabilities(torch.tensor([[[0.5]], [[0.0]], [[1.0]]]))
    torch.testing.assert_close(soft.flatten(), torch.tensor([0.6931472, 11.5129255, 0.0]))
    for wrong in (torch.tensor([[3]]), torch.tensor([[-1]])):
        with pytest.raises(ValueError, match=r"0\.\.2 or 255"):
            unary_from_labels(wrong, 3)


def test_refuses_what_it_cannot_do() -> None:
    image = photo(6, 8)
    with pytest.raises(ValueError, match="uint8"):
        DenseCrf(image.float())
    with pytest.raises(ValueError, match="above 0"):
        DenseCrf(image, bilateral_srgb=0)
    with pytest.raises(ValueError, match="too small"):
        DenseCrf(image, bilateral_sxy=1e-3, bilateral_srgb=1e-3)
    with pytest.raises(ValueError, match=r"\(L, 6, 8\)"):
        DenseCrf(image).infer([torch.zeros(2, 8, 6)])


def test_labels_that_no_pixel_wants_stay_out_and_nobody_notices() -> None:
    image, wanted = photo(40, 50), (-energies(3, 40, 50)).softmax(0)
    rare = torch.full((18, 40, 50), 1e-4)
    found = torch.cat((wanted[:2], rare, wanted[2:])) / (1 + 18e-4)
    config = CrfConfig(iterations=5)
    [got], [[whole]] = (
        refined([image], [found], config),
        dense_crf.mean_field([image], [[unary_from_probabilities(found)]], config),
    )
    assert torch.equal(got.argmax(0), whole.argmax(0))
    assert bool((got[2:20] == 0).all())
    torch.testing.assert_close(got, whole, atol=1e-2, rtol=0)
    [every] = dense_crf.mean_field([image], [[-wanted.log()]], config)
    torch.testing.assert_close(refined([image], [wanted], config), every)
    assert refined([image], [found], CrfConfig(iterations=0))[0] is found


MIXED = [(40, 50), (1, 1), (33, 61), (50, 40), (7, 1), (40, 50), (12, 9)]
SETS = [(2,), (4,), (7, 3), (3,), (5,), (), (21,)]  # labels of each photo's sets


@pytest.mark.parametrize("kind", ["irn", "psa", "deeplab"])
def test_photos_in_one_lattice_are_what_they_are_alone_to_the_bit(kind: str) -> None:
    kernels = PARAMETERS[kind][1]
    images = [photo(*size, seed) for seed, size in enumerate(MIXED)]
    photos = [n for n, labels in enumerate(SETS) for _ in labels]
    sets = [energies(own, *MIXED[n], n) for n, labels in enumerate(SETS) for own in labels]
    together = DenseCrf(*images, **kernels).infer(sets, photos=photos)
    for n, image in enumerate(images):
        alone = DenseCrf(image, **kernels).infer([own for own, m in zip(sets, photos, strict=True) if m == n])
        found = [own for own, m in zip(together, photos, strict=True) if m == n]
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
    other_way = [len(images) - 1 - n for n in photos[::-1]]
    turned = DenseCrf(*reversed(images), **kernels).infer(sets[::-1], photos=other_way)
    assert all(torch.equal(a, b) for a, b in zip(together, turned[::-1], strict=True))


def test_photos_of_the_same_pixels_do_not_touch() -> None:
    """Beside its twin, whose labels say the opposite, a photo is what it is alone: no kernel reaches over."""
    image, energy = photo(30, 40), energies(3, 30, 40)
    alone = DenseCrf(image).infer([energy])[0]
    for _ in range(2):  # the second time with the spatial lattice of the first
        assert torch.equal(DenseCrf(image, image).infer([energy, energy.flip(0)], photos=[0, 1])[0], alone)


def test_nobody_builds_a_lattice_for_one_label(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [photo(*size) for size in MIXED[:3]]
    unaries = [[energies(1, *MIXED[0])], [], [energies(2, *MIXED[2]), energies(1, *MIXED[2])]]
    built: list[tuple[tuple[int, int], ...]] = []
    real = DenseCrf.__init__

    def spy(self: DenseCrf, *photos: Tensor, **options: float) -> None:
        real(self, *photos, **options)
        built.append(self.sizes)

    monkeypatch.setattr(DenseCrf, "__init__", spy)
    found = dense_crf.mean_field(images, unaries, CrfConfig())
    assert built == [(MIXED[2],)]
    assert [len(own) for own in found] == [1, 0, 2]
    assert bool((found[0][0] == 1).all())
    assert bool((found[2][1] == 1).all())
    assert torch.equal(found[2][0], DenseCrf(images[2]).infer([unaries[2][0]])[0])
    dense_crf.mean_field(images[:2], unaries[:2], CrfConfig())
    assert len(built) == 2


def test_of_a_hundred_equal_labels_some_take_part() -> None:
    even = torch.full((120, 5, 6), 1 / 120)
    torch.testing.assert_close(refined([photo(5, 6)], [even], CrfConfig(iterations=2)), [even])
