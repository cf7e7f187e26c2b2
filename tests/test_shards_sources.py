"""VOC and own folders as sources of shards, on tiny trees made here."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esol.base.errors import DataError
from esol.data.index import Index
from esol.data.samples import encode_mask
from shards import cli
from shards.folder import folder_source
from shards.samples import Reads, Source
from shards.voc import CLASSES, read_cls_labels, voc_source


def save_photo(path: Path, size: tuple[int, int] = (20, 10)) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 30)).save(path, "JPEG")
    return path.read_bytes()


def save_mask(path: Path, levels: np.ndarray) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_mask(levels.astype(np.uint8)))
    return path.read_bytes()


def mask_of(sample: dict[str, bytes]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample["mask.png"])))


def labels_of(sample: dict[str, bytes]) -> list[str]:
    return list(json.loads(sample["json"])["labels"])


def elsewhere(source: Source, key: str) -> dict[str, bytes]:
    """A sample as another process reads it."""
    assert isinstance(source.read, Reads)
    found: dict[str, bytes] = pickle.loads(pickle.dumps(source.read.part([key])))(key)
    return found


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Three images: a difficult cat with a dog, a dog, a car; the last has no mask."""
    root = tmp_path / "VOC2012"
    levels = np.zeros((10, 20))
    levels[:, :5], levels[:, 5:8], levels[:, 8:10] = CLASSES.index("cat") + 1, CLASSES.index("dog") + 1, 255
    objects = {"2007_000001": ["cat!", "dog"], "2007_000002": ["dog", "dog"], "2007_000003": ["car"]}
    for key, names in objects.items():
        save_photo(root / f"JPEGImages/{key}.jpg")
        if key != "2007_000003":
            save_mask(root / f"SegmentationClass/{key}.png", levels)
        found = "".join(
            f"<object><name>{n.strip('!')}</name><difficult>{int('!' in n)}</difficult>"
            "<part><name>head</name></part></object>"
            for n in names
        )
        (root / "Annotations").mkdir(exist_ok=True)
        (root / f"Annotations/{key}.xml").write_text(f"<annotation>{found}</annotation>")
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("2007_000001\n2007_000003\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_000002\n")
    return root


def test_voc_labels_are_all_objects_and_photo_and_mask_are_kept(voc: Path) -> None:
    source = voc_source(str(voc))
    assert source.splits == {"train": ["2007_000001", "2007_000003"], "val": ["2007_000002"]}
    first = elsewhere(source, "2007_000001")
    assert labels_of(first) == ["cat", "dog"]
    assert first["jpg"] == (voc / "JPEGImages/2007_000001.jpg").read_bytes()
    assert first["mask.png"] == (voc / "SegmentationClass/2007_000001.png").read_bytes()
    assert labels_of(source.read("2007_000002")) == ["dog"]
    assert "mask.png" not in source.read("2007_000003")


def test_voc_subset_renumbers_masks_and_other_classes_become_background(voc: Path) -> None:
    everything = voc_source(str(voc), classes=("person", "dog"))
    assert everything.splits["train"] == ["2007_000001", "2007_000003"]
    assert labels_of(everything.read("2007_000003")) == []  # a photo without any object
    assert "1 images have no label (2007_000003)" in everything.notes[0]
    assert "--drop-unlabelled leaves them out" in everything.notes[0]
    source = voc_source(str(voc), classes=("person", "dog"), drop_unlabelled=True)
    assert source.splits["train"] == ["2007_000001"]
    sample = source.read("2007_000001")
    assert labels_of(sample) == ["dog"]
    assert mask_of(sample)[0].tolist() == [0] * 5 + [2] * 3 + [255] * 2 + [0] * 10


