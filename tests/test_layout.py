"""How people's photos lie: folders by class, tables of any dialect, VOC and COCO."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esol.base.errors import DataError
from shards import cli
from shards.folder import folder_source
from shards.recognise import any_source
from shards.samples import Source


def lay(root: Path, *names: str) -> Path:
    """Small photos of these names, each another."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


def shown(source: Source) -> dict[str, list[str]]:
    """Photo -> its labels."""
    keys = sorted(key for keys in source.splits.values() for key in keys)
    return {key: json.loads(source.read(key)["json"])["labels"] for key in keys}


def test_a_folder_is_a_class_and_some_names_say_that_there_is_none(tmp_path: Path) -> None:
    root = lay(tmp_path, "cat/1.jpg", "cat/more/2.jpg", "Dog/1.png", "Good/1.jpg", "sky/1.jpg")
    (root / "cat/Thumbs.db").write_bytes(b"x")
    source = folder_source(str(root), negative=["sky"])
    assert source.classes == ("Dog", "cat")
    assert shown(source) == {"Dog_1": ["Dog"], "Good_1": [], "cat_1": ["cat"], "cat_more_2": ["cat"], "sky_1": []}
    assert "photos labelled Good, sky show none of the classes" in source.notes
    (root / "classes.txt").write_text("cat\nGood\ndog\nsky\n")  # said to be classes, so they are
    assert folder_source(str(root)).classes == ("cat", "Good", "dog", "sky")


def test_folders_of_splits_stand_above_those_of_classes_and_masks_beside(tmp_path: Path) -> None:
    root = lay(tmp_path, "images/train/cat/1.jpg", "images/train/none/1.jpg", "images/valid/cat/2.jpg")
    (root / "masks/train/cat").mkdir(parents=True)
    Image.fromarray(np.full((12, 16), 255, np.uint8)).save(root / "masks/train/cat/1.png")
    source = folder_source(str(root))
    assert source.splits == {"train": ["train_cat_1", "train_none_1"], "val": ["valid_cat_2"]}
    assert np.unique(Image.open(io.BytesIO(source.read("train_cat_1")["mask.png"]))).tolist() == [1]


@pytest.mark.parametrize(
    ("names", "negative", "words"),
    [
        (["1.jpg", "cat/1.jpg"], [], r"1 photos lie in no folder of a class.*\n  1\.jpg"),
        (["cat/1.jpg", "cats/1.jpg"], [], "'cat' and 'cats' look like one class"),
        (["good/1.jpg"], [], "names no class: no photo has a label"),
        (["cat/1.jpg"], ["sky"], "--negatives sky: no photo is labelled so; the labels are cat"),
    ],
)
def test_folders_that_say_too_little_are_refused(
    tmp_path: Path, names: list[str], negative: list[str], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        folder_source(str(lay(tmp_path, *names)), negative=negative)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no photo, neither in folders by class nor in images/"):
        folder_source(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    "table",
    [
        "filename;label\na.jpg;cat|dog\nb.jpg;dog\nc.jpg;none\n",
        "file_name\ttags\na\tcat, dog\nb\tdog\nc\t\n",
        "a.jpg,cat;dog\nb.jpg,dog\nc.jpg,\n",
        "id,image,width,class\n7,a.jpg,16,cat;dog\n8,b.jpg,16,dog\n9,c.jpg,16,\n",
        "image,cat,dog,background\na.jpg,1,1,0\nb.jpg,0,1,0\nc.jpg,0,0,1\n",
        "path|dog|cat\nc.jpg|no|False\nb.jpg|yes|\na.jpg|x|TRUE\n",
        "photo,animal\na.jpg,cat;dog\nb.jpg,dog\nc.jpg,good\n",
    ],
)
def test_tables_of_any_dialect(tmp_path: Path, table: str) -> None:
    root = lay(tmp_path, "images/a.jpg", "images/b.jpg", "images/c.jpg")
    (root / "mine.csv").write_text(table)
    (root / "notes.txt").write_text("taken in June\n")
    source = folder_source(str(root))
    assert {key: set(own) for key, own in shown(source).items()} == {"a": {"cat", "dog"}, "b": {"dog"}, "c": set()}
    assert any("not read: id, width" in note for note in source.notes) == ("width" in table)


def test_one_class_with_marks_and_a_table_elsewhere(tmp_path: Path) -> None:
    root = lay(tmp_path / "photos", "a.jpg", "b.jpg")
    (tmp_path / "crack.csv").write_text("image,crack\na.jpg,1\nb.jpg,0\n")
    assert shown(folder_source(str(root), table=str(tmp_path / "crack.csv"))) == {"a": ["crack"], "b": []}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("image,cat,dog\na.jpg,1,3\n", r"line 2: column 'dog' holds '3'\. A table has a column for labels"),
        ("image,labels\na.jpg,cat;good\n", "line 2: labels cat; good: 'good' says that there is no object"),
        ("image,labels\na.jpg,good\n", "names no class: no photo has a label"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(tmp_path: Path, table: str, words: str) -> None:
    root = lay(tmp_path, "images/a.jpg")
    (root / "labels.csv").write_text(table)
    with pytest.raises(DataError, match=words):
        folder_source(str(root))
    for name in ("one.csv", "two.tsv"):
        (root / name).write_text("image\tlabels\na.jpg\tcat\n")
    (root / "labels.csv").unlink()
    with pytest.raises(DataError, match=r"several tables of labels, one\.csv, two\.tsv: say which with --labels"):
        folder_source(str(root))


def test_voc_and_coco_are_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voc = lay(tmp_path / "voc", "VOCdevkit/VOC2012/JPEGImages/1.jpg", "VOCdevkit/VOC2012/JPEGImages/2.jpg")
    tree = voc / "VOCdevkit/VOC2012"
    for folder in ("Annotations", "ImageSets/Main"):
        (tree / folder).mkdir(parents=True)
    for id, name in (("1", "sheep"), ("2", "cat")):
        xml = f"<annotation><object><name>{name}</name></object></annotation>"
        (tree / f"Annotations/{id}.xml").write_text(xml)
    (tree / "ImageSets/Main/train.txt").write_text("1\n2\n")
    source = any_source(str(voc))
    assert source.classes == ("cat", "sheep")
    assert shown(source) == {"1": ["sheep"], "2": ["cat"]}
    assert "is laid out as PASCAL VOC: labels from Annotations, masks from nowhere" in source.notes[0]

    coco = lay(tmp_path / "coco", "train2017/1.jpg", "val2017/2.jpg")
    for split, number in (("train", 1), ("val", 2)):
        about = {
            "images": [{"id": number, "file_name": f"{number}.jpg", "height": 12, "width": 16}],
            "categories": [{"id": 5, "name": "cup"}],
            "annotations": [
                {"id": 1, "image_id": number, "category_id": 5, "segmentation": [[2, 2, 9, 2, 9, 9]], "iscrowd": 0}
            ],
        }
        (coco / "annotations").mkdir(exist_ok=True)
        (coco / f"annotations/instances_{split}2017.json").write_text(json.dumps(about))
        (coco / f"annotations/captions_{split}2017.json").write_text('{"annotations": []}')
    assert cli.main(["create", "folder", str(coco), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "is laid out as COCO: annotations/instances_train2017.json, annotations/instances_val2017.json" in said
    assert "  train: 1 images, 1 with mask\n  val: 1 images, 1 with mask" in said
