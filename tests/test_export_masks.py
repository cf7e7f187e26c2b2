"""Masks in other tools' formats, read back by the formats' own libraries or as their documents say."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from esol import cli
from esol.deploy.export_masks import export_masks
from esol.deploy.mask_formats import FORMATS
from esol.deploy.masked import Masked, run_lengths
from shards.recognise import any_source
from shards.samples import Source

sys.path.insert(0, str(Path(__file__).parent / "page"))
from fake_run import CLASSES, fake_run

SIZE = (120, 160)


def drawn() -> np.ndarray:
    """A disc with a hole, a star with thin arms, two parts of one class, specks, void along an edge."""
    canvas = Image.new("L", (SIZE[1], SIZE[0]), 0)
    pen = ImageDraw.Draw(canvas)
    pen.ellipse((8, 8, 70, 70), fill=1)
    pen.ellipse((28, 30, 46, 50), fill=0)
    pen.polygon([(120, 5), (128, 40), (158, 45), (130, 60), (140, 95), (118, 70), (92, 90), (108, 55)], fill=2)
    pen.rectangle((10, 85, 60, 110), fill=2)
    mask = np.array(canvas)
    mask[100, 150] = mask[115, 100] = 1
    mask[72:75, 20:60] = 255
    return mask


def write(tmp_path: Path, kind: str) -> tuple[Path, np.ndarray, dict[str, int]]:
    mask, photo = drawn(), tmp_path / "photo.jpg"
    Image.new("RGB", (SIZE[1], SIZE[0]), "gray").save(photo)
    writer = FORMATS[kind](tmp_path / kind, CLASSES)
    for key, split in (("one", "train"), ("two", "val")):
        writer.add(Masked(key, f"{key}.jpg", photo.read_bytes(), mask, split))
    writer.close()
    return tmp_path / kind, mask, writer.lost


def rings(points: list[list[float]]) -> np.ndarray:
    """What a polygon covers, by another drawer than ours: four times as fine, by the pixels' centres."""
    canvas = Image.new("1", (4 * SIZE[1], 4 * SIZE[0]), 0)
    ImageDraw.Draw(canvas).polygon([(4 * x, 4 * y) for x, y in points], fill=1)
    return np.asarray(canvas)[2::4, 2::4]


def overlap(found: np.ndarray, mask: np.ndarray) -> float:
    return float((found & mask).sum() / (found | mask).sum())


def by_class(shown: list[tuple[int, list[list[float]]]], number: int) -> np.ndarray:
    return np.any([rings(points) for n, points in shown if n == number], 0)


def test_png_and_voc_are_exact_and_voc_is_read_again(tmp_path: Path) -> None:
    folder, mask, _ = write(tmp_path, "png")
    assert np.array_equal(np.asarray(Image.open(folder / "masks/one.png")), mask)
    assert (folder / "classes.txt").read_text().splitlines() == list(CLASSES)
    folder, mask, _ = write(tmp_path, "voc")
    assert np.array_equal(np.asarray(Image.open(folder / "SegmentationClass/two.png")), mask)
    assert (folder / "ImageSets/Segmentation/val.txt").read_text() == "two\n"
    tree = ElementTree.parse(folder / "Annotations/one.xml")
    boxes = [[int(o.find("bndbox").find(side).text) for side in ("xmin", "ymin")] for o in tree.iter("object")]
    assert [o.find("name").text for o in tree.iter("object")] == [CLASSES[0], CLASSES[1], CLASSES[1]]
    assert [10 + 1, 85 + 1] in boxes