def test_voc_command_with_lists_elsewhere_and_several_splits(voc: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").mkdir()
    (tmp_path / "ids/few.txt").write_text("/JPEGImages/2007_000001.jpg /SegmentationClassAug/2007_000001.png\n")
    (tmp_path / "val2.txt").write_text("2007_000001\n2007_000002\n")
    words = ["create", "voc", str(voc), "--out", str(tmp_path / "out"), "--ids-dir", str(tmp_path / "ids")]
    assert cli.main([*words, "--split", "few", "--split", f"more={tmp_path}/val2.txt", "--classes", "dog,cat"]) == 0
    index = Index.load(str(tmp_path / "out"))
    assert index.classes == ("dog", "cat")
    assert {n: sorted(index.keys[o]) for n, o in index.splits.items()} == {
        "few": ["2007_000001"],
        "more": ["2007_000001", "2007_000002"],
    }
    assert cli.main(["verify", str(tmp_path / "out")]) == 0


def test_voc_test_images_have_no_annotations(voc: Path) -> None:
    save_photo(voc / "JPEGImages/2008_000001.jpg")
    (voc / "ImageSets/Segmentation/test.txt").write_text("2008_000001\n2007_000002\n")
    with pytest.raises(DataError, match=r"Annotations/2008_000001\.xml is missing"):
        voc_source(str(voc), splits=("train", "test"))
    source = voc_source(str(voc), splits=("val", "test"), classes=("cat", "dog"), no_labels=("test",))
    assert source.splits == {"val": ["2007_000002"], "test": ["2008_000001", "2007_000002"]}
    assert [labels_of(source.read(key)) for key in source.splits["test"]] == [[], ["dog"]]  # val has labels
    with pytest.raises(DataError, match=r"--no-labels tset: the splits are train, test"):
        voc_source(str(voc), splits=("train", "test"), no_labels=("tset",))


def test_voc_mask_of_another_size_names_mask_and_photo(voc: Path) -> None:
    save_mask(voc / "SegmentationClass/2007_000001.png", np.zeros((10, 21)))
    with pytest.raises(DataError, match=r"SegmentationClass/2007_000001\.png is 21x10 .*2007_000001\.jpg is 20x10"):
        voc_source(str(voc)).read("2007_000001")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda r: (r / "JPEGImages/2007_000001.jpg").unlink(), r"2007_000001\.jpg is missing"),
        (lambda r: (r / "Annotations/2007_000001.xml").unlink(), r"2007_000001\.xml is missing"),
        (lambda r: (r / "Annotations/2007_000001.xml").write_text("<a>"), r"2007_000001\.xml is not valid XML"),
        (
            lambda r: (r / "Annotations/2007_000001.xml").write_text("<a><object><name>cta</name></object></a>"),
            r"2007_000001\.xml: label 'cta' .* did you mean 'cat'",
        ),
        (lambda r: (r / "Annotations/2007_000001.xml").write_text(" "), r"2007_000001\.xml is empty"),
        (
            lambda r: (r / "Annotations/2007_000001.xml").write_text("<a><object><name> </name></object></a>"),
            r"2007_000001\.xml: object 1 has no name",
        ),
        (
            lambda r: (r / "Annotations/2007_000001.xml").write_bytes("<a>é</a>".encode("latin-1")),
            r"2007_000001\.xml is not text of the encoding utf-8",
        ),
        (
            lambda r: (r / "Annotations/2007_000001.xml").write_text("<?xml version='1.0' encoding='zlib'?><a/>"),
            r"2007_000001\.xml is not text of the encoding zlib",
        ),
        (
            lambda r: (r / "Annotations/2007_000001.xml").write_text(
                '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>'
            ),
            r"2007_000001\.xml has the entity x; annotations need none",
        ),
        (lambda r: (r / "ImageSets/Segmentation/val.txt").write_text(""), r"val\.txt lists no image"),
        (lambda r: (r / "ImageSets/Segmentation/val.txt").write_text("a\na\n"), r"val\.txt lists a 2 times"),
        (lambda r: (r / "ImageSets/Segmentation/val.txt").write_bytes(b"\xff\xd8"), r"val\.txt is not a UTF-8 text"),
    ],
)
def test_bad_voc_files_are_named(voc: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(voc)
    with pytest.raises(DataError, match=words):
        voc_source(str(voc))


def test_voc_annotations_of_any_encoding(voc: Path) -> None:
    annotation = "<annotation><folder>日本</folder><object><name> Cat\n</name></object></annotation>"
    file = voc / "Annotations/2007_000001.xml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb2312", "shift_jis"):
        declared = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>\n{annotation}'
        file.write_bytes(declared.encode(encoding))
        assert labels_of(voc_source(str(voc)).read("2007_000001")) == ["cat"]
    for text, own in ((declared.replace(encoding, "utf-16"), "utf-8"), (f"\n{declared}", "shift_jis")):
        file.write_bytes(text.encode(own))  # one that was written as .NET holds it, one with a blank line first
        assert labels_of(voc_source(str(voc)).read("2007_000001")) == ["cat"]


