"""Masks in the formats of other tools, a class each; a format is found by its name.

A writer gets photo after photo and closes. What a format cannot hold is counted in `lost`, in words. Coordinates are
pixels from the photo's upper left corner; class i of the run is number i + 1 in masks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

import numpy as np
from numpy.typing import NDArray

from esol.base.errors import DataError
from esol.base.files import atomic_write
from esol.base.named import Named
from esol.base.palette import VOID
from esol.data.samples import encode_mask
from esol.ops.shapes import Shape, raster, shapes, simpler

SPECK = 16  # pixels: smaller parts are no objects of their own, and no outline says them well


@dataclass(frozen=True)
class Masked:
    """A photo with its mask uint8 (H, W): 0 background, 1 + i for class i, 255 void; split: train, val, ..."""

    key: str
    file: str
    photo: bytes
    mask: NDArray[np.uint8]
    split: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.mask.shape[0], self.mask.shape[1]

    def parts(self) -> list[tuple[int, Shape]]:
        """Class numbers from 1 and the parts of the mask, exact; void belongs to none."""
        numbers = [n for n in np.unique(self.mask).tolist() if 0 < n < VOID]
        return [(number, shape) for number in numbers for shape in shapes(self.mask == number)]

    def objects(self) -> list[tuple[int, NDArray[np.bool_]]]:
        """Class numbers and parts (H, W), which together are the mask exactly: specks belong to the largest part."""
        found: list[tuple[int, NDArray[np.bool_]]] = []
        parts = self.parts()
        for number in dict.fromkeys(number for number, _ in parts):
            own = sorted((shape for n, shape in parts if n == number), key=lambda shape: -shape.area)
            large = [raster([shape], self.size) for shape in own if shape.area >= SPECK]
            whole = self.mask == number
            first = whole & ~np.any(large[1:], 0) if len(large) > 1 else whole
            found += [(number, one) for one in (first, *large[1:])]
        return found


class Writer:
    """A format. summary: what its help says."""

    summary = ""

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        self.out, self.classes = out, tuple(classes)
        self.lost: Counter[str] = Counter()

    def add(self, one: Masked) -> None:
        """Writes a photo."""
        raise NotImplementedError

    def close(self) -> None:
        """Writes what stands once for all photos."""

    def save(self, place: str, data: bytes | str) -> None:
        """A file below the folder."""
        path = self.out / place
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)

    def outlined(self, one: Masked) -> list[tuple[int, Shape]]:
        """The parts of a photo's mask in few corners, without specks, which are counted."""
        found = []
        for number, shape in one.parts():
            if shape.area < SPECK:
                self.lost[f"parts of less than {SPECK} pixels"] += 1
            else:
                found.append((number, simpler(shape, one.size)))
        if (one.mask == VOID).any():
            self.lost["photos whose void pixels became background"] += 1
        return found


FORMATS: Named[type[Writer]] = Named("format of masks")


@FORMATS.add("png")
class Png(Writer):
    """Masks alone."""

    summary = "masks/KEY.png in VOC's colours and classes.txt"

    def add(self, one: Masked) -> None:
        self.save(f"masks/{one.key}.png", encode_mask(one.mask))

    def close(self) -> None:
        self.save("classes.txt", "".join(f"{name}\n" for name in self.classes))


@FORMATS.add("voc")
class Voc(Writer):
    """PASCAL VOC's tree, which create folder reads again."""

    summary = "PASCAL VOC's tree: JPEGImages, SegmentationClass, Annotations, ImageSets"

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        super().__init__(out, classes)
        self._lists: dict[str, list[str]] = {}

    def add(self, one: Masked) -> None:
        self.save(f"JPEGImages/{one.file}", one.photo)
        self.save(f"SegmentationClass/{one.key}.png", encode_mask(one.mask))
        root = Element("annotation")
        _texts(root, filename=one.file, segmented="1")
        height, width = one.size
        _texts(SubElement(root, "size"), width=width, height=height, depth=3)
        for number, drawn in one.objects():
            item = SubElement(root, "object")
            _texts(item, name=self.classes[number - 1], difficult="0")
            x, y, w, h = box(drawn)
            _texts(SubElement(item, "bndbox"), xmin=x + 1, ymin=y + 1, xmax=x + w, ymax=y + h)
        _save_xml(self, f"Annotations/{one.key}.xml", root)
        self._lists.setdefault(one.split, []).append(one.key)

    def close(self) -> None:
        for split, keys in self._lists.items():
            self.save(f"ImageSets/Segmentation/{split}.txt", "".join(f"{key}\n" for key in keys))
        self.save("classes.txt", "".join(f"{name}\n" for name in self.classes))