def test_coco_is_exact_by_its_own_library(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    folder, mask, lost = write(tmp_path, "coco")
    own = coco.COCO(str(folder / "annotations/instances_train.json"))
    (image,) = own.loadImgs(own.getImgIds())
    assert (folder / "images" / image["file_name"]).exists()
    found = np.zeros(SIZE, np.uint8)
    annotations = own.loadAnns(own.getAnnIds())
    for one in annotations:
        part = own.annToMask(one)
        assert part.sum() == one["area"]
        found[part > 0] = one["category_id"]
    assert np.array_equal(found, np.where(mask == 255, 0, mask))
    assert len(annotations) == 3  # specks belong to the class's largest part
    assert [one["name"] for one in own.loadCats(own.getCatIds())] == list(CLASSES)
    assert lost == {"photos whose void pixels became background": 2}
    source: Source = any_source(str(folder))
    assert source.classes == CLASSES


def test_polygons_keep_nearly_all_of_large_parts_and_holes(tmp_path: Path) -> None:
    folder, mask, lost = write(tmp_path, "yolo")
    about = yaml.safe_load((folder / "data.yaml").read_text())
    assert about["names"] == dict(enumerate(CLASSES))
    assert (about["train"], about["val"]) == ("images/train", "images/val")
    assert (folder / "images/val/two.jpg").exists()
    shown = []
    for line in (folder / "labels/train/one.txt").read_text().splitlines():
        number, *values = line.split()
        assert all(0 <= float(value) <= 1 for value in values)
        points = (np.array(values, float).reshape(-1, 2) * (SIZE[1], SIZE[0])).tolist()
        shown.append((int(number) + 1, points))
    for number in (1, 2):
        assert overlap(by_class(shown, number), mask == number) >= 0.97  # by another drawer, which rounds otherwise
    assert lost["parts of less than 16 pixels"] == 4

    folder, mask, _ = write(tmp_path, "labelme")
    tree = json.loads((folder / "one.json").read_text())
    assert (tree["imageHeight"], tree["imageWidth"], tree["imagePath"]) == (*SIZE, "one.jpg")
    shown = [(CLASSES.index(one["label"]) + 1, one["points"]) for one in tree["shapes"]]
    assert overlap(by_class(shown, 1), mask == 1) >= 0.97

    folder, mask, _ = write(tmp_path, "labelstudio")
    (first, _) = json.loads((folder / "tasks.json").read_text())
    shown = []
    for one in first["predictions"][0]["result"]:
        assert (one["type"], one["from_name"], one["to_name"]) == ("polygonlabels", "label", "image")
        points = (np.array(one["value"]["points"]) / 100 * (SIZE[1], SIZE[0])).tolist()
        shown.append((CLASSES.index(one["value"]["polygonlabels"][0]) + 1, points))
    assert overlap(by_class(shown, 2), mask == 2) >= 0.97
    labels = ElementTree.parse(folder / "labels.xml").getroot()
    assert [one.get("value") for one in labels.iter("Label")] == list(CLASSES)


def test_cvat_is_exact(tmp_path: Path) -> None:
    folder, mask, _ = write(tmp_path, "cvat")
    root = ElementTree.parse(folder / "annotations.xml").getroot()
    assert root.find("version").text == "1.1"
    found = np.zeros(SIZE, np.uint8)
    for one in root.find("image").iter("mask"):
        left, top, width, height = (int(one.get(side)) for side in ("left", "top", "width", "height"))
        lengths = [int(text) for text in one.get("rle").split(",")]
        part = np.repeat(np.arange(len(lengths)) % 2, lengths).reshape(height, width).astype(bool)
        found[top : top + height, left : left + width][part] = CLASSES.index(one.get("label")) + 1
    assert np.array_equal(found, np.where(mask == 255, 0, mask))


def test_ultralytics_masks_are_split_folders(tmp_path: Path) -> None:
    folder, mask, _ = write(tmp_path, "ultralytics")
    about = yaml.safe_load((folder / "data.yaml").read_text())
    assert about["names"] == dict(enumerate(("background", *CLASSES)))
    assert np.array_equal(np.asarray(Image.open(folder / "masks/val/two.png")), mask)


def test_run_lengths_begin_with_what_is_outside() -> None:
    assert run_lengths(np.array([True, True, False, True])) == [0, 2, 1, 1]
    assert run_lengths(np.array([False, True])) == [1, 1]
    assert run_lengths(np.zeros(3, bool)) == [3]


def test_a_runs_masks_are_exported_and_mistakes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = fake_run(tmp_path, 6)
    lines = export_masks(run, "png", tmp_path / "png")
    assert lines == [f"{tmp_path / 'png'}: 6 photos with the masks of psa_masks, as png"]
    assert len(list((tmp_path / "png/masks").iterdir())) == 6
    for arguments, words in (
        (["--to", "png", "--out", str(tmp_path / "png")], "choose a new or an empty folder"),
        (["--to", "pgn"], "--to pgn: the formats are png, voc, coco"),
        (["--to", "png", "--stage", "irn_masks"], "has no masks of irn_masks; it has: seed_masks, psa_masks"),
        (["--to", "png", "--split", "val"], "has no split 'val'"),
    ):
        monkeypatch.setattr(sys, "argv", ["esol", "export-masks", str(run), *arguments])
        assert cli.main() == 2
        assert words in capsys.readouterr().err
