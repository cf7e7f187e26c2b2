"""Outlines of masks: exact ones give the mask back, holes and all; simpler ones nearly."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from esol.ops.shapes import Shape, raster, shapes, signed_area, simpler


def blobs(seed: int, size: tuple[int, int] = (60, 90), share: int = 50) -> np.ndarray:
    """A mask with parts, holes, parts in holes and pixels that meet by their corners alone."""
    noise = np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)))
    return smooth > np.percentile(smooth, share)


@pytest.mark.parametrize("seed", range(5))
def test_exact_outlines_give_the_mask_back(seed: int) -> None:
    rough = np.random.default_rng(seed).random((17, 23)) > 0.5
    for mask in (blobs(seed), rough):
        found = shapes(mask)
        assert np.array_equal(raster(found, mask.shape), mask)
        assert sum(shape.area for shape in found) == mask.sum()
        parts = [raster([shape], mask.shape) for shape in found]
        assert np.array_equal(np.sum(parts, 0), mask)  # no pixel is in two parts


def test_a_part_in_a_hole_is_a_part_of_its_own() -> None:
    mask = np.zeros((9, 9), bool)
    mask[1:8, 1:8] = True
    mask[2:7, 2:7] = False
    mask[4, 4] = True
    ring, dot = sorted(shapes(mask), key=lambda shape: -shape.area)
    assert ring.area == 24
    assert len(ring.holes) == 1
    assert dot.area == 1
    assert signed_area(ring.outer) > 0 > signed_area(ring.holes[0])
    assert shapes(np.zeros((3, 3), bool)) == []
    assert shapes(np.ones((3, 4), bool))[0].outer.tolist() == [[0, 0], [4, 0], [4, 3], [0, 3]]


@pytest.mark.parametrize("seed", range(5))
def test_simpler_outlines_keep_their_mask_and_one_ring_says_the_same(seed: int) -> None:
    mask = blobs(seed, (200, 300), 60)
    for shape in shapes(mask):
        exact = raster([shape], mask.shape)
        found = simpler(shape, mask.shape)
        drawn = raster([found], mask.shape)
        assert (exact & drawn).sum() / (exact | drawn).sum() >= 0.985
        assert len(found.outer) <= len(shape.outer)
        assert np.array_equal(raster([Shape(found.one_ring(), ())], mask.shape), drawn)