@FORMATS.add("coco")
class Coco(Writer):
    """COCO's instances, exact: run lengths, which hold holes."""

    summary = "COCO instances as run lengths, exact: images/ and annotations/instances_SPLIT.json"

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        super().__init__(out, classes)
        self._trees: dict[str, dict[str, list[Any]]] = {}
        self._parts = self._photos = 0

    def add(self, one: Masked) -> None:
        height, width = one.size
        self._photos += 1
        tree = self._trees.setdefault(one.split, {"images": [], "annotations": []})
        tree["images"].append({"id": self._photos, "file_name": one.file, "height": height, "width": width})
        for number, drawn in one.objects():
            self._parts += 1
            counts = run_lengths(drawn.T.ravel())
            tree["annotations"].append(
                {
                    "id": self._parts, "image_id": self._photos, "category_id": number, "iscrowd": 0,
                    "area": int(drawn.sum()), "bbox": list(box(drawn)),
                    "segmentation": {"size": [height, width], "counts": counts},
                }
            )  # fmt: skip
        if (one.mask == VOID).any():
            self.lost["photos whose void pixels became background"] += 1
        self.save(f"images/{one.file}", one.photo)

    def close(self) -> None:
        categories = [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(self.classes, 1)]
        for split, tree in self._trees.items():
            text = json.dumps(tree | {"categories": categories}, ensure_ascii=False)
            self.save(f"annotations/instances_{split}.json", text)


@FORMATS.add("yolo")
class Yolo(Writer):
    """Polygons as YOLO's segmentation reads them; a hole is reached by a cut of no width."""

    summary = "YOLO's polygons: images/SPLIT, labels/SPLIT/KEY.txt, data.yaml"

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        super().__init__(out, classes)
        self._splits: set[str] = set()

    def add(self, one: Masked) -> None:
        height, width = one.size
        lines = []
        for number, shape in self.outlined(one):
            ring = shape.one_ring() / (width, height)
            lines.append(f"{number - 1} " + " ".join(f"{value:.6f}" for value in ring.ravel().tolist()))
        self.save(f"labels/{one.split}/{one.key}.txt", "".join(f"{line}\n" for line in lines))
        self.save(f"images/{one.split}/{one.key}{Path(one.file).suffix}", one.photo)
        self._splits.add(one.split)

    def close(self) -> None:
        self.save("data.yaml", data_yaml(self.classes, self._splits, {}))


@FORMATS.add("ultralytics")
class Ultralytics(Writer):
    """Index masks as Ultralytics' semantic task reads them."""

    summary = "Ultralytics' semantic masks: images/SPLIT, masks/SPLIT/KEY.png, data.yaml"

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        super().__init__(out, classes)
        self._splits: set[str] = set()

    def add(self, one: Masked) -> None:
        self.save(f"masks/{one.split}/{one.key}.png", encode_mask(one.mask))
        self.save(f"images/{one.split}/{one.key}{Path(one.file).suffix}", one.photo)
        self._splits.add(one.split)

    def close(self) -> None:
        self.save("data.yaml", data_yaml(("background", *self.classes), self._splits, {"masks_dir": "masks"}))


@FORMATS.add("labelme")
class Labelme(Writer):
    """A JSON beside each photo."""

    summary = "labelme: KEY.json beside the photo"

    def add(self, one: Masked) -> None:
        height, width = one.size
        drawn: list[Any] = [
            {
                "label": self.classes[number - 1], "points": shape.one_ring().tolist(), "group_id": None,
                "description": "", "shape_type": "polygon", "flags": {}, "mask": None,
            }
            for number, shape in self.outlined(one)
        ]  # fmt: skip
        about: dict[str, Any] = {
            "version": "5.5.0",
            "flags": {},
            "shapes": drawn,
            "imagePath": one.file,
            "imageData": None,
        }
        tree = about | {"imageHeight": height, "imageWidth": width}
        self.save(f"{one.key}.json", json.dumps(tree, ensure_ascii=False, indent=1))
        self.save(one.file, one.photo)


