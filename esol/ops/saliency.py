"""Saliency maps as background cue, and a classical stand-in where there are none."""

from __future__ import annotations

import torch
from torch import Tensor

from esol.base.errors import ConfigError
from esol.base.palette import VOID


def saliency_labels(scores: Tensor, saliency: Tensor, floor: float = 0.2, conflict: float = 0.9) -> Tensor:
    """DRS' rule: scores (n, H, W) and saliency (H, W), both in 0..1 -> int64 (H, W), 0 background, row + 1, 255 void.

    Scores under floor count as 0, the background scores 1 - saliency, the highest wins, ties go to the background and
    then to the first row. Void where more than two channels exceed conflict, the background among them, and where
    saliency is 1 but the background wins. Source: DRS (Kim et al., AAAI 2021), scripts/pseudo_seg_label_gen.py; its
    maps are 0 or 1 (gray level above 50 of 255), so that all that stands out and is no class becomes void there.
    """
    channels = saliency_channels(scores, saliency, floor)
    winner = channels.argmax(0)
    unsure = ((channels > conflict).sum(0) > 2) | ((saliency >= 1) & (winner == 0))
    return torch.where(unsure, VOID, winner)


def saliency_channels(scores: Tensor, saliency: Tensor, floor: float = 0.2) -> Tensor:
    """What competes at each pixel, (1 + n, H, W): 1 - saliency for the background, then scores, 0 where under floor."""
    return torch.cat((1 - saliency[None], torch.where(scores < floor, 0, scores)))


def spectral_residual(image: Tensor) -> Tensor:
    """Spectral residual saliency (Hou and Zhang, CVPR 2007) of uint8 (3, H, W): float (H, W) in 0..1.

    A classical stand-in, far weaker than the learned saliency that DRS and EPS take: OpenCV looks at the image in 64 x
    64 pixels. 0 everywhere where an image has no contrast, the maximum 1 elsewhere. ConfigError where opencv-contrib,
    the optional extra `saliency`, is not installed.
    """
    try:
        from cv2.saliency import StaticSaliencySpectralResidual
    except ImportError as error:
        raise ConfigError(
            f'saliency.source = spectral-residual needs OpenCV ({error}): pip install "esol[saliency]"'
        ) from error
    if torch.equal(image.amin((1, 2)), image.amax((1, 2))):  # OpenCV makes something of the rounding errors
        return torch.zeros(image.shape[1:], device=image.device)
    pixels = image.flip(0).permute(1, 2, 0).contiguous().cpu().numpy()  # OpenCV has blue first
    _, found = StaticSaliencySpectralResidual.create().computeSaliency(pixels)
    values = torch.from_numpy(found).to(image.device).nan_to_num()
    return values / values.amax().clamp_min(1e-5)
