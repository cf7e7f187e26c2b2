"""The dense CRF against pydensecrf2: agreement of the label maps, and time on one core and on a GPU.

    python -m benchmarks.dense_crf --photos DIR [--count 20]

Needs pydensecrf2. Takes the first JPEGs of DIR by name. Scores are synthetic but shaped like a photo's: per label a
smooth random field (one knot per 48 pixels) minus the colour's distance to that of a random pixel, so that blobs follow
colour borders roughly and cross them often; seeded by the photo's number. Hard label maps are two thresholds of the
same scores, as in IRN: where the best class stays below one (label 0) differs between the two sets.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pydensecrf.densecrf
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.common import interleaved, machine, once, ratio, table
from benchmarks.rows import Comparison, Photos
from esol.ops import dense_crf
from esol.ops.dense_crf import DenseCrf, unary_from_labels, unary_from_probabilities

IRN: dict[str, float] = {
    "gaussian_sxy": 3,
    "gaussian_compat": 3,
    "bilateral_sxy": 50,
    "bilateral_srgb": 5,
    "bilateral_compat": 10,
}
PARAMETERS: dict[str, tuple[dict[str, float], int]] = {  # kernels and labels
    "IRN: hard labels .7, two sets of 4, 3/3, 50/5/10": (IRN, 4),
    "PSA: soft scores, 4 labels, 3/3, 80/13/10": (IRN | {"bilateral_sxy": 80, "bilateral_srgb": 13}, 4),
    "DeepLab: soft scores, 21 labels, 1/3, 67/3/4": (
        IRN | {"gaussian_sxy": 1, "bilateral_sxy": 67, "bilateral_srgb": 3, "bilateral_compat": 4},
        21,
    ),
    "81 labels: soft scores, 3/3, 50/5/10": (IRN, 81),
}

AT_ONCE = (1, 4, 8)  # photos in one lattice


def load(path: Path, size: tuple[int, int] | None) -> Tensor:
    """uint8 (3, H, W); size: (long side, short side), None keeps the photo's own."""
    with Image.open(path) as file:
        photo = file.convert("RGB")
    if size is not None:
        photo = photo.resize(size if photo.width >= photo.height else size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1).contiguous()


