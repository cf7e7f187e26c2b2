"""What benchmarks.fuzz does to the inputs of `esol-shards create` and `esol predict`, and how it tells what was lost.

Each case writes a small source (labels.csv, COCO's json, VOC's XML, a folder of photos), damages it in one way and
gives it to the command, in this process. Reported: the command refuses it, or takes it and names what it left out.
Harmless:
every photo is in the set with the labels it had. A miss is a photo, or a label of a row that was not touched, that is
gone without a word.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.fuzz_kinds import (
    Rng,
    any_bytes,
    encode,
    exchange,
    remove_node,
    replace_node,
    shift_number,
    truncate,
)
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.samples import encode_mask
from shards.synthetic import CLASSES, draw_scene

PHOTOS = 6
SIZE = (56, 40)  # width, height
Change = Callable[[bytes, Rng], bytes]


@cache
def scene(number: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """A photo, its mask and its labels."""
    image, mask, _ = draw_scene(np.random.default_rng([7, number]), 64)
    image, mask = image[12:52, 4:60], mask[12:52, 4:60]
    return image, mask, tuple(CLASSES[c - 1] for c in np.unique(mask) if c) or (CLASSES[0],)


def photo(number: int) -> bytes:
    return encode(Image.fromarray(scene(number)[0]), "JPEG", quality=90 + number)  # no two have the same bytes


def name(number: int) -> str:
    return f"photo{number}"


# Sources, whole.


def write_folder(root: Path) -> Path:
    (root / "images").mkdir(parents=True)
    rows = ["image,labels,split"]
    for number in range(PHOTOS):
        (root / "images" / f"{name(number)}.jpg").write_bytes(photo(number))
        rows.append(f"{name(number)}.jpg,{';'.join(scene(number)[2])},train")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root / "labels.csv"


def write_coco(root: Path) -> Path:
    """instances.json with a polygon, and with an RLE, for each class of a photo."""
    from pycocotools import mask as coder

    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(PHOTOS):
        (root / "images" / f"{name(number)}.jpg").write_bytes(photo(number))
        images.append({"id": number + 1, "file_name": f"{name(number)}.jpg", "width": SIZE[0], "height": SIZE[1]})
        for label in scene(number)[2]:
            shape: Any = [[4.0, 4.0, 20.0, 4.0, 20.0, 30.0]]
            if len(annotations) % 2:
                here = scene(number)[1] == CLASSES.index(label) + 1
                shape = coder.encode(np.asfortranarray(here.astype(np.uint8)))
                shape = {"size": shape["size"], "counts": shape["counts"].decode()}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": CLASSES.index(label) + 1,
                    "segmentation": shape,
                    "bbox": [4, 4, 16, 26],
                    "area": 208,
                    "iscrowd": len(annotations) % 2,
                }
            )
    categories = [{"id": i + 1, "name": c} for i, c in enumerate(CLASSES)]
    path = root / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


_VOC = ("aeroplane", "bicycle", "bird", "boat", "bottle")  # VOC's own names in the place of the scenes'


def write_voc(root: Path) -> Path:
    """VOC's layout; returns the folder of XML files."""
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for number in range(PHOTOS):
        image, mask, labels = scene(number)
        (root / "JPEGImages" / f"{name(number)}.jpg").write_bytes(photo(number))
        (root / "SegmentationClass" / f"{name(number)}.png").write_bytes(encode_mask(mask))
        objects = "".join(f"<object><name>{_VOC[CLASSES.index(label)]}</name></object>" for label in labels)
        size = f"<size><width>{image.shape[1]}</width><height>{image.shape[0]}</height></size>"
        text = f"<annotation><filename>{name(number)}.jpg</filename>{size}{objects}</annotation>"
        (root / "Annotations" / f"{name(number)}.xml").write_text(text)
    keys = [name(number) for number in range(PHOTOS)]
    for split, own in (("train", keys[:4]), ("val", keys[4:]), ("trainval", keys)):
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(own) + "\n")
    return root / "Annotations"


