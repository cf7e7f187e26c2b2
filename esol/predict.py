"""`esol predict`: masks, overlays and class shares of any photos, by a trained model."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from esol.data.transforms import decode, resize
from esol.errors import DataError, EsolError
from esol.files import atomic_write
from esol.localize.class_maps import class_maps
from esol.localize.dense_crf import mean_field, unary_from_probabilities
from esol.localize.segmentation import enlarged_labels, probabilities
from esol.networks import trained_cam
from esol.pipeline import store
from esol.progress import progress
from esol.report import heat, paint
from esol.segmenter import load_model
from shards.samples import encode_mask

READ = (".jpg", ".jpeg", ".png", ".webp")
OTHER = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".mpo", ".tif", ".tiff")
OVERLAY = 1024  # pixels, long side of overlays and class maps at most
_T = TypeVar("_T")
WINDOW = 4  # batches of photos that are decoded at a time and grouped by size


class Predictor:
    """A model with its way to predict: photos larger than those that it learned from are made smaller first.

    fast: one scale, no flip, no CRF. On a GPU where there is one. Raises what load_model raises.
    """

    def __init__(self, model: str | Path, fast: bool = False) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        net, self.info = load_model(model)
        self.net = net.to(self.device)
        self.config = self.info.evaluate
        if fast:
            crf = replace(self.config.crf, iterations=0)
            self.config = replace(self.config, scales=(1.0,), flip=False, crf=crf)

    def reduced(self, image: Tensor) -> Tensor:
        """uint8 (3, H, W) at the size that the network gets: its long side is info.photo_side at most."""
        return _within(image, self.info.photo_side)

    def probabilities(self, images: list[Tensor]) -> list[Tensor]:
        """Reduced photos of one size -> probabilities (L, h, w) of each, after the CRF."""
        batch, config = torch.stack(images).to(self.device), self.config
        found = probabilities(batch, self.net, scales=config.scales, flip=config.flip, combine=config.combine)
        if not config.crf.iterations:
            return list(found)
        unaries = [unary_from_probabilities(one) for one in found]
        return [mean_field(image, [u], config.crf)[0] for image, u in zip(batch, unaries, strict=True)]

    def label_map(self, image: Tensor) -> NDArray[np.uint8]:
        """uint8 (3, H, W) of any size -> its label map (H, W)."""
        found = self.probabilities([self.reduced(image)])[0]
        return enlarged_labels(found, (image.shape[1], image.shape[2])).cpu().numpy()

    def shares(self, labels: NDArray[np.uint8]) -> dict[str, float]:
        """The share of the pixels of each label that is there."""
        counts = np.bincount(labels.ravel(), minlength=len(self.info.classes) + 1)
        names = ("background", *self.info.classes)
        return {name: round(int(n) / labels.size, 6) for name, n in zip(names, counts, strict=True) if n}


@dataclass
class _Photo:
    """One photo under way: its path below the folder, names of its outputs, size, and its pixels in two small sizes."""

    path: str
    name: str
    size: tuple[int, int]
    reduced: Tensor
    overview: Tensor


def predict(model: Path, photos: Path, out: Path, *, cam: bool = False, fast: bool = False, batch: int = 4) -> int:
    """Writes masks/, overlays/, predictions.json and with cam cams/ into out; returns 1 where a photo was skipped.

    EsolError for a model, folder or option that cannot be used; a photo that cannot is skipped, and named at the end.
    """
    if batch < 1:
        raise EsolError(f"--batch {batch}: give 1 or more")
    if out.exists() and not out.is_dir():
        raise EsolError(f"--out {out} is a file: give a folder")
    root, paths, skipped = _find(photos)
    predictor = Predictor(model, fast)
    maps = _Cams(model, predictor) if cam else None
    names = _names(paths)
    images: dict[str, Any] = {}
    try:
        with progress("predict", len(paths), "photos", visible=True) as advance:
            done = 0
            for window in _chunks(paths, WINDOW * batch):
                groups: dict[torch.Size, list[_Photo]] = defaultdict(list)
                for path in window:
                    try:
                        photo = _read(root, path, names[path], predictor)
                        groups[photo.reduced.shape].append(photo)
                    except DataError as error:
                        skipped[path] = str(error).removeprefix(f"{path}: ")
                for group in groups.values():
                    for some in _chunks(group, batch):
                        found = predictor.probabilities([photo.reduced for photo in some])
                        for photo, one in zip(some, found, strict=True):
                            images[photo.path] = _write(out, predictor, photo, one)
                            if maps is not None:
                                images[photo.path]["found"] = maps.write(out, photo)
                done += len(window)
                advance(done, "")
        report = {"model": str(model), "classes": predictor.info.classes, "fast": fast}
        report |= {"images": dict(sorted(images.items())), "skipped": dict(sorted(skipped.items()))}
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / "predictions.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise EsolError(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    print(f"{len(images)} photos predicted into {out}, {len(skipped)} skipped")
    for path, reason in sorted(skipped.items()):
        print(f"skipped {path}: {reason}", file=sys.stderr)
    return 1 if skipped else 0


def _find(photos: Path) -> tuple[Path, list[str], dict[str, str]]:
    """The folder, paths of photos below it, and those that are not read, with the reason."""
    if photos.is_file():
        return photos.parent, [photos.name], {}
    if not photos.is_dir():
        raise EsolError(f"{photos}: no such photo or folder")
    found, other = [], {}
    for folder, folders, files in os.walk(photos):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(folder, name)
            suffix, relative = path.suffix.lower(), str(path.relative_to(photos))
            if name.startswith("."):
                continue
            if suffix in READ and path.is_symlink() and not path.resolve().is_relative_to(photos.resolve()):
                other[relative] = "a link that leads out of the folder"
            elif suffix in READ:
                found.append(relative)
            elif suffix in OTHER:
                other[relative] = f"{suffix} is not read: convert it to JPEG, PNG or WebP"
    if not found and not other:
        raise EsolError(f"{photos} holds no photo ({', '.join(READ)})")
    return photos, sorted(found), other


def _names(paths: list[str]) -> dict[str, str]:
    """Path -> name of its outputs: without the suffix, unless two photos would meet in one name."""
    stems = Counter(str(Path(path).with_suffix("")).casefold() for path in paths)
    return {p: p if stems[str(Path(p).with_suffix("")).casefold()] > 1 else str(Path(p).with_suffix("")) for p in paths}


def _read(root: Path, path: str, name: str, predictor: Predictor) -> _Photo:
    try:
        data = (root / path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    image = decode(data, path)
    size = (image.shape[1], image.shape[2])
    return _Photo(path, name, size, predictor.reduced(image), _within(image, OVERLAY))


def _write(out: Path, predictor: Predictor, photo: _Photo, found: Tensor) -> dict[str, Any]:
    labels = enlarged_labels(found, photo.size).cpu().numpy()
    mask = out / "masks" / f"{photo.name}.png"
    mask.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(mask, encode_mask(labels))
    pixels = photo.overview.permute(1, 2, 0).numpy()
    rows, columns = (np.arange(n) * side // n for n, side in zip(pixels.shape[:2], photo.size, strict=True))
    _save(paint(pixels, labels[rows][:, columns]), out / "overlays" / f"{photo.name}.jpg")
    return {"width": photo.size[1], "height": photo.size[0], "shares": predictor.shares(labels)}


class _Cams:
    """The class maps of a run's last stage, as localize makes them, for the classes that its network finds."""

    def __init__(self, run_dir: Path, predictor: Predictor) -> None:
        if not store.is_run(run_dir):
            raise EsolError(f"--cam: {run_dir} is no run directory; class maps need the networks of classify and after")
        self.config = store.ran_with(run_dir, "localize", "shrink", "expand", "decide", "classify")
        self.classes, self.device = predictor.info.classes, predictor.device
        self.nets = trained_cam(self.config, len(self.classes), self.device)

    @torch.no_grad()
    def write(self, out: Path, photo: _Photo) -> dict[str, float]:
        """Writes cams/NAME.CLASS.png and returns the probability of every class above one half."""
        image, config = photo.reduced[None].to(self.device), self.config.localize
        chance = self.nets[0](image)[0].sigmoid()
        labels = (chance > 0.5)[None].float()
        made = class_maps(image, labels, *self.nets, scales=config.scales, flip=config.flip, long_side=config.long_side)
        maps = list(made[0].values())[-1]
        pixels = photo.reduced.permute(1, 2, 0).numpy()
        found = {}
        for number, full in zip(maps.classes.tolist(), maps.full.cpu().numpy(), strict=True):
            found[self.classes[number]] = round(float(chance[number]), 4)
            place = "".join(c if c.isalnum() or c in "-_ " else "_" for c in self.classes[number])
            _save(heat(pixels, full), out / "cams" / f"{photo.name}.{place}.png")
        return found


def _chunks(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _save(pixels: NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _within(image: Tensor, side: int) -> Tensor:
    """uint8 (3, H, W), made smaller where its long side exceeds `side` pixels."""
    longest = max(image.shape[1:])
    if longest <= side:
        return image
    height, width = (max(1, round(n * side / longest)) for n in image.shape[1:])
    return resize(image, height, width)