def test_voc_ids_may_be_any_names_of_files(voc: Path) -> None:
    ids = ("img.v2", "my photo", "x 1", "é", "two words")
    lines = ("img.v2", "my photo", "x 1", "é -1", "/JPEGImages/two words.jpg /SegmentationClass/two words.png")
    for name in ids:
        save_photo(voc / f"JPEGImages/{name}.jpg")
        save_mask(voc / f"SegmentationClass/{name}.png", np.ones((10, 20)))
        (voc / f"Annotations/{name}.xml").write_text("<a><object><name>aeroplane</name></object></a>")
    (voc / "ImageSets/Segmentation/train.txt").write_text("\n".join(lines), encoding="utf-8")
    source = voc_source(str(voc), splits=("train",))
    assert source.splits == {"train": ["img_v2", "my_photo", "x_1", "é", "two_words"]}
    for key in source.splits["train"]:
        assert mask_of(source.read(key)).all()
    save_photo(voc / "JPEGImages/my.photo.png")
    (voc / "Annotations/my.photo.xml").write_text("<a><object><name>cat</name></object></a>")
    (voc / "ImageSets/Segmentation/train.txt").write_text("my photo\nmy.photo\n")
    with pytest.raises(DataError, match=r"my photo and my\.photo have the same key my_photo"):
        voc_source(str(voc), splits=("train",))


