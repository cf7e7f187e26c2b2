"""`esol predict`: masks, overlays and class shares of any photos, by a trained model."""

from __future__ import annotations

import errno
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from esol.base.errors import DataError, EsolError
from esol.base.files import atomic_write
from esol.base.progress import progress
from esol.config import MapsConfig
from esol.data.samples import encode_mask
from esol.data.transforms import decode
from esol.deploy.gather import MARK, REPORT, UNFINISHED, distinct, gather, output_names, printable, texts
from esol.deploy.model import Model, within
from esol.ops.class_maps import class_maps
from esol.ops.segmentation import enlarged_labels
from esol.pipeline import records
from esol.pipeline.cam import ran_with_maps, trained_heads
from esol.report.pictures import heat, paint

OVERLAY = 1024  # pixels, long side of overlays and class maps at most
_T = TypeVar("_T")
_LINES = 20  # of skipped files that are printed; the report has all
_REFUSED_NAME = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL)  # by a file system that knows other rules
WINDOW = 4  # batches of photos that are decoded at a time and grouped by size


@dataclass
class _Photo:
    """One photo under way: its path below the folder, name of its outputs, size, and its pixels in two small sizes."""

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
    found = gather(photos, out)
    loaded = Model(model, fast)
    maps = _Cams(model, loaded) if cam else None
    names, skipped = output_names(found.photos), dict(found.skipped)
    images: dict[str, Any] = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / UNFINISHED, MARK)
        (out / REPORT).unlink(missing_ok=True)  # it may speak of other masks than those that follow
        with progress("predict", len(found.photos), "photos", visible=True) as advance:
            done = 0
            for window in _chunks(found.photos, WINDOW * batch):
                groups: dict[torch.Size, list[_Photo]] = defaultdict(list)
                for path in window:
                    try:
                        photo = _read(found.root, path, names[path], loaded)
                        groups[photo.reduced.shape].append(photo)
                    except DataError as error:
                        skipped[path] = str(error).removeprefix(f"{path}: ")
                for group in groups.values():
                    for some in _chunks(group, batch):
                        answers = loaded.probabilities([photo.reduced for photo in some])
                        for photo, one in zip(some, answers, strict=True):
                            try:
                                images[photo.path] = _write(out, loaded, photo, one, maps)
                            except OSError as error:
                                if error.errno not in _REFUSED_NAME:
                                    raise
                                skipped[photo.path] = f"its outputs cannot be written ({error.strerror})"
                done += len(window)
                advance(done, "")
        said = texts((*images, *skipped))
        report = {"model": texts([str(model)])[str(model)], "classes": loaded.info.classes, "fast": fast}
        report["images"] = {said[path]: images[path] for path in sorted(images)}
        report["skipped"] = {said[path]: skipped[path] for path in sorted(skipped)}
        report["not_pictures"] = found.others.total()
        atomic_write(out / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        (out / UNFINISHED).unlink()
    except OSError as error:
        raise EsolError(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    print(f"{len(images)} photos predicted into {printable(str(out))}, {len(skipped)} skipped")
    for note in found.notes():
        print(note)
    for path in sorted(skipped)[:_LINES]:
        print(f"skipped {printable(said[path])}: {skipped[path]}", file=sys.stderr)
    if len(skipped) > _LINES:
        print(f"and {len(skipped) - _LINES} more, all in {printable(str(out / REPORT))}", file=sys.stderr)
    return 1 if skipped else 0


def _read(root: Path, path: str, name: str, model: Model) -> _Photo:
    try:
        data = (root / path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    image = decode(data, path)
    size = (image.shape[1], image.shape[2])
    return _Photo(path, name, size, model.reduced(image), within(image, OVERLAY))


def _write(out: Path, model: Model, photo: _Photo, found: Tensor, maps: _Cams | None) -> dict[str, Any]:
    labels = enlarged_labels(found, photo.size).cpu().numpy()
    mask = out / "masks" / f"{photo.name}.png"
    mask.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(mask, encode_mask(labels))
    pixels = photo.overview.permute(1, 2, 0).numpy()
    rows, columns = (np.arange(n) * side // n for n, side in zip(pixels.shape[:2], photo.size, strict=True))
    _save(paint(pixels, labels[rows][:, columns]), out / "overlays" / f"{photo.name}.jpg")
    about = {"mask": str(mask.relative_to(out)), "width": photo.size[1], "height": photo.size[0]}
    about["shares"] = model.shares(labels)
    return about if maps is None else about | {"found": maps.write(out, photo)}


class _Cams:
    """The class maps of a run's last stage, as localize makes them, for the classes that its network finds."""

    def __init__(self, run_dir: Path, model: Model) -> None:
        if not records.is_run(run_dir):
            raise EsolError(f"--cam: {run_dir} is no run directory; class maps need the networks of classify and after")
        self.config = ran_with_maps(run_dir)
        self.classes, self.device = model.info.classes, model.device
        plain = {name: "".join(c if c.isalnum() or c in "-_ " else "_" for c in name)[:15] for name in self.classes}
        self.places = distinct({name: (text, f"{text}-{i}") for i, (name, text) in enumerate(plain.items(), 1)})
        self.heads = trained_heads(self.config, len(self.classes)).to(self.device).eval()

    @torch.no_grad()
    def write(self, out: Path, photo: _Photo) -> dict[str, float]:
        """Writes cams/NAME.CLASS.png and returns the probability of every class above one half."""
        image, config = photo.reduced[None].to(self.device), self.config.section(MapsConfig)
        chance = self.heads.net(image)[0].sigmoid()
        labels = (chance > 0.5)[None].float()
        made = class_maps(image, labels, self.heads, scales=config.scales, flip=config.flip, long_side=config.long_side)
        maps = list(made[0].values())[-1]
        pixels = photo.reduced.permute(1, 2, 0).numpy()
        found = {}
        for number, full in zip(maps.classes.tolist(), maps.full.cpu().numpy(), strict=True):
            name = self.classes[number]
            found[name] = round(float(chance[number]), 4)
            _save(heat(pixels, full), out / "cams" / f"{photo.name}.{self.places[name]}.png")
        return found


def _chunks(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _save(pixels: NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
