"""What the page shows of every photo, in layers: the photos, their truth, and what each stage made of them.

A layer is a few files of report_files/: NAME-0000.js, NAME-0001.js, ... with CHUNK photos each, which call
ESOL.add(layer, first photo, entries) and which the page loads as scripts, and NAME.json with a number or two of each
photo. A layer is written once for what it is made from: a page that is written anew after every stage costs only the
newest one.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from esol.base.errors import DataError
from esol.base.files import atomic_write
from esol.base.palette import VOID
from esol.base.strangers import content, json_tree
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.samples import decode_mask
from esol.data.transforms import decode
from esol.ops.metrics import confusion_matrix, score
from esol.pipeline.made import StageShards
from esol.pipeline.records import file_hash
from esol.report.judge import Evidence

FILES = "report_files"
CHUNK = 50  # photos a file
SIDE, THUMB, MAP = 320, 96, 80  # pixels, long sides: of a photo, of its thumbnail, of a class map
MOST_NUMBERS = 1 << 30  # bytes of a layer's numbers: of 100,000 photos, with their thumbnails, a quarter of it
_BEFORE, _BEHIND = "ESOL.add(...", ");\n"
_seen: set[str] = set()  # hashes of layers' files that this process has written or looked through
Beat = Callable[[str], None]


@dataclass(frozen=True)
class Album:
    """The photos of a run's page; beat: tells the watchdog what is being done."""

    run_dir: Path
    index: Index
    reader: ShardReader
    ordinals: NDArray[np.int64]
    beat: Beat

    @property
    def folder(self) -> Path:
        """Where the layers lie."""
        return self.run_dir / FILES

    def chunks(self, layer: str) -> Iterator[tuple[int, list[int]]]:
        """The first place of each chunk, and its photos; tells the watchdog."""
        for start in range(0, len(self.ordinals), CHUNK):
            self.beat(f"the page's {layer}, photo {start}")
            yield start, self.ordinals[start : start + CHUNK].tolist()

    def pixels(self, ordinal: int) -> NDArray[np.uint8]:
        """uint8 (H, W, 3) at the page's size; gray where the photo cannot be read."""
        try:
            photo = decode(self.reader.image(ordinal), self.reader.name(ordinal)).permute(1, 2, 0).numpy()
        except DataError:
            return np.full((SIDE * 3 // 4, SIDE, 3), 128, np.uint8)
        image = Image.fromarray(photo)
        image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
        return np.asarray(image)

    def truth(self, ordinal: int) -> NDArray[np.uint8] | None:
        """The photo's own mask, if the shards have one that can be read."""
        masks = self.index.members.get("mask.png")
        if masks is None or masks[ordinal, 0] < 0:
            return None
        try:
            return decode_mask(self.reader.read(ordinal, "mask.png"), self.reader.name(ordinal))
        except DataError:
            return None

    def labels(self, ordinal: int) -> list[int]:
        """The classes that it is labelled with, without background."""
        if self.index.labels is not None:
            return np.flatnonzero(self.index.labels[ordinal]).tolist()
        return np.flatnonzero(self.reader.labels(ordinal)).tolist()


def write_photos(album: Album) -> None:
    """Layer "photos", and in its numbers the photos' sizes and thumbnails: JPEG, in base64."""
    thumbs: list[str] = []
    shapes: list[list[int]] = []

    def entry(ordinal: int) -> str:
        image = Image.fromarray(album.pixels(ordinal))
        shapes.append([image.width, image.height])
        large = encoded(image, "JPEG", quality=78)
        image.thumbnail((THUMB, THUMB), Image.Resampling.BILINEAR)
        thumbs.append(encoded(image, "JPEG", quality=60))
        return large

    _write(album, "photos", album.index.hash, entry, lambda: {"thumbs": thumbs, "shapes": shapes})


def write_truth(album: Album) -> None:
    """Layer "truth": the photos' own masks."""

    def entry(ordinal: int) -> str | int:
        mask = album.truth(ordinal)
        return 0 if mask is None else _mask(_fitted(mask, album.pixels(ordinal).shape))

    _write(album, "truth", album.index.hash, entry, lambda: {})


def write_masks(album: Album, stage: str, output: str) -> None:
    """A mask stage's layer, with each photo's number of the judge, its IoU against truth and the classes it lacks.

    output: the hash of what the stage wrote.
    """
    made, classes = StageShards(album, stage), len(album.index.classes)
    numbers: dict[str, list[Any]] = {"judge": [], "iou": [], "lost": []}

    def entry(ordinal: int) -> str | int:
        if ordinal not in made:
            for values in numbers.values():
                values.append(None)
            return 0
        pixels = album.pixels(ordinal)
        mask = _fitted(made.label_map(ordinal, "mask.png"), pixels.shape)
        evidence = Evidence.empty(classes)
        evidence.add(pixels.transpose(2, 0, 1), mask, album.labels(ordinal))
        judge, truth = evidence.numbers(album.index.classes).get("judge"), album.truth(ordinal)
        numbers["judge"].append(None if judge is None else round(judge, 3))
        numbers["iou"].append(None if truth is None else _iou(_fitted(truth, pixels.shape), mask, classes))
        numbers["lost"].append(np.flatnonzero(evidence.lost).tolist())
        return _mask(mask)

    _write(album, stage, output, entry, lambda: numbers)


def write_maps(album: Album, stage: str, output: str) -> None:
    """A layer of class maps: for each source the maps of the photo's classes."""
    made, sources = StageShards(album, stage), dict[str, None]()

    def entry(ordinal: int) -> dict[str, list[list[Any]]] | int:
        if ordinal not in made:
            return 0
        own = _sources(made, ordinal)
        sources.update(dict.fromkeys(own))
        return {source: _maps(*maps) for source, maps in own.items()}

    _write(album, stage, output, entry, lambda: {"sources": list(sources)})


def _sources(made: StageShards, ordinal: int) -> dict[str, tuple[NDArray[Any], NDArray[np.uint8]]]:
    """Source -> classes and maps uint8 (n, h, w): of every head where localize kept them, else of what it wrote."""
    written = made.arrays(ordinal, "maps.npz")
    if not made.holds(ordinal, "seen.npz"):
        return {"": (written["classes"], written["full"])}
    return {name: (written["classes"], maps) for name, maps in made.arrays(ordinal, "seen.npz").items()}


def _maps(classes: NDArray[Any], maps: NDArray[np.uint8]) -> list[list[Any]]:
    found = []
    for number, values in zip(classes.tolist(), maps, strict=True):
        small = Image.fromarray(values)
        small.thumbnail((MAP, MAP), Image.Resampling.BILINEAR)
        found.append([number, encoded(small, "PNG")])
    return found


def _fitted(mask: NDArray[np.uint8], shape: Sequence[int]) -> NDArray[np.uint8]:
    """A label map at the page's size of its photo."""
    if mask.shape == tuple(shape[:2]):
        return mask
    return np.asarray(Image.fromarray(mask).resize((shape[1], shape[0]), Image.Resampling.NEAREST))


def _iou(truth: NDArray[np.uint8], mask: NDArray[np.uint8], classes: int) -> float | None:
    """Mean IoU in percent over the labels that either has; None where truth is all void."""
    said = np.where(mask == VOID, np.uint8(0), mask)
    matrix = confusion_matrix(truth, said, classes + 1)
    return round(100 * float(np.nanmean(score(matrix).iou)), 1) if matrix.any() else None


def _mask(mask: NDArray[np.uint8]) -> str:
    return encoded(Image.fromarray(mask), "PNG")


def encoded(image: Image.Image, kind: str, **options: Any) -> str:
    """A picture in one of Pillow's formats, in base64."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def _write(
    album: Album,
    layer: str,
    stamp: str,
    entry: Callable[[int], Any],
    numbers: Callable[[], dict[str, list[Any]]],
) -> None:
    """Writes a layer's files, its numbers last, unless they are there of what has this stamp and of these photos.

    entry: what the layer has of a photo, called in order; numbers: what was found on the way.
    """
    stamp = f"{stamp} {hashlib.sha256(album.ordinals.tobytes()).hexdigest()[:16]}"
    about = album.folder / f"{layer}.json"
    if read_numbers(album.folder, layer).get("stamp") == stamp and all(
        _ours(album.folder / f"{layer}-{start // CHUNK:04d}.js") for start in range(0, len(album.ordinals), CHUNK)
    ):
        return
    album.folder.mkdir(exist_ok=True)
    about.unlink(missing_ok=True)
    for start, ordinals in album.chunks(layer):
        call = script([layer, start, [entry(ordinal) for ordinal in ordinals]])
        path = album.folder / f"{layer}-{start // CHUNK:04d}.js"
        atomic_write(path, f"{_BEFORE}{call}{_BEHIND}")
        _seen.add(file_hash(path))
    atomic_write(about, json.dumps({"stamp": stamp, **numbers()}))


def read_numbers(folder: Path, layer: str) -> dict[str, Any]:
    """The numbers of a layer's photos; empty where it is not there."""
    try:
        tree = json_tree(content(folder / f"{layer}.json", MOST_NUMBERS))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def script(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")


def _ours(path: Path) -> bool:
    """Whether a layer's file is a call with data, such as is written here: a page runs what is in it."""
    try:
        if (known := file_hash(path)) not in _seen:
            text = content(path).decode()
            data = text.removeprefix(_BEFORE).removesuffix(_BEHIND)
            if text != f"{_BEFORE}{data}{_BEHIND}" or script(json_tree(data)) != data:
                return False
            _seen.add(known)
    except (OSError, ValueError):
        return False
    return True
