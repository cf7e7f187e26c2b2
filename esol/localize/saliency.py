"""Saliency maps as background cue, and a classical stand-in where there are none."""

from __future__ import annotations

import torch
from torch import Tensor

from esol.errors import ConfigError

VOID = 255


def saliency_labels(scores: Tensor, saliency: Tensor, floor: float = 0.2, conflict: float = 0.9) -> Tensor:
    """DRS' rule: scores (n, H, W) and saliency (H, W), both in 0..1 -> int64 (H, W), 0 background, row + 1, 255 void.

    Scores under floor count as 0, the background scores 1 - saliency, the highest wins, ties go to the background.
    Void where more than two channels exceed conflict, the background among them, and where saliency is 1 but the
    background wins. Source: Kim et al., "Discriminative Region Suppression for Weakly-Supervised Semantic
    Segmentation" (AAAI 2021).
    """
    channels = torch.cat((1 - saliency[None], torch.where(scores < floor, 0, scores)))
    winner = channels.argmax(0)
    unsure = ((channels > conflict).sum(0) > 2) | ((saliency >= 1) & (winner == 0))
    return torch.where(unsure, VOID, winner)


def spectral_residual(image: Tensor) -> Tensor:
    """Spectral residual saliency (Hou and Zhang, CVPR 2007) of uint8 (3, H, W): float (H, W) in 0..1.

    A classical stand-in, far weaker than the learned saliency that DRS and EPS take. ConfigError where opencv-contrib,
    the optional extra `saliency`, is not installed; 0 everywhere where an image has no contrast.
    """
    try:
        from cv2.saliency import StaticSaliencySpectralResidual
    except ImportError as error:
        raise ConfigError(
            f'saliency.source = spectral-residual needs OpenCV ({error}): pip install "esol[saliency]"'
        ) from error
    pixels = image.permute(1, 2, 0).cpu().numpy()[..., ::-1]  # OpenCV has blue first
    done, found = StaticSaliencySpectralResidual.create().computeSaliency(pixels)
    values = torch.from_numpy(found).to(image.device).nan_to_num() if done else image.new_zeros(image.shape[1:]).float()
    return values / values.amax().clamp_min(1e-5)
