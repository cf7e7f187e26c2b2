"""The judge of masks without truth: what it measures, what it prefers, and what it decides and says."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from esol.config import Config
from esol.pipeline.config_file import from_tree
from esol.pipeline.masks import highest, judged_masks, mask_remarks, stand_in
from esol.report.judge import WORTH, Evidence, boundary_contrast
from esol.stages.localize import map_remarks, map_source

SQUARE = np.zeros((30, 40), np.uint8)
SQUARE[8:22, 10:30] = 1


def picture(mask: np.ndarray, seed: int = 0) -> np.ndarray:
    """A noisy photo whose object is brighter than what is around it."""
    noise = np.random.default_rng(seed).integers(0, 30, (3, *mask.shape))
    return (noise + 120 * (mask > 0)).astype(np.uint8)


def test_boundary_contrast_is_the_mean_step_on_the_boundary_over_that_anywhere() -> None:
    image = picture(SQUARE).astype(int)
    steps, edges = [], []
    for y, x in np.ndindex(SQUARE.shape):
        for v, u in ((y, x + 1), (y + 1, x)):
            if v < 30 and u < 40:
                steps.append(np.abs(image[:, y, x] - image[:, v, u]).sum())
                edges.append(SQUARE[y, x] != SQUARE[v, u])
    want = np.mean([s for s, e in zip(steps, edges, strict=True) if e]) / np.mean(steps)
    assert boundary_contrast(picture(SQUARE), SQUARE) == pytest.approx(want)


def test_boundary_contrast_falls_as_a_mask_leaves_its_object() -> None:
    image = picture(SQUARE)
    moved = [boundary_contrast(image, np.roll(SQUARE, by, 1)) for by in (0, 2, 6)]
    assert moved == sorted(moved, reverse=True)
    noise = np.random.default_rng(1).integers(0, 2, SQUARE.shape, dtype=np.uint8)
    assert boundary_contrast(picture(SQUARE * 0), noise) == pytest.approx(1, abs=0.1)
    for plain in (SQUARE * 0, SQUARE * 0 + 1):
        assert boundary_contrast(image, plain) == 1
    assert boundary_contrast(np.full((3, 30, 40), 9, np.uint8), SQUARE) == 1
    assert boundary_contrast(image[:, :1, :1], SQUARE[:1, :1]) == 1


def test_evidence_counts_what_is_lost_and_what_fills_and_adds_up() -> None:
    image = picture(SQUARE)
    both, last = Evidence.empty(3), Evidence.empty(3)
    parts = [Evidence.empty(3) for _ in range(3)]
    samples: list[tuple[np.ndarray, list[int], np.ndarray]] = [
        (SQUARE, [0, 1], SQUARE),  # class 1 has no pixel
        (SQUARE * 0 + 3, [2], SQUARE * 3),  # class 2 fills its photo
        (SQUARE * 255, [0], SQUARE),  # nothing but void and background
    ]
    for part, (mask, classes, seeds) in zip(parts, samples, strict=True):
        for evidence in (both, part):
            evidence.add(image, mask, classes, seeds=seeds)
    both.add(image, SQUARE * 0, [])  # a photo without any object is no evidence
    for part in parts:
        for name, counts in asdict(part).items():
            getattr(last, name)[...] += counts
    assert {k: v.tolist() for k, v in asdict(last).items()} == {k: v.tolist() for k, v in asdict(both).items()}
    numbers = both.numbers(("cat", "dog", "cow"))
    assert numbers["lost"] == 50
    assert (numbers["lost_dog"], numbers["lost_cat"]) == (100, 50)
    assert (numbers["filled"], numbers["filled_cow"]) == (25, 100)
    assert numbers["void"] == pytest.approx(100 * (SQUARE > 0).mean() / 3)
    assert numbers["judge"] == pytest.approx(numbers["contrast"] * (1 - 0.75**2))
    walked = both.numbers(("cat", "dog", "cow"), "psa_masks")
    assert walked == numbers | {"judge": pytest.approx(WORTH["psa_masks"] * numbers["judge"])}
    assert 0 < numbers["agreement"] < 100
    assert Evidence.empty(3).numbers(("cat", "dog", "cow")) == {}


def test_what_a_stage_lost_counts_even_where_seeds_stand_in() -> None:
    evidence = Evidence.empty(1)
    evidence.add(picture(SQUARE), SQUARE, [0], lost=[0])
    assert evidence.numbers(("cat",))["lost"] == 100


def test_seeds_stand_in_for_a_lost_class_in_the_background_alone() -> None:
    mask, seeds = torch.tensor([[1, 1, 0, 0]]), torch.tensor([[2, 0, 2, 1]])
    assert stand_in(mask, seeds, [1]).tolist() == [[1, 1, 2, 0]]
    assert stand_in(mask * 0, seeds, [0, 1]).tolist() == seeds.tolist()


def config_of(**more: Any) -> Config:
    return from_tree({"run_dir": "r", "data": {"root": "d"}, **more})


def test_the_highest_judge_is_taken_and_the_run_says_why() -> None:
    assert map_source({"cam": 2.1, "decide": 2.5, "shrink": 2.4}, "auto", ("cam", "decide", "shrink")) == "decide"
    assert map_source({"cam": 2.0, "decide": 2.0}, "auto", ("cam", "decide")) == "cam"
    assert map_source({}, "auto", ("cam", "decide")) == "decide"
    assert map_source({"cam": 2.1}, "last", ("cam", "expand")) == "expand"
    assert map_source({"cam": 2.1}, "cam", ("cam", "expand")) == "cam"
    judge = {"lost": 0.0, "filled": 0.0}
    results: dict[str, dict[str, Any]] = {
        "seed_masks": {"judge": 2.5, **judge},
        "psa_masks": {"judge": 1.4, **judge, "lost": 53.3},
        "irn_masks": {"judge": 2.7, **judge},
    }
    assert highest(judged_masks(config_of(), results)) == "irn_masks"
    assert mask_remarks(config_of(), "seed_masks", results) == []
    assert mask_remarks(config_of(), "psa_masks", results, refines=True) == [
        "psa_masks: 53.3 % of the labels have no pixel in their photo's mask; the seeds stand in there",
        "warning: psa_masks made the masks worse than the seeds, by the judge (seed_masks 2.500, psa_masks 1.400)",
    ]
    assert mask_remarks(config_of(), "irn_masks", results, refines=True) == []
    assert map_remarks({"cam": 2.5, "shrink": 2.0}, "cam") == [
        "localize: writes the maps of cam; the judge: cam 2.500, shrink 2.000",
        "warning: shrink made the maps worse than cam's, by the judge",
    ]
