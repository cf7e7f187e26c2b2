"""The vote of the mask stages, pixel by pixel."""

from collections import Counter

import numpy as np

from esol.stages.vote import majority


def test_a_pixel_gets_the_label_with_most_votes_and_else_the_foremost_masks() -> None:
    masks = np.random.default_rng(0).choice(np.array([0, 1, 2, 255], np.uint8), (3, 9, 11))
    vote = majority(masks)
    assert vote.dtype == np.uint8
    for y, x in np.ndindex(vote.shape):
        votes = Counter(masks[:, y, x].tolist())
        wanted = votes.most_common(1)[0][0] if max(votes.values()) > 1 else masks[0, y, x]
        assert vote[y, x] == wanted


def test_of_two_masks_the_foremost_decides_and_one_mask_is_itself() -> None:
    two = np.random.default_rng(1).integers(0, 3, (2, 5, 4), dtype=np.uint8)
    assert (majority(two) == two[0]).all()
    assert (majority(two[1:]) == two[1]).all()