# Damage.


def _line(data: bytes, rng: Rng, change: Callable[[list[bytes], int], None]) -> bytes:
    lines = data.split(b"\n")
    change(lines, int(rng.integers(1, PHOTOS + 1)))
    return b"\n".join(lines)


def drop_row(data: bytes, rng: Rng) -> bytes:
    return _line(data, rng, lambda lines, at: lines.pop(at) and None)


def double_row(data: bytes, rng: Rng) -> bytes:
    return _line(data, rng, lambda lines, at: lines.insert(at, lines[at]))


def other_dialect(data: bytes, rng: Rng) -> bytes:
    ways: tuple[Callable[[bytes], bytes], ...] = (
        lambda d: d.replace(b";", b"|"),
        lambda d: d.replace(b";", b"/").replace(b",", b";"),
        lambda d: d.replace(b",", b"\t"),
        lambda d: d.decode().encode("utf-16"),
        lambda d: b"\xef\xbb\xbf" + d.replace(b"\n", b"\r\n"),
        lambda d: d.replace(b"\n", b"\r"),
        lambda d: d + b",,\n" * 3,
        lambda d: d.replace(b"image,labels", b"filename,label"),
    )
    return ways[int(rng.integers(len(ways)))](data)


def odd_cell(data: bytes, rng: Rng) -> bytes:
    odd = (
        "",
        '"',
        ",",
        ";;",
        "\u00a0",
        "\u200b",
        "a\0b",
        "../../etc/passwd",
        "x" * 300,
        "caf\u00e9",
        "cafe\u0301",
        "FISH",
    )

    def change(lines: list[bytes], at: int) -> None:
        cells = lines[at].split(b",")
        text = odd[int(rng.integers(len(odd)))].encode()
        where = int(rng.integers(len(cells)))
        cells[where] = text if rng.random() < 0.5 else cells[where] + text
        lines[at] = b",".join(cells)

    return _line(data, rng, change)


def odd_shape(data: bytes, rng: Rng) -> bytes:
    """A polygon or an RLE with numbers, sizes and types that no shape has."""
    tree = json.loads(data)
    one = tree["annotations"][int(rng.integers(len(tree["annotations"])))]
    numbers: tuple[Any, ...] = (float("nan"), float("inf"), None, 1e9, -1e9, 2**62, "7", [], 10**30)
    odd = numbers[int(rng.integers(len(numbers)))]
    shapes: tuple[Any, ...] = (
        [[4.0, 4.0, odd, 4.0, 20.0, 30.0]],
        [[odd] * 6],
        [[4.0, 4.0, 20.0]],
        [[0.1, 0.1, 0.5, 0.1, 0.5, 0.9]],
        [[]],
        [],
        None,
        {"size": [40, 56], "counts": [odd, 5]},
        {"size": [2**20, 2**20], "counts": [0, 2**40]},
        {"size": [40, 56], "counts": "zzzz\xff"},
        {"size": odd, "counts": "0"},
        {"counts": [1]},
    )
    one["segmentation"] = shapes[int(rng.integers(len(shapes)))]
    return json.dumps(tree).encode()


