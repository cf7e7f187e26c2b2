"""Saliency as background cue: DRS's rule on hand-made pixels, and the classical stand-in for a saliency network."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from esol.base.errors import ConfigError, DataError
from esol.config import CrfConfig, MaskConfig
from esol.data.samples import decode_gray
from esol.ops.pseudo_labels import Cue, pseudo_masks
from esol.ops.saliency import saliency_channels, saliency_labels, spectral_residual


def pixels(*columns: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Scores (n, 1, k) and saliency (1, k) of k pixels, each (saliency, score, score, ...)."""
    table = torch.tensor(columns).T
    return table[1:, None], table[:1]


def test_the_strongest_channel_wins_and_ties_go_to_background() -> None:
    scores, saliency = pixels(
        (0.75, 0.5, 0.6),  # background .25: the second class
        (0.25, 0.5, 0.6),  # background .75
        (0.5, 0.5, 0.3),  # a tie with the background
        (0.75, 0.5, 0.5),  # a tie of classes: the first
        (0.875, 0.19, 0.1),  # classes below the floor, though above the background
        (0.875, 0.2, 0.1),  # at the floor
    )
    assert saliency_labels(scores, saliency).tolist() == [[2, 0, 0, 1, 0, 1]]


def test_three_sure_channels_are_void_the_background_among_them() -> None:
    scores, saliency = pixels(
        (0.05, 0.95, 0.95, 0.1),  # two classes and the background
        (0.5, 0.95, 0.95, 0.1),  # two classes alone: the first
        (1.0, 0.95, 0.95, 0.99),  # three classes
        (0.05, 0.2, 0.95, 0.1),  # one class and the background
        (0.5, 0.9, 0.95, 0.99),  # .9 does not exceed .9
    )
    assert saliency_labels(scores, saliency).tolist() == [[255, 1, 255, 0, 3]]
    assert saliency_labels(scores, saliency, conflict=0.99).tolist() == [[0, 1, 3, 0, 3]]


def test_salient_background_is_void() -> None:
    scores, saliency = pixels((1.0, 0.1), (0.99, 0.0), (1.0, 0.2), (0.0, 0.1))
    assert saliency_labels(scores, saliency).tolist() == [[255, 0, 1, 0]]
    assert saliency_labels(scores, saliency, floor=0.3).tolist() == [[255, 0, 255, 0]]


def test_without_a_class_there_is_background_and_what_stands_out() -> None:
    labels = saliency_labels(torch.zeros(0, 1, 3), torch.tensor([[0.0, 0.5, 1.0]]))
    assert labels.dtype == torch.int64
    assert labels.tolist() == [[0, 0, 255]]


def test_any_scores_give_the_labels_of_the_rule_pixel_by_pixel() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(4, 9, 7, generator=generator) ** 0.2
    saliency = (2 * torch.rand(9, 7, generator=generator)).clamp(max=1)
    labels = saliency_labels(scores, saliency, floor=0.7)
    for y in range(9):
        for x in range(7):
            channels = [1 - saliency[y, x].item()] + [s if s >= 0.7 else 0.0 for s in scores[:, y, x].tolist()]
            expected = channels.index(max(channels))
            if sum(c > 0.9 for c in channels) > 2 or (saliency[y, x] == 1 and expected == 0):
                expected = 255
            assert labels[y, x] == expected
    assert set(labels.unique().tolist()) >= {0, 1, 2, 3, 4, 255}


def test_spectral_residual_finds_the_odd_one_out() -> None:
    pytest.importorskip("cv2.saliency", reason="needs opencv-contrib-python-headless, the extra esol[saliency]")
    image = torch.full((3, 90, 120), 100, dtype=torch.uint8)
    image += (torch.arange(120) // 4 % 2 * 20).to(torch.uint8)  # stripes everywhere
    image[:, 30:50, 70:90] = torch.tensor((250, 20, 20), dtype=torch.uint8)[:, None, None]
    found = spectral_residual(image)
    assert found.shape == (90, 120)
    assert found.dtype == torch.float32
    assert (float(found.min()) >= 0, float(found.max())) == (True, 1.0)
    assert found[25:55, 65:95].mean() > 2 * found.mean()
    assert torch.equal(found, spectral_residual(image))


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (64, 64)])
@pytest.mark.parametrize("level", [0, 9, 255])
def test_an_image_without_contrast_has_nothing_that_stands_out(size: tuple[int, int], level: int) -> None:
    pytest.importorskip("cv2.saliency", reason="needs opencv-contrib-python-headless, the extra esol[saliency]")
    found = spectral_residual(torch.full((3, *size), level, dtype=torch.uint8))
    assert found.shape == size
    assert not found.any()


def test_without_opencv_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cv2", "cv2.saliency"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r'pip install "esol\[saliency\]"'):
        spectral_residual(torch.zeros(3, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize("unary", ["hard", "soft"])
@pytest.mark.parametrize("iterations", [0, 3])
def test_saliency_decides_the_background_of_hard_and_soft_masks(unary: str, iterations: int) -> None:
    config = MaskConfig(threshold=0.1, unary=unary, crf=CrfConfig(iterations=iterations))
    image = torch.randint(0, 256, (3, 12, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scores, classes = torch.full((1, 12, 16), 0.8), torch.tensor([3])

    def masks(saliency: Tensor) -> Tensor:
        labels = saliency_labels(scores, saliency)
        cue = Cue(labels, saliency_channels(scores, saliency))
        return torch.stack(pseudo_masks([image], [scores], [classes], config, [cue])[0])

    assert not masks(torch.zeros(12, 16)).any()  # nothing stands out: there is no object, whatever the scores
    assert (masks(torch.ones(12, 16)) == 4).all()
    half = torch.zeros(12, 16)
    half[:, :8] = 1
    assert (masks(half)[0, :, :8] == 4).all()
    assert not masks(half)[0, :, 8:].any()


def test_saliency_maps_of_0_and_1_mean_0_and_255() -> None:
    def encoded(values: np.ndarray, mode: str | None = None) -> bytes:
        out = io.BytesIO()
        (Image.fromarray(values) if mode is None else Image.fromarray(values).convert(mode)).save(out, "PNG")
        return out.getvalue()

    ones = np.array([[0, 1, 1]], np.uint8)
    for data in (encoded(ones), encoded(ones * 255), encoded(ones * 255, "1"), encoded(ones.astype(np.uint16) * 65535)):
        assert decode_gray(data, "k").tolist() == [[0, 255, 255]]
    assert decode_gray(encoded(np.array([[0, 1, 9]], np.uint8)), "k").tolist() == [[0, 1, 9]]
    assert decode_gray(encoded(np.zeros((1, 2), np.uint8)), "k").tolist() == [[0, 0]]
    with pytest.raises(DataError, match="k: a map must be a gray PNG, not PNG RGB"):
        decode_gray(encoded(np.zeros((2, 2, 3), np.uint8)), "k")
