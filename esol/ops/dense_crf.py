"""Dense CRF: mean-field inference with Gaussian kernels between all pairs of pixels, in torch alone, on CPU and GPU.

After Krähenbühl and Koltun (NeurIPS 2011); the kernels are filtered on the permutohedral lattice of Adams, Baek and
Davis (2010): a pixel's feature lies in a simplex of d + 1 lattice points and hands its values to them (splat), each of
the d + 1 axes is blurred with (1/2, 1, 1/2), and the pixel collects the values (slice). Every step is a sparse matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from esol.config import CrfConfig

UNSURE = 255
RARE = 0.01  # probability that a label needs somewhere to take part
CHUNK = 16  # label maps that are filtered side by side; more of them fall out of the processor's cache


class DenseCrf:
    """Dense CRF of one photo, for any number of label sets; the same semantics as pydensecrf's DenseCRF2D.

    image: uint8 (3, H, W). Standard deviations: sxy in pixels, srgb in grey levels; compat: weight of the Potts model,
    0 leaves the kernel out. Kernels are normalised symmetrically, and a pixel counts among its own neighbours. Raises
    ValueError for another image, or for deviations so small that the lattice points cannot be numbered in 63 bits.

    Memory: 0.2 to 0.4 kB per pixel for photos at bilateral 50/5, 0.8 kB while the lattices are built (pure noise, with
    6 lattice points per pixel: 1.2 and 1.6 kB). infer adds 8 bytes per pixel and label, and 0.3 kB per pixel (noise:
    1 kB) for any number of labels. The spatial lattices of the four latest sizes stay cached (64 bytes per pixel at
    sxy 3).
    """

    @torch.no_grad()
    def __init__(
        self,
        image: Tensor,
        *,
        gaussian_sxy: float = 3.0,
        gaussian_compat: float = 3.0,
        bilateral_sxy: float = 50.0,
        bilateral_srgb: float = 5.0,
        bilateral_compat: float = 10.0,
    ) -> None:
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3 or not image.numel():
            raise ValueError(f"image must be uint8 (3, H, W), not {image.dtype} {tuple(image.shape)}")
        if min(gaussian_sxy, bilateral_sxy, bilateral_srgb) <= 0:
            raise ValueError("standard deviations must be above 0")
        self.size = (image.shape[1], image.shape[2])
        self.kernels: list[_Kernel] = []
        if gaussian_compat:
            self.kernels.append(_spatial_kernel(*self.size, gaussian_sxy, gaussian_compat, image.device))
        if bilateral_compat:
            place = _positions(*self.size, bilateral_sxy, image.device)
            colour = image.flatten(1) / place.new_tensor(bilateral_srgb)
            self.kernels.append(_Kernel(torch.cat((place, colour)), bilateral_compat))

    @torch.no_grad()
    def infer(self, unaries: Sequence[Tensor], iterations: int = 10) -> list[Tensor]:
        """Label probabilities, float32 (L, H, W) for each label set; unaries: energies (L, H, W), any L from 1.

        Sets go through the filters side by side, at a fraction of their cost one by one, with the same result. After 0
        iterations it is softmax(-energy).
        """
        for unary in unaries:
            if unary.ndim != 3 or tuple(unary.shape[1:]) != self.size or not len(unary):
                raise ValueError(f"energies must be (L, {self.size[0]}, {self.size[1]}), not {tuple(unary.shape)}")
        if not unaries:
            return []
        labels = [len(unary) for unary in unaries]
        energy = torch.cat([unary.float().flatten(1) for unary in unaries])
        q = -energy
        sets = q.split(labels)
        _softmax_(sets)
        for _ in range(iterations if self.kernels else 0):
            for part, own in zip(q.split(CHUNK), energy.split(CHUNK), strict=True):
                rows = part.T.contiguous()  # the values of one pixel beside each other, as the filters read them
                message = reduce(Tensor.add_, (kernel(rows) for kernel in self.kernels))
                torch.sub(message.T, own, out=part)
            _softmax_(sets)
        return [one.view(-1, *self.size) for one in sets]


def mean_field(image: Tensor, unaries: Sequence[Tensor], config: CrfConfig) -> list[Tensor]:
    """Label probabilities (L, H, W) of each label set by the CRF that a config describes; image uint8 (3, H, W)."""
    if not config.iterations:
        return [(-unary).softmax(0) for unary in unaries]
    crf = DenseCrf(
        image,
        gaussian_sxy=config.gaussian_sxy,
        gaussian_compat=config.gaussian_compat,
        bilateral_sxy=config.bilateral_sxy,
        bilateral_srgb=config.bilateral_srgb,
        bilateral_compat=config.bilateral_compat,
    )
    return crf.infer(unaries, config.iterations)


def refined(image: Tensor, probabilities: Tensor, config: CrfConfig) -> Tensor:
    """Probabilities (L, H, W) of a photo uint8 (3, H, W) after the CRF that a config describes.

    A label that no pixel gives RARE stays out of it, and has 0 afterwards: its time goes with the labels, of which a
    photo shows few.
    """
    if not config.iterations:
        return probabilities
    there = probabilities.amax((1, 2)) >= RARE
    found = mean_field(image, [unary_from_probabilities(probabilities[there])], config)[0]
    if bool(there.all()):
        return found
    whole = torch.zeros_like(probabilities)
    whole[there] = found
    return whole


def unary_from_labels(labels: Tensor, n: int, gt_prob: float = 0.7) -> Tensor:
    """Energies float32 (n, H, W) of a hard label map: int64 (H, W), 0..n-1, or 255 where all labels are equally likely.

    -log of gt_prob for the pixel's label, of (1 - gt_prob) / (n - 1) for each other one, as in pydensecrf.utils.
    """
    if not 0 < gt_prob < 1:
        raise ValueError(f"gt_prob must be between 0 and 1, not {gt_prob}")
    if not 1 <= n <= UNSURE:
        raise ValueError(f"n must be in 1..{UNSURE}, not {n}")
    unsure = labels == UNSURE
    if bool(((labels < 0) | (labels >= n) & ~unsure).any()):
        raise ValueError(f"labels must be 0..{n - 1} or {UNSURE}")
    mine = labels == torch.arange(n, device=labels.device)[:, None, None]
    others = -math.log((1 - gt_prob) / max(n - 1, 1))
    energy = torch.where(mine, -math.log(gt_prob), others)
    return torch.where(unsure, math.log(n), energy).float()


def unary_from_probabilities(p: Tensor) -> Tensor:
    """Energies float32 (n, H, W) of soft scores (n, H, W): -log, scores below 1e-5 counted as 1e-5."""
    return -p.float().clamp(1e-5, 1).log()


def _softmax_(sets: Sequence[Tensor]) -> None:
    for one in sets:
        torch.softmax(one, 0, out=one)


class _Sparse(NamedTuple):
    """A sparse matrix by rows: row r holds weights[s:t] at columns[s:t], s = starts[r], t = starts[r + 1].

    columns, starts: int32; weights: float32. With few dense columns embedding_bag is the fastest product on one core,
    up to 2.5x torch's own for CSR tensors.
    """

    columns: Tensor
    weights: Tensor
    starts: Tensor

    def __matmul__(self, x: Tensor) -> Tensor:
        return F.embedding_bag(
            self.columns, x, self.starts, mode="sum", per_sample_weights=self.weights, include_last_offset=True
        )


class _Kernel:
    """compat * N K N, K the Gaussian of unit deviation between features (d, n) on the lattice, N = 1 / sqrt(K 1)."""

    def __init__(self, features: Tensor, compat: float) -> None:
        d, n = features.shape
        keys, weights, strides = _simplices(features)
        ordered, pixels = torch.empty_like(keys), torch.empty_like(keys)
        for row, *out in zip(keys, ordered, pixels, strict=True):  # corners of different index share no lattice point
            torch.sort(row, stable=True, out=out)
        first = torch.ones_like(keys, dtype=torch.bool)
        torch.ne(ordered[:, 1:], ordered[:, :-1], out=first[:, 1:])
        point = first.flatten().cumsum(0, dtype=torch.int32).sub_(1).view_as(keys)
        starts = first.flatten().nonzero()[:, 0]
        self.blurs = _blurs(ordered.flatten().index_select(0, starts), strides)

        corners = torch.empty_like(point).scatter_(1, pixels, point).T.flatten()
        every = torch.arange(0, corners.numel() + 1, d + 1, dtype=torch.int32, device=corners.device)
        starts = F.pad(starts, (0, 1), value=corners.numel()).int()
        self.splat = _Sparse(pixels.flatten().int(), weights.gather(1, pixels).flatten(), starts)
        self.slice = _Sparse(corners, weights.T.flatten() / (1 + 2.0**-d), every)  # Adams' scale, as in pydensecrf
        norm = self(features.new_ones(n, 1)).add_(1e-20).rsqrt_()
        self.splat.weights.mul_(norm[:, 0].index_select(0, self.splat.columns))
        self.slice.weights.view(n, d + 1).mul_(norm * compat)

    def __call__(self, q: Tensor) -> Tensor:
        """(n, L) -> (n, L)."""
        values = self.splat @ q
        for blur in self.blurs:
            values = blur @ values
        return self.slice @ values


def _simplices(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The simplex around each feature: keys of its corners, int64 (d + 1, n), barycentric weights (d + 1, n), strides.

    Corner k's coordinates are all k modulo d + 1, so that (coordinate - k) / (d + 1), the cell, and k name it. Its key
    is k * size + sum over the first d axes of stride * cell (coordinates add up to 0, so the last one is redundant).
    strides: int64 (d + 2,), of the d axes, 0 for the last, then size.
    """
    d = len(features)
    elevated = _elevate(features)
    cell = (elevated * (1 / (d + 1))).round_()
    rank = _rank(elevated - cell * (d + 1))
    rank += cell.sum(0).to(torch.int8)  # rounded off the plane: move the axes with the largest error
    wrap = (rank < 0).to(torch.int8) - (rank > d).to(torch.int8)
    rank += wrap * (d + 1)
    cell += wrap
    position = d - rank.long()  # of each axis, in the order in which its residue grows

    residue = (elevated - cell * (d + 1)).mul_(1 / (d + 1))
    ascending = torch.empty_like(residue).scatter_(0, position, residue)
    weights = ascending.clone()
    weights[1:] -= ascending[:-1]
    weights[0] += 1 - ascending[d]

    whole = cell[:d].long()
    low = whole.amin(1, keepdim=True) - 2  # room for the neighbours of the outermost points
    spans = (whole.amax(1) + 3 - low[:, 0]).tolist()
    size = math.prod(spans)
    if size * (d + 1) >= 2**63:
        raise ValueError("the kernel's standard deviations are too small for this image")
    strides = whole.new_tensor([*(math.prod(spans[i + 1 :]) for i in range(d)), 0, size])
    keys = torch.empty_like(position).scatter_(0, position, strides[: d + 1, None].expand_as(position))
    # Corner k lies one cell lower than corner k - 1 along the axis at position k - 1, on its left in this order.
    keys = torch.cat((((whole - low) * strides[:d, None]).sum(0)[None], size - keys[:-1])).cumsum(0)
    return keys, weights, strides


