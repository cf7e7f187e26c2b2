"""DeepLab at test time: several scales and the mirror image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from esol.models.deeplab import DeepLab
from esol.models.regrid import to_grid


@torch.no_grad()
def probabilities(
    image: Tensor,
    net: DeepLab,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = True,
    combine: Literal["mean", "max"] = "mean",
) -> Tensor:
    """Probabilities of every label, float32 (B, L, H, W), of uint8 images (B, 3, H, W).

    mean: of the probabilities over scales and flip; max: the softmax of the highest logits over the scales, the mean
    over the flip within each, as DeepLab's public code has it.
    """
    size, total = (image.shape[2], image.shape[3]), None
    for scale in scales:
        inputs = to_grid(image, scale, net.backbone.stride)
        logits = net(torch.cat((inputs, inputs.flip(3))) if flip else inputs).float()
        passes = [logits] if not flip else [logits[: len(image)], logits[len(image) :].flip(3)]
        if combine == "max":
            found = F.interpolate(sum(passes) / len(passes), size, mode="bilinear", align_corners=True)
            total = found if total is None else torch.maximum(total, found)
        else:
            for one in passes:
                found = F.interpolate(one, size, mode="bilinear", align_corners=True).softmax(1)
                total = found if total is None else total.add_(found)
    assert total is not None
    return total.softmax(1) if combine == "max" else total.div_(len(scales) * (2 if flip else 1))
