"""COCO files as COCO and annotation tools write them, on tiny trees made here."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esol.base.errors import DataError
from esol.data.index import Index
from shards import cli
from shards.coco import coco_source
from shards.samples import Source
from tests.test_shards_sources import elsewhere, labels_of, mask_of, save_photo

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # inside pycocotools


def polygon(x0: int, y0: int, x1: int, y1: int) -> list[list[int]]:
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """a: cat under a later dog and a dog crowd; b: only a crowd; c: nothing. Category ids 3 and 7."""
    for name in ("a", "b", "c"):
        save_photo(tmp_path / f"photos/{name}.jpg")
    crowd = {"size": [10, 20], "counts": [100, 100]}
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 3, "iscrowd": 0, "segmentation": polygon(0, 0, 10, 10)},
        {"id": 2, "image_id": 1, "category_id": 7, "iscrowd": 1, "segmentation": crowd},
        {"id": 3, "image_id": 1, "category_id": 7, "iscrowd": 0, "segmentation": polygon(5, 0, 12, 10)},
        {"id": 4, "image_id": 2, "category_id": 3, "iscrowd": 1, "segmentation": crowd},
    ]
    tree = {
        "images": [{"id": i, "file_name": f"{n}.jpg", "height": 10, "width": 20} for i, n in enumerate("abc", 1)],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    (tmp_path / "i.json").write_text(json.dumps(tree))
    return tmp_path


def coco_of(root: Path, **more: bool) -> Source:
    return coco_source([f"{root}/photos"], [f"{root}/i.json"], ["train"], **more)


def test_coco_masks_leave_crowds_out_and_later_annotations_win(coco: Path) -> None:
    source = coco_of(coco)
    assert source.classes == ("cat", "dog")
    sample = elsewhere(source, "a")
    assert labels_of(sample) == ["cat", "dog"]
    assert mask_of(sample)[4].tolist() == [1] * 5 + [2] * 7 + [0] * 8


def test_both_coco_lists(coco: Path) -> None:
    assert coco_of(coco).splits == {"train": ["a"]}
    everything = coco_of(coco, keep_unannotated=True)
    assert everything.splits == {"train": ["a", "b", "c"]}
    assert labels_of(everything.read("b")) == []
    assert not mask_of(everything.read("b")).any()


def test_coco_command_makes_a_split_of_each_file(coco: Path) -> None:
    tree = json.loads((coco / "i.json").read_text())
    tree["images"] = [{**i, "file_name": f"val_{i['file_name']}"} for i in tree["images"]]
    (coco / "v.json").write_text(json.dumps(tree))
    save_photo(coco / "others/val_a.jpg")
    words = ["--images", f"{coco}/photos", "--annotations", f"{coco}/i.json", "--split", "train"]
    words += ["--images", f"{coco}/others", "--annotations", f"{coco}/v.json", "--split", "val"]
    assert cli.main(["create", "coco", *words, "--out", f"{coco}/out"]) == 0
    index = Index.load(f"{coco}/out")
    assert {n: index.keys[o].tolist() for n, o in index.splits.items()} == {"train": ["a"], "val": ["val_a"]}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop("categories"), r"i\.json"),
        (
            lambda t: t["images"][0].update(height=12),
            r"i\.json: image 1 is 20x12 pixels, but its photo .*a\.jpg is 20x10",
        ),
        (lambda t: t["annotations"][0].update(category_id=99), r"annotation 1 has unknown category 99"),
        (lambda t: t["annotations"][0].update(segmentation=[[1, 2]]), "annotation 1: bad segmentation"),
        (lambda t: t["images"][0].update(file_name="z.jpg"), r"z\.jpg is missing"),
        (lambda t: t["images"].append(t["images"][0]), "image id 1 is given twice, for a.jpg and for a.jpg"),
    ],
)
def test_bad_coco_entries_are_named(coco: Path, edit: Callable, words: str) -> None:
    tree = json.loads((coco / "i.json").read_text())
    edit(tree)
    (coco / "i.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match=words):
        (lambda source: source.read(source.splits["train"][0]))(coco_of(coco))


def image(number: Any, name: str, **more: Any) -> dict[str, Any]:
    return {"id": number, "file_name": name, "height": 10, "width": 20, **more}


def drawn(of: Any, category: Any, shape: Any = polygon(0, 0, 5, 10), **more: Any) -> dict[str, Any]:  # noqa: B008
    return {"id": 1, "image_id": of, "category_id": category, "iscrowd": 0, "segmentation": shape, **more}


CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


def source_of(
    root: Path,
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    categories: list[dict[str, Any]] = CATEGORIES,
    files: tuple[str, ...] = ("a.jpg", "b.jpg"),
) -> Source:
    for name in files:
        save_photo(root / "photos" / name)
    (root / "i.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return coco_of(root)


AB = [image(1, "a.jpg"), image(2, "b.jpg")]


@pytest.mark.parametrize("shape", [[], [[]], [[], []], {}, None, "missing"])
def test_boxes_without_shapes_give_labels_and_no_mask(tmp_path: Path, shape: Any) -> None:
    boxes = drawn(1, 1, shape)
    if shape == "missing":
        del boxes["segmentation"]
    source = source_of(tmp_path, AB, [boxes, drawn(1, 2), drawn(2, 2)])
    first, second = map(source.read, source.splits["train"])
    assert labels_of(first) == ["cat", "dog"]
    assert "mask.png" not in first
    assert labels_of(second) == ["dog"]
    assert mask_of(second)[0].tolist() == [2] * 5 + [0] * 15
    assert [note.partition(": ")[2] for note in source.notes] == [
        "1 photos have no mask, since not all of their annotations have a shape"
    ]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        *(
            ([[x, 5, 20, 5, 20, 20]], r"lies far outside the photo of 20x10")
            for x in (float("nan"), 1e400, 1e9, -(10**400))
        ),
        *(([[x, 5, 20, 5, 20, 20]], "holds something that is no number") for x in (None, "1", True, [1, 2])),
        ([[1, 2, 3, 4]], "a polygon of 4 numbers; x, y of at least three points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 numbers"),
        ([1, 2, 3, 4, 5, 6], "polygons must be lists of x, y, x, y, ... in a list"),
        ([[0, 0] + [20, 10, 0, 0] * 200_000], "a polygon's outline of 8000000 pixels"),
        ("text", "neither polygons nor run lengths"),
        ({"size": [10, 20], "counts": [100, -100, 200]}, "counts must be run lengths"),
        ({"size": [10, 20], "counts": [10**12]}, "counts must be run lengths"),
        ({"size": [10, 20], "counts": [100]}, "counts cover 100 pixels of 200"),
        ({"size": [10, 20], "counts": "o" * 99}, "no compressed run lengths"),
        (
            {"size": [10**6, 10**6], "counts": [10**12]},
            r"run lengths of size \[1000000, 1000000\] for a photo of height 10",
        ),
    ],
)
def test_bad_shapes_are_named_before_pycocotools_sees_them(tmp_path: Path, shape: Any, words: str) -> None:
    source = source_of(tmp_path, AB, [drawn(1, 1, shape)])
    with pytest.raises(DataError, match=rf"i\.json: annotation 1: bad segmentation: .*{words}"):
        source.read("a")


def test_run_lengths_are_what_pycocotools_makes_of_them(tmp_path: Path) -> None:
    from pycocotools import mask as rle

    levels = np.asfortranarray(np.random.default_rng(0).random((10, 20)) < 0.3, dtype=np.uint8)
    coded = rle.encode(levels)["counts"].decode()
    edges = np.flatnonzero(np.diff(levels.T.ravel(), prepend=0, append=2))
    counts = np.diff(edges, prepend=0).tolist()
    for shape in ({"size": [10, 20], "counts": coded}, {"size": [10, 20], "counts": counts}):
        source = source_of(tmp_path, AB, [drawn(1, 2, shape)])
        assert np.array_equal(mask_of(source.read("a")), levels * 2)


def test_polygons_within_0_and_1_are_fractions_if_all_of_a_file_are(tmp_path: Path) -> None:
    half = [[0, 0, 0.5, 0, 0.5, 1, 0, 1]]
    source = source_of(tmp_path, AB, [drawn(1, 1, half), drawn(2, 2, half)])
    assert mask_of(source.read("a")).tolist() == [[1] * 10 + [0] * 10] * 10
    assert "2 polygons, all of them, lie within 0..1: fractions of the photos' sides" in source.notes[0]
    source = source_of(tmp_path, AB, [drawn(1, 1, half), drawn(2, 2)])
    assert "1 annotations lie within one pixel" in source.notes[0]


@pytest.mark.parametrize("size", [{"height": None, "width": None}, {"height": 0}, {"height": "10"}, {"width": 20.0}])
def test_sizes_may_be_left_open(tmp_path: Path, size: dict[str, Any]) -> None:
    assert mask_of(source_of(tmp_path, [image(1, "a.jpg", **size)], [drawn(1, 1)]).read("a")).shape == (10, 20)


def test_ids_are_numbers_however_they_are_written(tmp_path: Path) -> None:
    source = source_of(tmp_path, AB, [drawn("1", 1.0, iscrowd="0"), drawn(2.0, "2", iscrowd=False)])
    assert {key: labels_of(source.read(key)) for key in source.splits["train"]} == {"a": ["cat"], "b": ["dog"]}
    source = source_of(tmp_path, [image("u-1", "a.jpg")], [drawn("u-1", "c")], [{"id": "c", "name": "cat"}])
    assert labels_of(source.read("a")) == ["cat"]


@pytest.mark.parametrize(
    ("images", "annotations", "categories", "words"),
    [
        (
            [image(1, "a.jpg"), image("1", "b.jpg")],
            [],
            CATEGORIES,
            "image id 1 is given twice, for a.jpg and for b.jpg",
        ),
        (AB, [], [{"id": 1, "name": "cat"}, {"id": "1", "name": "dog"}], "category id 1 is given twice, for 'cat' and"),
        (AB, [], CATEGORIES, r"i\.json: no image has an annotation; --keep-unannotated takes them"),
        (AB, [drawn(7, 1)], CATEGORIES, "no annotation belongs to an image of the file"),
        (AB, [drawn(None, 1)], CATEGORIES, "annotation 1 has the image_id null; a number or text is expected"),
        (AB, [drawn(1, 1, iscrowd="yes")], CATEGORIES, 'annotation 1 has iscrowd "yes"; 0 or 1 is expected'),
        (AB, [drawn(1, 1)], [{"id": 1}], "category 1 has no name that can be used: null"),
        ([image(1, "\ud800.jpg")], [drawn(1, 1)], CATEGORIES, "image 1 has no file_name that can be used"),
        (
            [image(1, "x/a.jpg"), image(2, "y/a.jpg")],
            [drawn(1, 1), drawn(2, 2)],
            CATEGORIES,
            r"a\.jpg is image 1 of .*image 2",
        ),
        ([image(1, "../i.json")], [drawn(1, 1)], CATEGORIES, r"i\.json is missing"),
        (AB, [drawn(1, 1)], [{"id": i, "name": f"c{i}"} for i in range(255)], "255 classes; masks can number 254"),
    ],
)
def test_what_stands_for_two_or_for_nothing_is_named(
    tmp_path: Path, images: list, annotations: list, categories: list, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        source_of(tmp_path, images, annotations, categories)


def test_categories_of_one_name_and_headings(tmp_path: Path) -> None:
    categories = [
        {"id": 0, "name": "animals", "supercategory": "none"},
        *({"id": i, "name": name, "supercategory": "animals"} for i, name in enumerate(("cat", "dog", "Cat "), 1)),
    ]
    source = source_of(tmp_path, AB, [drawn(1, 3), drawn(2, 2)], categories)
    assert source.classes == ("cat", "dog")
    assert labels_of(source.read("a")) == ["cat"]
    assert mask_of(source.read("a")).max() == 1
    assert [note.partition(": ")[2] for note in source.notes] == [
        "category 'animals' (0) has no annotation and is only a heading: left out",
        "category 'Cat' (3) is merged with 'cat' of the same name",
    ]
    assert source_of(tmp_path, AB, [drawn(1, 0)], categories).classes == ("animals", "cat", "dog")
    source = source_of(tmp_path, AB, [drawn(1, 1)], [{"id": 1, "name": "t-shirt"}, {"id": 2, "name": "T shirt"}])
    assert "categories 't-shirt' and 'T shirt' are two classes; are they one?" in source.notes[0]
    unused = [
        {"id": 1, "name": "person", "supercategory": "person"},
        {"id": 2, "name": "dog", "supercategory": "animal"},
    ]
    assert source_of(tmp_path, AB, [drawn(1, 2)], unused).classes == ("person", "dog")
    ground = [{"id": 0, "name": "_background_"}, {"id": 1, "name": "cat"}]
    assert source_of(tmp_path, AB, [drawn(1, 1)], ground).classes == ("cat",)
    with pytest.raises(DataError, match=r"annotations have the category '_background_' \(0\), which is no class"):
        source_of(tmp_path, AB, [drawn(1, 1), drawn(2, 0)], ground)


@pytest.mark.parametrize(
    ("names", "files", "keys"),
    [
        (("IMG_1_jpg.rf.0a1b2c.jpg", "my photo 1.jpg"), (), ["IMG_1_jpg_rf_0a1b2c", "my_photo_1"]),
        (("x/0001.jpg", "y/0002.jpg"), (), ["0001", "0002"]),
        (("x/0001.jpg", "y/0001.jpg"), (), ["x_0001", "y_0001"]),
        (("images\\0001.jpg", "images/0a1b2c3d-my%20b.jpg"), ("0001.jpg", "my b.jpg"), ["0001", "my_b"]),
        (("a.b.jpg", "a b.jpg"), (), ["train_a_b_fc529c13f497", "train_a_b_1b34ed9cb352"]),
    ],
)
def test_names_of_annotation_tools_become_keys(tmp_path: Path, names: tuple, files: tuple, keys: list[str]) -> None:
    images = [image(number, name) for number, name in enumerate(names)]
    source = source_of(tmp_path, images, [drawn(0, 1), drawn(1, 2)], files=files or names)
    assert source.splits == {"train": keys}
    assert [labels_of(source.read(key)) for key in keys] == [["cat"], ["dog"]]


def test_one_name_in_the_folders_of_two_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        save_photo(tmp_path / split / "1.jpg")
        tree = {"images": [image(1, "1.jpg")], "annotations": [drawn(1, 1)], "categories": CATEGORIES}
        (tmp_path / f"{split}.json").write_text(json.dumps(tree))
    files = [f"{tmp_path}/train.json", f"{tmp_path}/val.json"]
    source = coco_source([f"{tmp_path}/train", f"{tmp_path}/val"], files, ["train", "val"])
    assert source.splits == {"train": ["train_1"], "val": ["val_1"]}
    with pytest.raises(DataError, match=r"1\.jpg is image 1 of .*train\.json and image 1 of .*val\.json"):
        coco_source([f"{tmp_path}/train"], files, ["train", "val"])


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"NaN", b"{", b"\xff\xfe", b"[" * 100_000, b'{"images": [1], "annotations": []}']
)
def test_what_is_no_coco_file_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "i.json").write_bytes(data)
    with pytest.raises(DataError, match=r"i\.json is not a COCO instances file: [^\n]{,200}$"):
        coco_of(tmp_path)


def test_any_value_in_any_place_is_read_or_refused(tmp_path: Path) -> None:
    rng = random.Random(0)
    values = [None, True, -1, 0, 2, 1e9, float("nan"), 10**400, "", "1", "x", [], {}, [[]], [1, 2], 1.5]
    whole = {"images": AB, "annotations": [drawn(1, 1), drawn(2, 2, {"size": [10, 20], "counts": [50, 50, 100]})]}
    source_of(tmp_path, AB, [drawn(1, 1)])
    read = 0
    for _ in range(300):
        tree: Any = copy.deepcopy({**whole, "categories": CATEGORIES})
        place, key = tree, rng.choice(list(tree))
        while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.9:
            place = place[key]
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        place[key] = rng.choice(values)
        (tmp_path / "i.json").write_text(json.dumps(tree))
        try:
            source = coco_of(tmp_path)
            read += sum("json" in source.read(key) for key in source.splits["train"])
        except DataError:
            pass
    assert read > 50