def _elevate(features: Tensor) -> Tensor:
    """(d, n) -> (d + 1, n), on the plane of zero sum, scaled so that splat, blur and slice have unit deviation."""
    d = len(features)
    # Rounded to float32 where pydensecrf rounds: the last bit says on which side of a border a feature lies, and so
    # which lattice points exist.
    deviation = torch.tensor(math.sqrt(2 / 3) * (d + 1)).item()
    elevated = features.new_empty(d + 1, features.shape[1])
    total = torch.zeros_like(features[0])
    for j in range(d, 0, -1):
        own = features[j - 1] * (deviation / math.sqrt(j * (j + 1)))
        torch.sub(total, own * j, out=elevated[j])
        total += own
    elevated[0] = total
    return elevated


def _rank(residue: Tensor) -> Tensor:
    """int8 (d + 1, n): 0 for a pixel's largest residue; of equal ones the first axis comes last, as in pydensecrf."""
    rank = torch.zeros_like(residue, dtype=torch.int8)
    for i in range(len(residue)):
        for j in range(i + 1, len(residue)):
            smaller = residue[i] < residue[j]
            rank[i] += smaller
            rank[j] += ~smaller
    return rank


def _blurs(keys: Tensor, strides: Tensor) -> list[_Sparse]:
    """(1/2, 1, 1/2) along each axis of the lattice; keys: of all its points, ascending. Absent neighbours count as 0.

    The neighbour along axis j has all coordinates 1 lower but coordinate j, which is d higher; the other is its mirror.
    """
    m, d, size = len(keys), len(strides) - 2, strides[-1]
    me = torch.arange(m, device=keys.device)
    starts = torch.arange(0, 3 * m + 1, 3, dtype=torch.int32, device=keys.device)
    lower = keys + torch.where(keys >= size, -size, d * size - strides[:-1].sum())
    blurs = []
    for stride in strides[:-1]:
        wanted = lower + stride
        found = torch.searchsorted(keys, wanted).clamp_(max=m - 1)
        there = keys.index_select(0, found) == wanted
        columns = torch.stack((me, me, me), 1).int()  # an absent neighbour: the point itself, weight 0
        columns[:, 1] = torch.where(there, found, me)
        columns[:, 2] = F.pad(me, (0, 1)).scatter_(0, torch.where(there, found, m), me)[:m]
        weights = columns.ne(me[:, None]).float().mul_(0.5)
        weights[:, 0] = 1
        blurs.append(_Sparse(columns.flatten(), weights.flatten(), starts))
    return blurs


@lru_cache(maxsize=4)
def _spatial_kernel(height: int, width: int, sxy: float, compat: float, device: torch.device) -> _Kernel:
    return _Kernel(_positions(height, width, sxy, device), compat)


def _positions(height: int, width: int, sxy: float, device: torch.device) -> Tensor:
    """x and y of each pixel in units of sxy, (2, n)."""
    y, x = (torch.arange(side, device=device, dtype=torch.float32) for side in (height, width))
    y, x = y / y.new_tensor(sxy), x / x.new_tensor(sxy)  # a plain number on a GPU is multiplied by its reciprocal
    return torch.stack((x.expand(height, width), y[:, None].expand(height, width))).flatten(1)
