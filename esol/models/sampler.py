"""The sampler: a 3x3 deformable convolution in project-then-sample form, and the branch that predicts its offsets."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TAPS = 9  # of a 3x3 kernel, row by row


class Taps:
    """The nine 1x1 kernels of a 3x3 one, kept as long as that does not learn: they are strided to make."""

    def __init__(self) -> None:
        self._kept: tuple[Any, Tensor, Tensor] | None = None

    def of(self, weight: Tensor) -> Tensor:
        """Weight (Cout, Cin, 3, 3) -> (9 * Cout, Cin, 1, 1), in the type that the convolution computes in."""
        device = weight.device.type
        casts = torch.is_autocast_enabled(device) and weight.dtype != torch.float64  # which autocast leaves alone
        kind = torch.get_autocast_dtype(device) if casts else weight.dtype
        learns = torch.is_grad_enabled() and weight.requires_grad
        # Compiled code takes it apart on its way: a tensor that is kept between two steps would belong to no graph.
        if learns or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return _apart(weight).to(kind)
        stamp = (weight.data_ptr(), weight._version, weight.device, kind)
        if self._kept is None or self._kept[0] != stamp:
            same = weight.detach()  # held, so that its memory is no other's while the stamp names it
            self._kept = (stamp, _apart(same).to(kind), same)
        return self._kept[1]

    def __deepcopy__(self, memo: object) -> Taps:
        """A copied module's weight is another."""
        return Taps()


def deform_conv(x: Tensor, weight: Tensor, offset: Tensor, taps: Taps | None = None) -> Tensor:
    """3x3 deformable convolution, stride 1, padding 1, no bias: sum_k sample(W_k x, p + p_k + offset_k).

    x (B, Cin, h, w); weight (Cout, Cin, 3, 3); offset (B, 18, h, w) in grid pixels, channels dy0, dx0, dy1, dx1, ...
    Returns (B, Cout, h, w) in the type of the projection W_k x; positions and sampling are float32 or wider.
    Equals torchvision.ops.deform_conv2d, also at borders (bilinear, zero outside) and in the offset gradient at whole
    positions. Bilinear sampling is linear, so projecting first (nine 1x1 products, Cin -> Cout) gives the same numbers
    and samples Cout channels instead of Cin. What does not require a gradient costs none. taps: of this weight, kept
    from call to call.
    """
    batch, _, height, width = x.shape
    channels = weight.shape[0]
    projected = F.conv2d(x, (taps or Taps()).of(weight))
    with torch.autocast(x.device.type, enabled=False):
        kind = torch.float64 if projected.dtype == torch.float64 else torch.float32
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _sum_of_rows(projected.to(kind), offset.to(kind)).to(projected.dtype)
        wide = projected.to(kind, memory_format=torch.contiguous_format)  # convolutions like another one
        wide = wide.reshape(batch * TAPS, channels, height, width)
        grid = _sampling_grid(offset.to(kind), height, width)
        sampled = F.grid_sample(wide, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        result = sampled.reshape(batch, TAPS, channels, height, width).sum(1)
    return result.to(projected.dtype)


def _sum_of_rows(projected: Tensor, offset: Tensor) -> Tensor:
    """What grid_sample and the sum over the taps give: (B, 9 * C, h, w), offset (B, 18, h, w) -> (B, C, h, w).

    On a CPU in one pass: a position and tap are a row of C numbers, and a pixel of the result is a weighted sum of 36
    of them, four corners for each tap.
    """
    batch, _, height, width = projected.shape
    kind, device = offset.dtype, offset.device
    dy, dx = offset.permute(0, 2, 3, 1).unflatten(3, (TAPS, 2)).unbind(4)  # each (B, h, w, 9)
    tap = torch.arange(3, dtype=kind, device=device) - 1
    # From -1 down and from the size up all is zero: the clamp changes nothing and keeps wild offsets within int range.
    y = dy + tap.repeat_interleave(3) + torch.arange(height, dtype=kind, device=device).view(height, 1, 1)
    x = dx + tap.repeat(3) + torch.arange(width, dtype=kind, device=device).view(width, 1)
    y, x = y.clamp(-2, height + 1), x.clamp(-2, width + 1)
    top, left = y.detach().floor(), x.detach().floor()
    lower, right = y - top, x - left
    first = torch.arange(batch, device=device).view(batch, 1, 1, 1) * height
    places, weights = [], []
    for row, along_y in ((top.long(), 1 - lower), (top.long() + 1, lower)):
        for column, along_x in ((left.long(), 1 - right), (left.long() + 1, right)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixel = (first + row.clamp(0, height - 1)) * width + column.clamp(0, width - 1)
            places.append(pixel * TAPS + torch.arange(TAPS, device=device))
            weights.append(along_y * along_x * inside)
    rows = projected.permute(0, 2, 3, 1).reshape(batch * height * width * TAPS, -1)
    summed = F.embedding_bag(
        torch.stack(places, 4).view(-1, 4 * TAPS),
        rows,
        mode="sum",
        per_sample_weights=torch.stack(weights, 4).view(-1, 4 * TAPS),
    )
    return summed.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _apart(weight: Tensor) -> Tensor:
    return weight.permute(2, 3, 0, 1).reshape(-1, weight.shape[1], 1, 1)


def _sampling_grid(offset: Tensor, height: int, width: int) -> Tensor:
    """Positions of all taps as grid_sample wants them: (B*9, h, w, 2), x before y, the image spanning -1..1."""
    kind, device = offset.dtype, offset.device
    dy, dx = offset.unflatten(1, (TAPS, 2)).unbind(2)  # each (B, 9, h, w)
    tap = torch.arange(3, dtype=kind, device=device) - 1
    y = dy + tap.repeat_interleave(3).view(TAPS, 1, 1) + torch.arange(height, dtype=kind, device=device).view(height, 1)
    x = dx + tap.repeat(3).view(TAPS, 1, 1) + torch.arange(width, dtype=kind, device=device)
    # The way to -1..1 and back rounds: a whole position may land just below itself, in the cell before, where the
    # offset gradient is another one. Zero offsets are all whole, so stay above by more than the rounding error.
    nudge = 4 * max(height, width) * torch.finfo(kind).eps
    # From -1 down and from the size up all is zero: the clamp changes nothing and keeps wild offsets within int range.
    y = (y + nudge).clamp(-2, height + 1)
    x = (x + nudge).clamp(-2, width + 1)
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    return grid.flatten(0, 1)


class OffsetBranch(nn.Module):
    """Predicts the offsets of a 3x3 sampler: a 3x3 convolution that starts at zero, so at the ordinary convolution.

    bound r in grid pixels: offsets are r*tanh(o/r), within (-r, r); 0 leaves them free.
    """

    def __init__(self, channels: int, bound: float) -> None:
        super().__init__()
        self.bound = bound
        self.conv = nn.Conv2d(channels, 2 * TAPS, 3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> offsets (B, 18, h, w), float32 or wider."""
        raw = self.conv(x)
        offset = raw if raw.dtype == torch.float64 else raw.float()
        return self.bound * torch.tanh(offset / self.bound) if self.bound else offset
