"""Stage segment: DeepLab-v2 on label maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from esol.config import SegmentConfig
from esol.models.deeplab import DeepLab
from esol.models.regrid import to_grid
from esol.ops.metrics import VOID
from esol.training.losses import segmentation_loss
from esol.training.task import Batch, ParameterGroup, Task


class Segment(Task):
    """The sum of the cross entropies of the crop at every input scale and of their maximum; hands over the network.

    The label of a logit is that of the pixel that it looks at. Source: DeepLab-v2's training by its public codes, with
    three inputs and four losses; with one input there is one loss.
    """

    handover: DeepLab

    def __init__(self, net: DeepLab, config: SegmentConfig) -> None:
        super().__init__()
        self.handover = net
        self.config = config

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """losses: loss; report: right, the share of labelled pixels that the largest input's logits have right."""
        net, labels = self.handover, batch["target"]
        inputs = sorted(self.config.inputs, reverse=True)
        logits = [net(to_grid(batch["image"], scale, net.backbone.stride)) for scale in inputs]
        with torch.autocast(labels.device.type, enabled=False):
            logits = [x if x.dtype == torch.float64 else x.float() for x in logits]
            size = (logits[0].shape[2], logits[0].shape[3])
            highest = logits[0]
            for x in logits[1:]:
                highest = torch.maximum(highest, F.interpolate(x, size, mode="bilinear", align_corners=True))
            each = logits if len(logits) == 1 else [*logits, highest]
            losses = [segmentation_loss(x, labels_on(labels, x.shape[2:]), self.config.balance) for x in each]
            loss = torch.stack(losses).sum(0).mean()
        truth = labels_on(labels, size)
        known = truth != VOID
        right = (((logits[0].argmax(1) == truth) & known).sum((1, 2)) / known.sum((1, 2)).clamp_min(1)).mean()
        return {"loss": loss}, {"right": right}

    def parameter_groups(self) -> list[ParameterGroup]:
        """The backbone at the base rate; ASPP's weights at head_lr times it, its biases at twice that without decay."""
        net, rate = self.handover, self.config.head_lr
        body = [p for p in net.backbone.parameters() if p.requires_grad]
        weights = [p for name, p in net.aspp.named_parameters() if name.endswith("weight")]
        biases = [p for name, p in net.aspp.named_parameters() if name.endswith("bias")]
        groups = [
            ParameterGroup("aspp", weights, lr_multiplier=rate),
            ParameterGroup("aspp_bias", biases, lr_multiplier=2 * rate, weight_decay=False),
        ]
        return [ParameterGroup("backbone", body), *groups] if body else groups


def labels_on(labels: Tensor, size: tuple[int, ...]) -> Tensor:
    """Label maps (B, H, W) at the pixels that a grid of `size`, its corners on the image's, looks at: (B, *size)."""
    rows, columns = (
        torch.linspace(0, side - 1, points, device=labels.device).round().long()
        for side, points in zip(labels.shape[1:], size, strict=True)
    )
    return labels[:, rows][..., columns]