def odd_xml(data: bytes, rng: Rng) -> bytes:
    text = data.decode()
    bomb = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">' + "".join(
        f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(9)
    )
    ways = (
        text.encode("utf-16"),
        b'<?xml version="1.0" encoding="latin-1"?>' + text.replace("<object>", "<x>\xe9</x><object>").encode("latin-1"),
        b'<?xml version="1.0" encoding="nonsense"?>' + data,
        f"{bomb}]>{text.replace('<name>', '<name>&j;')}".encode(),
        text.replace("<name>", "<title>").replace("</name>", "</title>").encode(),
        text.replace("<name>", "<name> ").encode(),
        b"",
        b"<annotation/>",
        data[: len(data) // 2],
    )
    return ways[int(rng.integers(len(ways)))]


# The commands.


def command(main: Callable[[], Any]) -> tuple[int, str]:
    """Exit code and all that was printed; what a command raises is a crash, for the caller."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = int(main() or 0)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
    return code, said.getvalue()


@dataclass(frozen=True)
class SourceKind:
    """Damages a source and runs its command; returns verdict and detail."""

    write: Callable[[Path], Path]
    arguments: Callable[[Path], list[str]]
    change: Change
    touches_one: bool = False  # photo or file by its own; the labels of the others must stay

    def __call__(self, scratch: Path, rng: Rng) -> tuple[str, str]:
        from shards.cli import main

        root = scratch / "source"
        path = self.write(root)
        if path.is_dir():
            files = sorted(path.iterdir())
            path = files[int(rng.integers(len(files)))]
        before = path.read_bytes()
        path.write_bytes(self.change(before, rng))
        out = scratch / "set"
        code, said = command(lambda: main(["create", *self.arguments(root), "--out", str(out)]))
        if code:
            lines = [line for line in said.splitlines() if line.strip()]
            if not any("error:" in line for line in lines):
                return "miss", f"exit code {code} without an error: {said[-200:]}"
            if not re.search(r"source|set|labels|instances|photo\d|line|annotation", said.split("error:", 1)[1]):
                return "miss", f"names no place: {said[-200:]}"
            return "reported", said.split("error:", 1)[1].strip()[:200]
        return _lost(out, said, path.stem if self.touches_one else "")


def _lost(out: Path, said: str, touched: str) -> tuple[str, str]:
    """Photos that are not in the set though nothing was said, by their bytes."""
    index = Index.load(out)
    reader = ShardReader(index)
    there = {reader.image(ordinal): reader.labels(ordinal) for ordinal in range(len(index))}
    spoken = "left out" in said or "dropped" in said or "without" in said or "warning" in said.lower()
    for number in range(PHOTOS):
        found = there.get(photo(number))
        if found is None:
            if name(number) in said or spoken:
                return "reported", said.strip()[:200]
            return "miss", f"{name(number)} is gone without a word: {said[-200:]}"
        if touched and name(number) != touched and not found.any():
            return "miss", f"{name(number)} lost its labels: {said[-200:]}"
    return "harmless", ""


def _create_folder(root: Path) -> list[str]:
    return ["folder", str(root)]


def _create_coco(root: Path) -> list[str]:
    files = ["--images", str(root / "images"), "--annotations", str(root / "instances.json")]
    return ["coco", *files, "--split", "train", "--keep-unannotated"]


def _create_voc(root: Path) -> list[str]:
    return ["voc", str(root)]


# esol predict: a folder in which something is odd.


@cache
def _model(folder: Path) -> Path:
    """A DeepLab of random weights that is small enough for a case."""
    import torch

    from esol.config import BackboneConfig, CrfConfig, PredictionConfig
    from esol.models.backbones import build_backbone
    from esol.models.deeplab import DeepLab
    from esol.pipeline.model_file import ModelInfo, write_model

    torch.manual_seed(0)
    net = DeepLab(build_backbone(BackboneConfig("small", "none", output_stride=8)), len(CLASSES) + 1, (6, 12))
    evaluate = PredictionConfig(scales=(1.0,), flip=False, crf=CrfConfig(iterations=0))
    path = folder / "model.safetensors"
    write_model(path, net.state_dict(), ModelInfo(CLASSES, "small", (6, 12), evaluate, 56, "seed_masks", "random"))
    return path


def _odd_name(root: Path, rng: Rng) -> None:
    names: tuple[bytes, ...] = (
        b"n\xffo.jpg",
        b"x" * 250 + b".jpg",
        b"two\nlines.jpg",
        b"photo0.jpeg",
        b"PHOTO0.JPG",
        b"no suffix",
        b"a.b.c.jpg",
        "caf\u00e9.jpg".encode(),
        "cafe\u0301.jpg".encode(),
        b"photo1.png",
        b"-rf.jpg",
        b".hidden.jpg",
    )
    target = bytes(root) + b"/" + names[int(rng.integers(len(names)))]
    Path(target.decode(errors="surrogateescape")).write_bytes(photo(0) + b"\0" * int(rng.integers(1, 9)))


def _odd_file(root: Path, rng: Rng) -> None:
    import os

    path = root / f"{name(int(rng.integers(PHOTOS)))}.jpg"
    data = path.read_bytes()
    ways: tuple[Callable[[], Any], ...] = (
        lambda: path.write_bytes(any_bytes(data, rng)),
        lambda: path.write_bytes(truncate(data, rng)),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(rng.bytes(500)),
        lambda: path.write_bytes(encode(Image.open(io.BytesIO(data)), "GIF")),
        lambda: path.write_bytes(encode(Image.open(io.BytesIO(data)), "TIFF")),
        lambda: (path.unlink(), path.symlink_to(root / "nowhere.jpg")),
        lambda: (path.unlink(), os.mkfifo(path)),
        lambda: (root / "loop").symlink_to(root, target_is_directory=True),
        lambda: (path.unlink(), path.mkdir()),
        lambda: (path.rename(root.parent / "elsewhere"), path.symlink_to(root.parent / "elsewhere")),
        lambda: path.rename(root / "masks.JFIF"),
    )
    ways[int(rng.integers(len(ways)))]()


@dataclass(frozen=True)
class PredictKind:
    """Makes a folder odd and predicts it; every file whose bytes are still a whole photo must come out."""

    change: Callable[[Path, Rng], None]

    def __call__(self, scratch: Path, rng: Rng) -> tuple[str, str]:
        from esol.base.errors import EsolError
        from esol.deploy.predict import predict

        root, out = scratch / "photos", scratch / "out"
        root.mkdir()
        for number in range(PHOTOS):
            (root / f"{name(number)}.jpg").write_bytes(photo(number))
        self.change(root, rng)
        files = [path for path in root.iterdir() if path.is_file()]  # links count as what they lead to
        try:
            code, said = command(lambda: predict(_model(scratch.parent), root, out))
        except EsolError as error:
            return "reported", str(error)
        report = json.loads((out / "predictions.json").read_text())
        masks = list((out / "masks").rglob("*.png"))
        if len(masks) != len(report["images"]):
            return "miss", f"{len(report['images'])} photos, but {len(masks)} masks: two had one name"
        hidden = [path.name for path in files if path.name.startswith(".") and path.name in said]
        files = [path for path in files if path.name not in hidden]
        if len(report["images"]) + len(report["skipped"]) < len(files):
            return "miss", f"{len(files)} files, {len(report['images'])} photos, {len(report['skipped'])} skipped"
        if len(report["images"]) == len(files) and not code:
            return "harmless", ""
        return ("reported", said[-200:]) if report["skipped"] and code else ("miss", f"exit code {code}: {said[-200:]}")


_CSV = partial(SourceKind, write_folder, _create_folder)
_COCO = partial(SourceKind, write_coco, _create_coco)
_XML = partial(SourceKind, write_voc, _create_voc, touches_one=True)
SOURCES: dict[str, SourceKind | PredictKind] = {
    "labels.csv: bytes": _CSV(any_bytes),
    "labels.csv: a row less": _CSV(drop_row),
    "labels.csv: a row twice": _CSV(double_row),
    "labels.csv: other dialect": _CSV(other_dialect),
    "labels.csv: odd cell": _CSV(odd_cell),
    "COCO json: bytes": _COCO(any_bytes),
    "COCO json: remove a field": _COCO(remove_node),
    "COCO json: other type": _COCO(replace_node),
    "COCO json: shift a number": _COCO(shift_number),
    "COCO json: exchange entries": _COCO(exchange),
    "COCO json: odd shape": _COCO(odd_shape),
    "VOC XML: bytes": _XML(any_bytes),
    "VOC XML: odd": _XML(odd_xml),
    "predict: odd name": PredictKind(_odd_name),
    "predict: odd file": PredictKind(_odd_file),
}