def scores(photo: Tensor, labels: int, seed: int) -> Tensor:
    """Probabilities (L, H, W), see above."""
    random = torch.Generator().manual_seed(seed)
    height, width = photo.shape[1:]
    knots = torch.randn(1, labels, height // 48 + 2, width // 48 + 2, generator=random)
    smooth = F.interpolate(knots, (height, width), mode="bicubic", align_corners=True)[0]
    colours = photo.flatten(1).float()
    chosen = colours[:, torch.randint(height * width, (labels,), generator=random)]
    distance = torch.cdist(chosen.T, colours.T).view(labels, height, width)
    return (2 * smooth - distance / 64).softmax(0)


def unaries(photo: Tensor, name: str, labels: int, seed: int) -> list[Tensor]:
    """Energies of one parameter set: two label maps for IRN, else one set of soft scores."""
    p = scores(photo, labels, seed)
    if not name.startswith("IRN"):
        return [unary_from_probabilities(p)]
    best, which = p[1:].max(0)
    return [unary_from_labels(torch.where(best > threshold, which + 1, 0), labels) for threshold in (0.5, 0.25)]


class Theirs:
    """pydensecrf2, one call per label set."""

    def __init__(self, photo: Tensor, sets: list[Tensor], kernels: dict[str, float]) -> None:
        _, self.height, self.width = photo.shape
        self.models = []
        pixels = photo.permute(1, 2, 0).contiguous().numpy()
        for energy in sets:
            model = pydensecrf.densecrf.DenseCRF2D(self.width, self.height, len(energy))
            model.setUnaryEnergy(energy.flatten(1).numpy())
            model.addPairwiseGaussian(sxy=kernels["gaussian_sxy"], compat=kernels["gaussian_compat"])
            sxy, srgb = kernels["bilateral_sxy"], kernels["bilateral_srgb"]
            model.addPairwiseBilateral(sxy=sxy, srgb=srgb, rgbim=pixels, compat=kernels["bilateral_compat"])
            self.models.append(model)

    def infer(self, iterations: int = 10) -> list[np.ndarray]:
        return [np.array(model.inference(iterations)).reshape(-1, self.height, self.width) for model in self.models]


def agreement(paths: list[Path]) -> str:
    """Share of pixels with the same label, over the photos, by parameter set."""
    rows: list[list[object]] = []
    for name, (kernels, labels) in PARAMETERS.items():
        same, apart, changed = [], [], []
        for seed, path in enumerate(paths):
            photo = load(path, None)
            sets = unaries(photo, name, labels, seed)
            ours, theirs = DenseCrf(photo, **kernels).infer(sets), Theirs(photo, sets, kernels).infer()
            for energy, mine, want in zip(sets, ours, map(torch.from_numpy, theirs), strict=True):
                same.append(100 * float((mine.argmax(0) == want.argmax(0)).double().mean()))
                changed.append(100 * float((energy.argmin(0) != want.argmax(0)).double().mean()))
                apart.append(float((mine - want).abs().max()))
        rows.append([name, len(same), f"{min(same):.4f}", f"{statistics.mean(same):.4f}", f"{max(apart):.1e}"])
        rows[-1].append(f"{statistics.mean(changed):.1f}")
    headings = [
        "parameters",
        "label maps",
        "lowest, %",
        "mean, %",
        "largest difference of p",
        "pixels that the CRF changed, %",
    ]
    return table(headings, rows)


def call(photo: Tensor, sets: list[Tensor], kernels: dict[str, float]) -> None:
    Theirs(photo, sets, kernels).infer()


def own(photo: Tensor, sets: list[Tensor], kernels: dict[str, float]) -> None:
    DenseCrf(photo, **kernels).infer(sets)


def own_cold(photo: Tensor, sets: list[Tensor], kernels: dict[str, float]) -> None:
    dense_crf._spatial_kernel.cache_clear()
    own(photo, sets, kernels)


def speed(paths: list[Path], size: tuple[int, int] | None, name: str, rounds: int) -> list[list[object]]:
    """Rows of one workload: seconds per image (median), ratio to pydensecrf2 (median and highest over photos)."""
    kernels, labels = PARAMETERS[name]
    found: list[dict[str, list[float]]] = []
    for seed, path in enumerate(paths):
        photo = load(path, size)
        sets = unaries(photo, name, labels, seed)
        ours, theirs = DenseCrf(photo, **kernels), Theirs(photo, sets, kernels)
        cases: dict[str, Callable[[], object]] = {
            "theirs": partial(call, photo, sets, kernels),
            "ours": partial(own, photo, sets, kernels),
            "theirs, inference": theirs.infer,
            "ours, inference": partial(ours.infer, sets),
            "ours, cold": partial(own_cold, photo, sets, kernels),
        }
        found.append(interleaved({key: partial(once, case) for key, case in cases.items()}, rounds))
    rows: list[list[object]] = []
    where = "own size (320 long)" if size is None else "375x500"
    for what, mine, base in (
        ("lattices and inference", "ours", "theirs"),
        ("the same, first photo of its size", "ours, cold", "theirs"),
        ("inference alone", "ours, inference", "theirs, inference"),
    ):
        ratios = [ratio(one, mine, base) for one in found]
        medians = [statistics.median(t for one in found for t in one[key]) for key in (mine, base)]
        rows.append([name.split(":")[0], where, what, *(f"{t:.3f}" for t in medians)])
        rows[-1] += [f"{statistics.median(ratios):.2f}", f"{max(ratios):.2f}"]
    return rows


def compared(photos: Photos) -> Iterator[Comparison]:
    """The row `crf` of python -m benchmarks: IRN's workload, lattices included; the difference is of probabilities."""
    name = next(iter(PARAMETERS))
    kernels, labels = PARAMETERS[name]
    loaded = [load(path, None) for path in photos.paths[:4]]
    work = [(photo, unaries(photo, name, labels, seed)) for seed, photo in enumerate(loaded)]
    yield Comparison(
        "two label maps of 4 labels, a photo",
        lambda: [torch.from_numpy(q) for photo, sets in work for q in Theirs(photo, sets, kernels).infer()],
        {"": lambda: [q for photo, sets in work for q in DenseCrf(photo, **kernels).infer(sets)]},
        lambda mine, want: max(float((a - b).abs().max()) for a, b in zip(mine, want, strict=True)),
        {"": 1e-3},
        units=len(work),
    )


def at_once(paths: list[Path], size: tuple[int, int] | None, device: str, rounds: int) -> str:
    """Images per second of IRN's workload, lattices included, one photo at a time and several at once, in turn."""
    if not torch.cuda.is_available() and device == "cuda":
        return "not run"
    name = next(iter(PARAMETERS))
    kernels, labels = PARAMETERS[name]
    photos = [load(path, size) for path in paths]
    batch = [
        (photo.to(device), [u.to(device) for u in unaries(photo, name, labels, i)]) for i, photo in enumerate(photos)
    ]

    def timed(count: int) -> float:
        start = time.perf_counter()
        for first in range(0, len(batch), count):
            some = batch[first : first + count]
            sets = [(number, one) for number, (_, own) in enumerate(some) for one in own]
            crf = DenseCrf(*(photo for photo, _ in some), **kernels)
            crf.infer([one for _, one in sets], photos=[number for number, _ in sets])
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    cases = {count: partial(timed, count) for count in AT_ONCE}
    for case in cases.values():
        case()
    found = interleaved({str(count): case for count, case in cases.items()}, rounds)
    return ", ".join(f"{n} at once {len(batch) / statistics.median(took):.1f} images/s" for n, took in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of JPEGs")
    parser.add_argument("--count", type=int, default=20, help="photos for the agreement (default 20)")
    parser.add_argument("--timed", type=int, default=8, help="photos for the times (default 8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu-alone", action="store_true", help="leave out what runs on the CPU")
    args = parser.parse_args()
    paths = sorted(p for p in args.photos.iterdir() if p.suffix.lower() in (".jpg", ".jpeg"))[: args.count]
    torch.set_num_threads(1)
    print(f"{machine()}, one thread, {len(paths)} photos, 10 iterations\n")
    on_gpu = f"GPU, IRN's workload at 375x500: {at_once(paths, (500, 375), 'cuda', args.rounds)}"
    if args.gpu_alone:
        print(on_gpu)
        return
    print(agreement(paths), flush=True)
    headings = ["kernels", "photos", "counted", "ours, s", "pydensecrf2, s", "ratio (median)", "highest of a photo"]
    irn, *_, many = PARAMETERS
    timed = paths[: args.timed]
    rows = [row for size in (None, (500, 375)) for row in speed(timed, size, irn, args.rounds)]
    rows += speed(timed[:4], (500, 375), many, args.rounds)
    print(f"\n{table(headings, rows)}\n")
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    print(f"one core, IRN's workload at 320 long: {at_once(timed, None, 'cpu', args.rounds)}")
    print(on_gpu)


if __name__ == "__main__":
    main()