@FORMATS.add("labelstudio")
class LabelStudio(Writer):
    """One file of tasks with predictions, which people then correct."""

    summary = "Label Studio: tasks.json with polygons as predictions, its labelling config, images/"

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        super().__init__(out, classes)
        self._tasks: list[dict[str, Any]] = []

    def add(self, one: Masked) -> None:
        height, width = one.size
        result = [
            {
                "id": f"{one.key}-{place}", "type": "polygonlabels", "from_name": "label", "to_name": "image",
                "original_width": width, "original_height": height, "image_rotation": 0,
                "value": {
                    "points": (shape.one_ring() / (width, height) * 100).round(4).tolist(),
                    "polygonlabels": [self.classes[number - 1]], "closed": True,
                },
            }
            for place, (number, shape) in enumerate(self.outlined(one))
        ]  # fmt: skip
        data = {"image": f"/data/local-files/?d=images/{one.file}"}
        self._tasks.append({"data": data, "predictions": [{"model_version": "esol", "result": result}]})
        self.save(f"images/{one.file}", one.photo)

    def close(self) -> None:
        self.save("tasks.json", json.dumps(self._tasks, ensure_ascii=False, indent=1))
        view = Element("View")
        SubElement(view, "Image", name="image", value="$image")
        labels = SubElement(view, "PolygonLabels", name="label", toName="image")
        for name in self.classes:
            SubElement(labels, "Label", value=name)
        _save_xml(self, "labels.xml", view)


@FORMATS.add("cvat")
class Cvat(Writer):
    """CVAT for images 1.1, exact: masks as run lengths in their boxes."""

    summary = "CVAT for images 1.1 with exact masks: annotations.xml, images/"

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        super().__init__(out, classes)
        self._root = Element("annotations")
        _texts(self._root, version="1.1")
        labels = SubElement(SubElement(SubElement(self._root, "meta"), "task"), "labels")
        for name in self.classes:
            _texts(SubElement(labels, "label"), name=name, type="mask")
        self._count = 0

    def add(self, one: Masked) -> None:
        height, width = one.size
        about = {"id": str(self._count), "name": one.file, "width": str(width), "height": str(height)}
        image = SubElement(self._root, "image", about)
        self._count += 1
        for number, drawn in one.objects():
            left, top, w, h = box(drawn)
            where = {"left": str(left), "top": str(top), "width": str(w), "height": str(h)}
            rle = ", ".join(map(str, run_lengths(drawn[top : top + h, left : left + w].ravel())))
            own = {"label": self.classes[number - 1], "source": "auto", "occluded": "0", "z_order": "0"}
            SubElement(image, "mask", own | where | {"rle": rle})
        if (one.mask == VOID).any():
            self.lost["photos whose void pixels became background"] += 1
        self.save(f"images/{one.file}", one.photo)

    def close(self) -> None:
        _save_xml(self, "annotations.xml", self._root)


def box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """x, y, width, height of what a mask covers."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


def run_lengths(flat: NDArray[np.bool_]) -> list[int]:
    """Lengths of the runs of a flat mask, the first of them of what is not in it."""
    changes = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    lengths = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *lengths] if flat.size and flat[0] else lengths


def data_yaml(names: Sequence[str], splits: set[str], more: dict[str, str]) -> str:
    """Ultralytics' data.yaml; val is train where there is no split to look at."""
    first = "train" if "train" in splits else min(splits, default="train")
    lines = ["path: .", f"train: images/{first}", f"val: images/{'val' if 'val' in splits else first}"]
    lines += [f"test: images/{name}" for name in sorted(splits - {"train", "val"}) if name == "test"]
    lines += [f"{key}: {value}" for key, value in more.items()]
    lines += ["names:", *(f"  {i}: {json.dumps(name, ensure_ascii=False)}" for i, name in enumerate(names))]
    return "\n".join(lines) + "\n"


def _texts(parent: Element, **values: object) -> None:
    for name, value in values.items():
        SubElement(parent, name).text = f"{value:g}" if isinstance(value, float) else str(value)


def _save_xml(writer: Writer, place: str, root: Element) -> None:
    indent(root)
    path = writer.out / place
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def known_format(name: str) -> type[Writer]:
    """The writer of a name; DataError, which lists them, for another."""
    if name not in FORMATS:
        raise DataError(f"--to {name}: the formats are {', '.join(FORMATS)}")
    return FORMATS[name]
