"""Class maps to labels and pseudo masks: what each rule decides, and the images that every rule trips over."""

import pytest
import torch

from esol.config import CrfConfig, IrnLabelsConfig, IrnMasksConfig, PsaLabelsConfig, PsaMasksConfig, SeedMasksConfig
from esol.localize.pseudo_labels import irn_labels, irn_scores, psa_labels, psa_scores, pseudo_mask

OFF = CrfConfig(iterations=0)
GRAY = torch.full((3, 1, 4), 128, dtype=torch.uint8)
CLASSES = torch.tensor([2, 5])
MAPS = torch.tensor([[[0.9, 0.2, 0.02, 0.2]], [[0.1, 0.1, 0.01, 0.3]]])


def test_irn_labels_merge_the_two_thresholds() -> None:
    config = IrnLabelsConfig(foreground=0.3, background=0.05, crf=OFF)
    # above .3: its class; between: void; below .05: background; at .3 exactly: not above it
    assert irn_labels(GRAY, MAPS, CLASSES, config).tolist() == [[3, 255, 0, 255]]


def test_psa_labels_merge_the_two_backgrounds() -> None:
    config = PsaLabelsConfig(alpha_low=4, alpha_high=32, crf=OFF)
    # (1 - best)^4 = .0001, .41, .92, .24; ^32 = 0, .0008, .52, 0: class, void, background, class
    assert psa_labels(GRAY, MAPS, CLASSES, config).tolist() == [[3, 255, 0, 6]]


def test_masks_keep_an_edge_that_the_scores_miss() -> None:
    """Scores leak three pixels over a sharp edge; the CRF draws them back, at any kind of unary."""
    image = torch.zeros(3, 24, 24, dtype=torch.uint8)
    image[:, :, 12:] = 255
    scores = torch.zeros(1, 24, 24)
    scores[:, :, 9:] = 0.8
    for unary in ("hard", "soft"):
        plain, refined = pseudo_mask(image, scores, torch.tensor([4]), SeedMasksConfig(threshold=0.3, unary=unary))  # type: ignore[arg-type]
        assert (plain[:, 9:] == 5).all()
        assert (plain[:, :9] == 0).all()
        assert (refined[:, 12:] == 5).all()
        assert (refined[:, :12] == 0).all()


def test_void_of_another_cue_stays_void() -> None:
    labels = torch.tensor([[0, 255, 1, 2]])
    plain, refined = pseudo_mask(GRAY, MAPS, CLASSES, SeedMasksConfig(), labels)
    assert plain.tolist() == [[0, 255, 3, 6]]
    assert refined[0, 1] == 255


def test_walks_stop_at_boundaries_and_spread_inside() -> None:
    """Two halves; the seed covers a corner of one: the walk fills that half and leaves the other."""
    maps = torch.zeros(1, 12, 12)
    maps[0, :3, :3] = 1
    edge = torch.zeros(12, 12)
    edge[:, 6] = 1
    scores = irn_scores(maps, edge, (45, 45), IrnMasksConfig())
    assert scores.shape == (1, 45, 45)
    assert scores.max() == 1
    assert scores[0, :, :20].min() > 0.3
    assert scores[0, :, 29:].max() < 1e-3

    features = torch.zeros(4, 12, 12)
    features[:, :, 6:] = 8
    scores = psa_scores(maps, features, (45, 45), PsaMasksConfig(alpha=0.2))
    assert scores[0, :, :20].min() > 10 * scores[0, :, 26:].max()


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (30, 41)])
@pytest.mark.parametrize("count", [0, 1, 80])
def test_any_size_and_class_count(size: tuple[int, int], count: int) -> None:
    """Also images smaller than the radius, images without classes, and classes without any seed pixel."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    maps, classes = torch.zeros(count, *size), torch.arange(count)
    maps[:1] = torch.rand(size, generator=generator)
    grid = (-(-size[0] // 4), -(-size[1] // 4))
    low = torch.nn.functional.interpolate(maps[None], grid)[0] if count else torch.zeros(0, *grid)
    for labels in (
        psa_labels(image, maps, classes, PsaLabelsConfig()),
        irn_labels(image, maps, classes, IrnLabelsConfig()),
    ):
        assert labels.dtype == torch.uint8
        assert labels.shape == size
        assert set(labels.unique().tolist()) <= {0, 1, 255} if count else not labels.any()
    for scores in (
        irn_scores(low, torch.zeros(grid), size, IrnMasksConfig()),
        psa_scores(low, torch.rand(8, *grid, generator=generator), size, PsaMasksConfig()),
    ):
        assert scores.shape == (count, *size)
        assert scores.isfinite().all()
        for mask in pseudo_mask(image, scores, classes, SeedMasksConfig(unary="soft")):
            assert mask.shape == size
            assert mask.max() <= count
