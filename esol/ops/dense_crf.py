"""Dense CRF: mean-field inference with Gaussian kernels between all pairs of pixels, in torch alone, on CPU and GPU.

After Krähenbühl and Koltun (NeurIPS 2011); the kernels are filtered on the permutohedral lattice (lattice.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

from esol.config import CrfConfig
from esol.ops.lattice import Kernel, positions, spatial_kernel

UNSURE = 255
RARE = 0.01  # probability that a label needs somewhere to take part
CHUNK = 16  # label maps that are filtered side by side; more of them fall out of the processor's cache


class DenseCrf:
    """Dense CRF of one photo or of several, for any number of label sets; the semantics of pydensecrf's DenseCRF2D.

    images: uint8 (3, H, W), each of its own size. Photos share a lattice without touching, since its points are
    numbered by photo: on a CPU what a photo comes to is the same to the bit with and without others; on a GPU, where
    small kernels wait to be started, several need hardly more of them than one. Standard deviations: sxy in pixels,
    srgb in grey levels; compat: weight of the Potts model, 0 leaves the kernel out. Kernels are normalised
    symmetrically, and a pixel counts among its own neighbours. Raises ValueError for other images, or for deviations so
    small that the lattice points of all photos cannot be numbered in 63 bits.

    Memory: 0.2 to 0.4 kB per pixel for photos at bilateral 50/5, 0.8 kB while the lattices are built (pure noise, with
    6 lattice points per pixel: 1.2 and 1.6 kB). infer adds 8 bytes per pixel and label, and 0.3 kB per pixel (noise:
    1 kB) for any number of labels. The spatial lattices of the four latest sizes, or rows of sizes, stay cached (64
    bytes per pixel at sxy 3).
    """

    @torch.no_grad()
    def __init__(
        self,
        *images: Tensor,
        gaussian_sxy: float = 3.0,
        gaussian_compat: float = 3.0,
        bilateral_sxy: float = 50.0,
        bilateral_srgb: float = 5.0,
        bilateral_compat: float = 10.0,
    ) -> None:
        for image in images:
            if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3 or not image.numel():
                raise ValueError(f"images must be uint8 (3, H, W), not {image.dtype} {tuple(image.shape)}")
        if min(gaussian_sxy, bilateral_sxy, bilateral_srgb) <= 0:
            raise ValueError("standard deviations must be above 0")
        sizes = tuple((image.shape[1], image.shape[2]) for image in images)
        self.sizes = sizes
        self.kernels: list[Kernel] = []
        if gaussian_compat:
            self.kernels.append(spatial_kernel(sizes, gaussian_sxy, gaussian_compat, images[0].device))
        if bilateral_compat:
            place = positions(sizes, bilateral_sxy, images[0].device)
            colour = torch.cat([image.flatten(1) for image in images], 1) / place.new_tensor(bilateral_srgb)
            self.kernels.append(Kernel(torch.cat((place, colour)), sizes, bilateral_compat))

    @torch.no_grad()
    def infer(
        self, unaries: Sequence[Tensor], iterations: int = 10, photos: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Label probabilities, float32 (L, H, W) for each label set; unaries: energies (L, H, W), any L from 1.

        photos: the number of each set's photo, which may have any number of sets; all are of the first where it is
        left out. Sets go through the filters side by side, at a fraction of their cost one by one, with the same
        result. After 0 iterations it is softmax(-energy).
        """
        of = [0] * len(unaries) if photos is None else photos
        for number, unary in zip(of, unaries, strict=True):
            if unary.ndim != 3 or tuple(unary.shape[1:]) != self.sizes[number] or not len(unary):
                height, width = self.sizes[number]
                raise ValueError(f"energies must be (L, {height}, {width}), not {tuple(unary.shape)}")
        if not unaries:
            return []
        pixels = [height * width for height, width in self.sizes]
        parts: list[tuple[slice, Tensor, Tensor]] = []  # a photo's rows of the filters, energies, q: (labels, pixels)
        sets: dict[int, Tensor] = {}
        for number in sorted({*of}):
            own = {i: unary for i, unary in enumerate(unaries) if of[i] == number}
            energy = torch.cat([unary.float().flatten(1) for unary in own.values()])
            before, q = sum(pixels[:number]), -energy
            parts.append((slice(before, before + pixels[number]), energy, q))
            sets |= zip(own, q.split([len(unary) for unary in own.values()]), strict=True)
        _softmax_(sets.values())
        labels = max(len(energy) for _, energy, _ in parts)
        for _ in range(iterations if self.kernels else 0):
            for start in range(0, labels, CHUNK):
                chunk = slice(start, start + CHUNK)
                rows = parts[0][1].new_zeros(sum(pixels), min(CHUNK, labels - start))
                for place, _, q in parts:  # the values of one pixel beside each other, as the filters read them
                    rows[place, : len(q[chunk])] = q[chunk].T
                message = reduce(Tensor.add_, (kernel(rows) for kernel in self.kernels))
                for place, energy, q in parts:
                    torch.sub(message[place, : len(q[chunk])].T, energy[chunk], out=q[chunk])
            _softmax_(sets.values())
        return [sets[i].view(-1, *self.sizes[number]) for i, number in enumerate(of)]


def mean_field(images: Sequence[Tensor], unaries: Sequence[Sequence[Tensor]], config: CrfConfig) -> list[list[Tensor]]:
    """Label probabilities (L, H, W) of each photo's label sets, by the CRF that a config describes.

    images: uint8 (3, H, W), all in one lattice, whose memory is in proportion to their pixels. Nobody waits for a CRF
    of one label, which is certain, nor for a lattice of a photo that has no other.
    """
    found = [list(own) for own in unaries]
    wanted: list[tuple[int, int]] = []
    for n, own in enumerate(unaries):
        for i, unary in enumerate(own):
            if config.iterations and len(unary) > 1:
                wanted.append((n, i))
            else:
                found[n][i] = (-unary).softmax(0)
    photos = sorted({n for n, _ in wanted})
    if photos:
        crf = DenseCrf(
            *(images[n] for n in photos),
            gaussian_sxy=config.gaussian_sxy,
            gaussian_compat=config.gaussian_compat,
            bilateral_sxy=config.bilateral_sxy,
            bilateral_srgb=config.bilateral_srgb,
            bilateral_compat=config.bilateral_compat,
        )
        made = crf.infer([unaries[n][i] for n, i in wanted], config.iterations, [photos.index(n) for n, _ in wanted])
        for (n, i), q in zip(wanted, made, strict=True):
            found[n][i] = q
    return found


def refined(images: Sequence[Tensor], probabilities: Sequence[Tensor], config: CrfConfig) -> list[Tensor]:
    """Probabilities (L, H, W) of each photo uint8 (3, H, W) after the CRF that a config describes.

    A label that no pixel gives RARE stays out of it, and has 0 afterwards: its time goes with the labels, of which a
    photo shows few.
    """
    if not config.iterations:
        return list(probabilities)
    there = [one.amax((1, 2)) >= min(RARE, 0.9 / len(one)) for one in probabilities]  # one at least
    wanted = [[unary_from_probabilities(one[own])] for one, own in zip(probabilities, there, strict=True)]
    whole = [torch.zeros_like(one) for one in probabilities]
    for one, own, (found,) in zip(whole, there, mean_field(images, wanted, config), strict=True):
        one[own] = found
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


def _softmax_(sets: Iterable[Tensor]) -> None:
    for one in sets:
        torch.softmax(one, 0, out=one)
