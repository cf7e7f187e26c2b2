"""Masks in the formats of other tools, a class each; a format is found by its name.

A writer gets photo after photo and closes. What a format cannot hold is counted in `lost`, in words. Coordinates are
pixels from the photo's upper left corner; class i of the run is number i + 1 in masks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, SubElement

from esol.base.named import Named
from esol.data.samples import encode_mask
from esol.deploy.masked import Masked, Writer, box, run_lengths

FORMATS: Named[type[Writer]] = Named("format of masks")


@FORMATS.add("png")
class Png(Writer):
    """Masks alone."""

    def add(self, one: Masked) -> None:
        self.save(f"masks/{one.key}.png", encode_mask(one.mask))

    def close(self) -> None:
        self.save("classes.txt", "".join(f"{name}\n" for name in self.classes))


@FORMATS.add("voc")
class Voc(Writer):
    """PASCAL VOC's tree, which create folder reads again."""

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
        self.save_xml(f"Annotations/{one.key}.xml", root)
        self._lists.setdefault(one.split, []).append(one.key)

    def close(self) -> None:
        for split, keys in self._lists.items():
            self.save(f"ImageSets/Segmentation/{split}.txt", "".join(f"{key}\n" for key in keys))
        self.save("classes.txt", "".join(f"{name}\n" for name in self.classes))


@FORMATS.add("coco")
class Coco(Writer):
    """COCO's instances, exact: run lengths, which hold holes."""

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
        self.lose_void(one)
        self.save(f"images/{one.file}", one.photo)

    def close(self) -> None:
        categories = [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(self.classes, 1)]
        for split, tree in self._trees.items():
            text = json.dumps(tree | {"categories": categories}, ensure_ascii=False)
            self.save(f"annotations/instances_{split}.json", text)


class _SplitFolders(Writer):
    """Ultralytics' layout: images/SPLIT, something beside it, and data.yaml."""

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        super().__init__(out, classes)
        self._splits: set[str] = set()

    def save_photo(self, one: Masked) -> None:
        """The photo, in the folder of its split."""
        self.save(f"images/{one.split}/{one.file}", one.photo)
        self._splits.add(one.split)

    def save_yaml(self, names: Sequence[str], **more: str) -> None:
        """data.yaml; val is train where there is no split to look at."""
        first = "train" if "train" in self._splits else min(self._splits, default="train")
        lines = [f"train: images/{first}", f"val: images/{'val' if 'val' in self._splits else first}"]
        lines += ["test: images/test"] if "test" in self._splits else []
        lines += [f"{key}: {value}" for key, value in more.items()]
        lines += ["names:", *(f"  {i}: {json.dumps(name, ensure_ascii=False)}" for i, name in enumerate(names))]
        self.save("data.yaml", "\n".join(lines) + "\n")


@FORMATS.add("yolo")
class Yolo(_SplitFolders):
    """Polygons as YOLO's segmentation reads them; a hole is reached by a cut of no width."""

    def add(self, one: Masked) -> None:
        height, width = one.size
        lines = []
        for number, shape in self.outlined(one):
            ring = shape.one_ring() / (width, height)
            lines.append(f"{number - 1} " + " ".join(f"{value:.6f}" for value in ring.ravel().tolist()))
        self.save(f"labels/{one.split}/{one.key}.txt", "".join(f"{line}\n" for line in lines))
        self.save_photo(one)

    def close(self) -> None:
        self.save_yaml(self.classes)


@FORMATS.add("ultralytics")
class Ultralytics(_SplitFolders):
    """Index masks as Ultralytics' semantic task reads them."""

    def add(self, one: Masked) -> None:
        self.save(f"masks/{one.split}/{one.key}.png", encode_mask(one.mask))
        self.save_photo(one)

    def close(self) -> None:
        self.save_yaml(("background", *self.classes), masks_dir="masks")


@FORMATS.add("labelme")
class Labelme(Writer):
    """A JSON beside each photo."""

    def add(self, one: Masked) -> None:
        height, width = one.size
        drawn: list[Any] = [
            {
                "label": self.classes[number - 1], "points": shape.one_ring().tolist(), "group_id": None,
                "description": "", "shape_type": "polygon", "flags": {}, "mask": None,
            }
            for number, shape in self.outlined(one)
        ]  # fmt: skip
        tree: dict[str, Any] = {
            "version": "5.5.0",
            "flags": {},
            "shapes": drawn,
            "imagePath": one.file,
            "imageData": None,
        }
        tree |= {"imageHeight": height, "imageWidth": width}
        self.save(f"{one.key}.json", json.dumps(tree, ensure_ascii=False, indent=1))
        self.save(one.file, one.photo)


@FORMATS.add("labelstudio")
class LabelStudio(Writer):
    """One file of tasks with predictions, which people then correct."""

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
        self.save_xml("labels.xml", view, declared=False)  # it is pasted as text, which must not declare its bytes


@FORMATS.add("cvat")
class Cvat(Writer):
    """CVAT for images 1.1, exact: masks as run lengths in their boxes."""

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
        self.lose_void(one)
        self.save(f"images/{one.file}", one.photo)

    def close(self) -> None:
        self.save_xml("annotations.xml", self._root)


def _texts(parent: Element, **values: object) -> None:
    for name, value in values.items():
        SubElement(parent, name).text = f"{value:g}" if isinstance(value, float) else str(value)
