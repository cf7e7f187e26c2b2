"""DRS' rule on pixels whose outcome is known, and the classical stand-in."""

import pytest
import torch

from esol.localize.saliency import saliency_labels, spectral_residual


@pytest.mark.parametrize(
    ("scores", "saliency", "label"),
    [
        ((0.6, 0.1), 0.5, 1),
        ((0.1, 0.6), 0.5, 2),
        ((0.4, 0.3), 0.5, 0),
        ((0.5, 0.0), 0.5, 0),  # a tie
        ((0.19, 0.0), 0.9, 0),  # under the floor, although above the background
        ((0.19, 0.0), 1.0, 255),  # salient without doubt, but no class
        ((0.95, 0.95), 0.05, 255),  # three channels claim it
        ((0.95, 0.95), 0.5, 1),  # two do not
    ],
)
def test_drs_rule(scores: tuple[float, float], saliency: float, label: int) -> None:
    found = saliency_labels(torch.tensor(scores).view(2, 1, 1), torch.tensor([[saliency]]))
    assert found.tolist() == [[label]]


def test_images_without_classes() -> None:
    found = saliency_labels(torch.zeros(0, 1, 2), torch.tensor([[0.3, 1.0]]))
    assert found.tolist() == [[0, 255]]


def test_the_stand_in_sees_the_odd_one_out() -> None:
    pytest.importorskip("cv2.saliency", reason="the optional extra `saliency` is not installed")
    image = torch.full((3, 90, 120), 100, dtype=torch.uint8)
    image += (torch.arange(120) // 4 % 2 * 20).to(torch.uint8)  # stripes everywhere
    image[:, 30:50, 70:90] = torch.tensor((250, 20, 20), dtype=torch.uint8)[:, None, None]
    saliency = spectral_residual(image)
    assert saliency.shape == (90, 120)
    assert (float(saliency.min()) >= 0, float(saliency.max())) == (True, 1.0)
    inside = saliency[25:55, 65:95].mean()
    assert inside > 2 * saliency.mean()
    assert spectral_residual(torch.zeros(3, 1, 1, dtype=torch.uint8)).shape == (1, 1)