@pytest.mark.parametrize(
    "key", [lambda k: k, lambda k: int(k.replace("_", "")), lambda k: np.int64(k.replace("_", ""))]
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cls_labels_give_the_same_labels_as_the_annotations(voc: Path, key: Callable, protocol: int) -> None:
    vectors = {}
    for image, names in {"2007_000001": {"cat", "dog"}, "2007_000002": {"dog"}, "2007_000003": {"car"}}.items():
        vectors[key(image)] = np.array([float(c in names) for c in CLASSES], np.float32)
    file = voc / "cls_labels.npy"
    with open(file, "wb") as out:
        np.lib.format.write_array_header_1_0(out, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(np.array(vectors, dtype=object), out, protocol=protocol)
    source, plain = voc_source(str(voc), labels=str(file)), voc_source(str(voc))
    for image in ("2007_000001", "2007_000002", "2007_000003"):
        assert source.read(image) == plain.read(image)
    assert read_cls_labels(str(file)).keys() == np.load(file, allow_pickle=True).item().keys()


class Malice:
    def __init__(self, call: Callable, *arguments: object) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> tuple:
        return self.reduced


@pytest.mark.parametrize("nested", [False, True])
def test_cls_labels_run_no_code(tmp_path: Path, nested: bool) -> None:
    for number, attack in enumerate(
        (Malice(Path.touch, tmp_path / "run"), Malice(eval, f"open({str(tmp_path / 'run')!r}, 'w')"))
    ):
        file = tmp_path / f"{number}.npy"
        np.save(file, {1: np.array([attack], dtype=object)} if nested else attack, allow_pickle=True)
        with pytest.raises(
            DataError, match=rf"{number}\.npy is not a cls_labels\.npy that can be read safely.*asks for"
        ):
            read_cls_labels(str(file))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("held", [b"", b"\x93NUMPY", np.zeros(3), np.array([1, "a"], dtype=object), {1: "text"}])
def test_what_is_no_cls_labels_is_named(tmp_path: Path, held: object) -> None:
    file = tmp_path / "l.npy"
    if isinstance(held, bytes):
        file.write_bytes(held)
    else:
        np.save(file, held, allow_pickle=True)
    with pytest.raises(DataError, match=r"l\.npy"):
        read_cls_labels(str(file))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    root = tmp_path / "own"
    for name in ("one.jpg", "two words.jpg", "sub/three.v2.jpg"):
        save_photo(root / "images" / name)
    save_mask(root / "masks/sub/three.v2.png", np.full((10, 20), 2))
    (root / "labels.csv").write_text(
        "image,labels,split\none.jpg,kiwi,\ntwo words.jpg,apple; kiwi,val\n\nsub/three.v2.jpg,apple,train\n"
    )
    return root


def test_own_folder_becomes_shards(own: Path, tmp_path: Path) -> None:
    assert cli.main(["create", "folder", str(own), "--out", str(tmp_path / "out")]) == 0
    index = Index.load(str(tmp_path / "out"))
    assert index.classes == ("apple", "kiwi")
    assert {n: sorted(index.keys[o]) for n, o in index.splits.items()} == {
        "train": ["one", "sub_three_v2"],
        "val": ["two_words"],
    }
    sample = elsewhere(folder_source(str(own)), "sub_three_v2")
    assert labels_of(sample) == ["apple"]
    assert (mask_of(sample) == 2).all()


def test_own_folder_takes_class_order_from_its_file_and_a_bom_from_a_spreadsheet(own: Path) -> None:
    (own / "classes.txt").write_text("plum\nkiwi\napple\n")
    (own / "labels.csv").write_bytes(b"\xef\xbb\xbf" + (own / "labels.csv").read_bytes().replace(b"\n", b"\r\n"))
    source = folder_source(str(own))
    assert source.classes == ("plum", "kiwi", "apple")
    assert labels_of(source.read("two_words")) == ["kiwi", "apple"]


def test_a_row_without_label_is_a_photo_without_any_object(own: Path) -> None:
    (own / "classes.txt").write_text("apple\nkiwi\n")
    (own / "labels.csv").write_text("image,labels\none.jpg,\ntwo words.jpg,apple\nsub/three.v2.jpg,apple\n")
    source = folder_source(str(own))
    assert labels_of(source.read("one")) == []
    assert "1 images have no label (one.jpg)" in source.notes[-1]
    (own / "classes.txt").unlink()
    everyone = "one.jpg,\ntwo words.jpg,\nsub/three.v2.jpg,"
    (own / "labels.csv").write_text(f"image,labels\n{everyone}\n")
    with pytest.raises(DataError, match=r"labels\.csv names no class: no photo has a label"):
        folder_source(str(own))
    (own / "labels.csv").write_text("image,labels\none.jpg,\ntwo words.jpg,apple\nsub/three.v2.jpg,apple\n")
    assert folder_source(str(own), drop_unlabelled=True).splits == {"train": ["two_words", "sub_three_v2"]}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            "one.jpg,kiwi\ntwo words.jpg,appel\nsub/three.v2.jpg,apple",
            r"line 3: label 'appel' .* did you mean 'apple'\?",
        ),
        ("one.jpg,kiwi\nsub/three.v2.jpg,apple", r"images/two words\.jpg has no row"),
        (
            "one.jpg,kiwi\none.png,kiwi\ntwo words.jpg,kiwi\nsub/three.v2.jpg,apple",
            r"line 3: there is no image images/one\.png",
        ),
        (
            "no.jpg,kiwi\none.jpg,kiwi\ntwo words.jpg,kiwi\nsub/three.v2.jpg,apple",
            r"line 2: there is no image images/no\.jpg",
        ),
        ("one.jpg,kiwi\ntwo words.jpg,kiwi", r"masks/sub/three\.v2\.png belongs to no image"),
        ("one.jpg;kiwi", "line 2: 1 columns instead of 2"),
        ('one.jpg,"kiwi', "line 2"),
        ("", "lists no image"),
    ],
)
def test_bad_rows_are_named_by_line(own: Path, rows: str, words: str) -> None:
    (own / "classes.txt").write_text("apple\nkiwi\n")
    (own / "labels.csv").write_text(f"image,labels\n{rows}\n")
    with pytest.raises(DataError, match=words):
        folder_source(str(own))


def test_bad_header_is_quoted(own: Path) -> None:
    (own / "labels.csv").write_text("photograph;shows\none.jpg;kiwi\n")
    words = "the first line must name the columns, such as image,labels: .* it is 'photograph;shows'"
    with pytest.raises(DataError, match=words):
        folder_source(str(own))


def test_mask_value_above_the_class_count_and_unreadable_photo(own: Path) -> None:
    save_mask(own / "masks/sub/three.v2.png", np.full((10, 20), 3))
    (own / "images/one.jpg").write_bytes(b"no photo")
    source = folder_source(str(own))
    with pytest.raises(DataError, match=r"masks/sub/three\.v2\.png: value 3 is no class; 0 is background, 1\.\.2"):
        source.read("sub_three_v2")
    with pytest.raises(DataError, match=r"images/one\.jpg: unreadable image"):
        source.read("one")
