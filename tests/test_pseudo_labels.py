"""Class maps to labels and pseudo masks: what each rule decides, and the images that every rule trips over."""

import pytest
import torch

from esol.config import CrfConfig
from esol.ops.pseudo_labels import Cue, irn_labels, irn_scores, psa_labels, psa_scores, pseudo_masks, walk_steps
from esol.ops.thresholds import auto_threshold, background_power, power_threshold
from esol.stages.irn import IrnLabelsConfig, IrnMasksConfig
from esol.stages.psa import PsaLabelsConfig, PsaMasksConfig
from esol.stages.seed_masks import SeedMasksConfig

OFF = CrfConfig(iterations=0)
GRAY = torch.full((3, 1, 4), 128, dtype=torch.uint8)
CLASSES = torch.tensor([2, 5])
MAPS = torch.tensor([[[0.9, 0.2, 0.02, 0.2]], [[0.1, 0.1, 0.01, 0.3]]])


def test_irn_labels_merge_the_two_thresholds() -> None:
    # above .3: its class; between: void; below .05: background; at .3 exactly: not above it
    assert irn_labels([GRAY], [MAPS], [CLASSES], OFF, 0.3, 0.05)[0].tolist() == [[3, 255, 0, 255]]


def test_psa_labels_merge_the_two_backgrounds() -> None:
    # (1 - best)^4 = .0001, .41, .92, .24; ^32 = 0, .0008, .52, 0: class, void, background, class
    assert psa_labels([GRAY], [MAPS], [CLASSES], OFF, 4, 32)[0].tolist() == [[3, 255, 0, 6]]


def test_masks_keep_an_edge_that_the_scores_miss() -> None:
    """Scores leak three pixels over a sharp edge; the CRF draws them back, at any kind of unary."""
    image = torch.zeros(3, 24, 24, dtype=torch.uint8)
    image[:, :, 12:] = 255
    scores = torch.zeros(1, 24, 24)
    scores[:, :, 9:] = 0.8
    for unary in ("hard", "soft"):
        config = SeedMasksConfig(threshold=0.3, unary=unary)  # type: ignore[arg-type]
        [(plain, refined)] = pseudo_masks([image], [scores], [torch.tensor([4])], config)
        assert (plain[:, 9:] == 5).all()
        assert (plain[:, :9] == 0).all()
        assert (refined[:, 12:] == 5).all()
        assert (refined[:, :12] == 0).all()


def test_void_of_another_cue_stays_void() -> None:
    labels = torch.tensor([[0, 255, 1, 2]])
    [(plain, refined)] = pseudo_masks([GRAY], [MAPS], [CLASSES], SeedMasksConfig(), [Cue(labels, MAPS)])
    assert plain.tolist() == [[0, 255, 3, 6]]
    assert refined[0, 1] == 255


def test_walks_stop_at_boundaries_and_spread_inside() -> None:
    """Two halves; the seed covers a corner of one: the walk fills that half and leaves the other."""
    maps = torch.zeros(1, 12, 12)
    maps[0, :3, :3] = 1
    edge = torch.zeros(12, 12)
    edge[:, 6] = 1
    [scores] = irn_scores([maps], [edge], [(45, 45)], IrnMasksConfig(alpha=0, steps=256))
    assert scores.shape == (1, 45, 45)
    assert scores.max() == 1
    assert scores[0, :, :20].min() > 0.3
    assert scores[0, :, 29:].max() < 1e-3

    features = torch.zeros(4, 12, 12)
    features[:, :, 6:] = 8
    [scores] = psa_scores([maps], [features], [(45, 45)], PsaMasksConfig(alpha=0.2, steps=256))
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
        *psa_labels([image], [maps], [classes], PsaLabelsConfig().crf),
        *irn_labels([image], [maps], [classes], IrnLabelsConfig().crf),
    ):
        assert labels.dtype == torch.uint8
        assert labels.shape == size
        assert set(labels.unique().tolist()) <= {0, 1, 255} if count else not labels.any()
    for scores in (
        *irn_scores([low], [torch.zeros(grid)], [size], IrnMasksConfig()),
        *psa_scores([low], [torch.rand(8, *grid, generator=generator)], [size], PsaMasksConfig()),
    ):
        assert scores.shape == (count, *size)
        assert scores.isfinite().all()
        for mask in pseudo_masks([image], [scores], [classes], SeedMasksConfig(unary="soft"))[0]:
            assert mask.shape == size
            assert mask.max() <= count


def test_with_a_walking_background_the_strongest_wins_and_a_photo_names_its_own_alpha() -> None:
    """The seed fills its half, the other half is background's: no threshold is chosen by anybody."""
    maps = torch.full((1, 12, 12), 0.05)
    maps[0, :6, :5] = 0.9
    edge = torch.zeros(12, 12)
    edge[:, 6] = 1
    features = torch.zeros(4, 12, 12)
    features[:, :, 6:] = 8
    image = torch.zeros(3, 45, 45, dtype=torch.uint8)
    config = IrnMasksConfig(steps=256, crf=OFF)
    walked = {
        "irn": (irn_scores([maps], [edge], [(45, 45)], config), config),
        "psa": (psa_scores([maps], [features], [(45, 45)], PsaMasksConfig(steps=256)), PsaMasksConfig(crf=OFF)),
    }
    for scores, own in walked.values():
        [(plain, _)] = pseudo_masks([image], scores, [torch.tensor([4])], own)
        assert (plain[:, :20] == 5).all()
        assert (plain[:, 29:] == 0).all()


def test_auto_steps_reach_the_same_share_of_every_photo() -> None:
    assert walk_steps(256, 1200, 16) == 256
    assert [walk_steps("auto", side * side, 16) for side in (1, 12, 24, 48)] == [1, 9, 36, 144]


def test_auto_threshold_parts_two_heights_and_finds_nothing_where_there_is_one() -> None:
    bright = torch.full((40, 50), 0.2)
    for rows in (2, 10, 30):  # small objects and large ones
        bright[:rows, :20] = 0.8
        assert 0.2 < auto_threshold(bright) < 0.8
    assert auto_threshold(torch.zeros(5, 5)) == 0
    assert auto_threshold(torch.full((5, 5), 0.7)) == pytest.approx(0.7)
    assert power_threshold(background_power(0.3)) == pytest.approx(0.3)


def test_auto_threshold_is_the_mean_of_otsus_and_lis_by_search() -> None:
    generator = torch.Generator().manual_seed(1)
    score = torch.cat((torch.rand(3000, generator=generator) ** 3, torch.rand(500, generator=generator) ** 0.3))[None]
    values = (score.flatten() * 255).round() / 255

    def parts(level: int) -> list[torch.Tensor]:
        return [values[values * 255 <= level + 0.5].double(), values[values * 255 > level + 0.5].double()]

    def variance(level: int) -> float:
        return sum(len(part) * float(part.var(correction=0)) for part in parts(level))

    def entropy(level: int) -> float:
        return -sum(float(part.sum() * part.mean().log()) for part in parts(level))

    otsu, li = (min(range(1, 254), key=rule) + 0.5 for rule in (variance, entropy))
    assert auto_threshold(score) == pytest.approx((otsu * li) ** 0.5 / 255, abs=1e-3)
