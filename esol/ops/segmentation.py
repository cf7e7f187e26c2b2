"""DeepLab at test time: several scales and the mirror image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from esol.models.deeplab import DeepLab
from esol.models.regrid import scale_to_grid

STRIP = 4_000_000  # floats that enlarged_labels holds at once


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
        inputs = scale_to_grid(image, scale, net.backbone.stride)
        logits = net(torch.cat((inputs, inputs.flip(3))) if flip else inputs).float()
        passes = [logits] if not flip else [logits[: len(image)], logits[len(image) :].flip(3)]
        if combine == "max":
            enlarged = F.interpolate(sum(passes) / len(passes), size, mode="bilinear", align_corners=True)
            total = enlarged if total is None else torch.maximum(total, enlarged)
        else:
            for one in passes:
                enlarged = F.interpolate(one, size, mode="bilinear", align_corners=True).softmax(1)
                total = enlarged if total is None else total.add_(enlarged)
    assert total is not None
    return total.softmax(1) if combine == "max" else total.div_(len(scales) * (2 if flip else 1))


def enlarged_labels(predicted: Tensor, size: tuple[int, int]) -> Tensor:
    """The strongest label, uint8 (H, W), of probabilities (L, h, w) enlarged bilinearly, by bands of rows.

    Pixel centres correspond (align_corners=False). Holds STRIP floats at most instead of L x H x W.
    """
    (height, width), rows = size, max(1, STRIP // (len(predicted) * size[1]))
    if (height, width) == tuple(predicted.shape[1:]):
        return predicted.argmax(0).to(torch.uint8)
    labels = torch.empty(size, dtype=torch.uint8, device=predicted.device)
    for top in range(0, height, rows):
        place = torch.arange(top, min(top + rows, height), device=predicted.device, dtype=torch.float32)
        place = ((place + 0.5) * (predicted.shape[1] / height) - 0.5).clamp(0, predicted.shape[1] - 1)
        above = place.long()
        band = torch.lerp(
            predicted[:, above], predicted[:, (above + 1).clamp_max(predicted.shape[1] - 1)], (place - above)[:, None]
        )
        wide = F.interpolate(band[None], (len(place), width), mode="bilinear", align_corners=False)[0]
        labels[top : top + rows] = wide.argmax(0).to(torch.uint8)
    return labels
