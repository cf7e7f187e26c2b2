"""`esol predict`: masks, overlays and class shares of any photos, by a trained model."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torch import Tensor

from esol.base.errors import DataError, EsolError
from esol.base.files import atomic_write
from esol.base.progress import progress
from esol.base.strangers import printable
from esol.config import MapsConfig
from esol.data.samples import encode_mask, encode_png
from esol.data.tiff import encode_geotiff, place_on_earth
from esol.data.transforms import decode, within
from esol.deploy.gather import MARK, REPORT, UNFINISHED, distinct, gather, output_names, texts
from esol.deploy.model import Model
from esol.models.folded import for_inference
from esol.ops.class_maps import class_maps
from esol.pipeline import records
from esol.pipeline.cam import ran_with_maps, trained_heads
from esol.pipeline.crew import TOGETHER, Crew
from esol.report.pictures import heat, paint

OVERLAY = 1024  # pixels, long side of overlays and class maps at most
_T = TypeVar("_T")
_LINES = 20  # of skipped files that are printed; the report has all
_REFUSED_NAME = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL)  # by a file system that knows other rules
ALONE = 3 * 2048**2  # values: a larger photo goes through the network by itself, as soon as it is read


@dataclass
class _Photo:
    """One photo under way: its path below the folder, name of its outputs, size, its pixels as the network sees them
    and in a small size, and GeoTIFF's tags."""

    path: str
    name: str
    size: tuple[int, int]
    reduced: Tensor
    overview: Tensor
    place: ImageFileDirectory_v2 | None


def predict(
    model: Path,
    photos: Path,
    out: Path,
    *,
    cam: bool = False,
    confidence: bool = False,
    fast: bool = False,
    full_size: bool = False,
) -> int:
    """Writes masks/, overlays/, predictions.json, and more on request, into out; returns 1 where a photo was skipped.

    EsolError for a model, folder or option that cannot be used; a photo that cannot is skipped, and named at the end.
    """
    if out.exists() and not out.is_dir():
        raise EsolError(f"--out {out} is a file: give a folder")
    found = gather(photos, out)
    loaded = Model(model, fast, full_size)
    work = _Work(found.root, out, output_names(found.photos), loaded, _Cams(model, loaded) if cam else None, confidence)
    images, skipped = dict[str, dict[str, Any]](), dict(found.skipped)
    groups = list(_chunks(found.photos, TOGETHER if loaded.device.type == "cuda" else 1))
    try:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / UNFINISHED, MARK)
        (out / REPORT).unlink(missing_ok=True)  # it may speak of other masks than those that follow
        with progress("predict", len(found.photos), "photos", visible=True) as advance:
            work.tell = lambda note: advance(len(images) + len(skipped) - len(found.skipped), note)
            for answers in work.crew.map(work, groups):
                images |= {path: answer for path, answer in answers.items() if not isinstance(answer, str)}
                skipped |= {path: answer for path, answer in answers.items() if isinstance(answer, str)}
                work.tell("")
        said = texts((*images, *skipped))
        report = {"model": texts([own := model.resolve().name])[own], "classes": loaded.info.classes, "fast": fast}
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


@dataclass
class _Work:
    """Predicts photos and writes what they come to, in the threads of a crew; tell: hears what is next of a large one.

    Called with some paths it returns for each what the report says of it, or why it was skipped.
    """

    root: Path
    out: Path
    names: dict[str, str]
    model: Model
    maps: _Cams | None
    confidence: bool
    tell: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        self.crew = Crew(self.model.device)

    def __call__(self, paths: Sequence[str]) -> dict[str, dict[str, Any] | str]:
        answers: dict[str, dict[str, Any] | str] = {}
        together: list[_Photo] = []
        for path in paths:
            try:
                photo = self._read(path)
            except DataError as error:
                answers[path] = str(error).removeprefix(f"{path}: ")
                continue
            if photo.reduced.numel() > ALONE:
                answers |= self._answer([photo])
            else:
                together.append(photo)
            del photo  # one of the large ones at a time
        return answers | self._answer(together)

    def _read(self, path: str) -> _Photo:
        try:
            data = (self.root / path).read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        image = decode(data, path)
        size = (image.shape[1], image.shape[2])
        reduced, overview = self.model.reduced(image), within(image, OVERLAY)
        return _Photo(path, self.names[path], size, reduced, overview, place_on_earth(data))

    def _answer(self, photos: Sequence[_Photo]) -> dict[str, dict[str, Any] | str]:
        answers: dict[str, dict[str, Any] | str] = {}
        inputs, sizes = [photo.reduced for photo in photos], [photo.size for photo in photos]
        with self.crew.room(*((image.shape[1], image.shape[2]) for image in inputs)):
            for photo, made in zip(photos, self.model.label_maps(inputs, sizes, self.tell), strict=True):
                try:
                    answers[photo.path] = self._write(photo, *made)
                except OSError as error:
                    if error.errno not in _REFUSED_NAME:
                        raise
                    answers[photo.path] = f"its outputs cannot be written ({error.strerror})"
        return answers

    def _write(self, photo: _Photo, mask: NDArray[np.uint8], sure: NDArray[np.uint16]) -> dict[str, Any]:
        pixels = photo.overview.permute(1, 2, 0).numpy()
        rows, columns = (np.arange(n) * side // n for n, side in zip(pixels.shape[:2], photo.size, strict=True))
        about: dict[str, Any] = {"mask": self._put("masks", f"{photo.name}.png", encode_mask(mask))}
        _save(paint(pixels, mask[rows][:, columns]), self.out / "overlays" / f"{photo.name}.jpg")
        if self.confidence:
            data = encode_png(Image.fromarray(sure))
            about["confidence"] = self._put("confidence", f"{photo.name}.png", data)
        if photo.place is not None:
            about["geotiff"] = self._put("geotiff", f"{photo.name}.tif", encode_geotiff(mask, photo.place))
        about |= {"width": photo.size[1], "height": photo.size[0], "shares": self.model.shares(mask)}
        return about if self.maps is None else about | {"found": self.maps.write(self.out, photo)}

    def _put(self, folder: str, name: str, data: bytes) -> str:
        path = self.out / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
        return str(path.relative_to(self.out))


class _Cams:
    """The class maps of a run's last stage, as localize makes them, for the classes that its network finds."""

    def __init__(self, run_dir: Path, model: Model) -> None:
        if not records.is_run(run_dir):
            raise EsolError(f"--cam: {run_dir} is no run directory; class maps need the networks of classify and after")
        self.config = ran_with_maps(run_dir)
        self.classes, self.device = model.info.classes, model.device
        plain = {name: "".join(c if c.isalnum() or c in "-_ " else "_" for c in name)[:15] for name in self.classes}
        self.places = distinct({name: (text, f"{text}-{i}") for i, (name, text) in enumerate(plain.items(), 1)})
        self.heads = for_inference(trained_heads(self.config, len(self.classes)), self.device, None)

    @torch.no_grad()
    def write(self, out: Path, photo: _Photo) -> dict[str, float]:
        """Writes cams/NAME.CLASS.png and returns the probability of every class above one half."""
        image, config = photo.reduced.to(self.device), self.config.section(MapsConfig)
        chance = self.heads.net(image[None])[0].sigmoid()
        options: dict[str, Any] = {"scales": config.scales, "flip": config.flip, "long_side": config.long_side}
        maps = list(class_maps([image], [(chance > 0.5).float()], self.heads, **options)[0].values())[-1]
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
