"""What labels.csv names: what is one class, what are two, and what nobody can tell; and names of files."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from esol.base.errors import DataError
from shards import cli
from shards.folder import folder_source
from shards.names import FileNames, safe_key, similar
from shards.samples import Source
from tests.test_shards_sources import save_mask, save_photo


def source_of(root: Path, *cells: str, classes: tuple[str, ...] = (), table: bytes = b"") -> Source:
    """A folder of one photo for each cell of the column labels, or with the table as it is."""
    for number in range(len(cells) or 2):
        save_photo(root / f"images/{number}.jpg")
    rows = "".join(f"{number}.jpg,{cell}\n" for number, cell in enumerate(cells))
    (root / "labels.csv").write_bytes(table or f"image,labels\n{rows}".encode())
    (root / "classes.txt").unlink(missing_ok=True)
    if classes:
        (root / "classes.txt").write_text("\n".join(classes), encoding="utf-8")
    return folder_source(str(root))


def labels_of(source: Source) -> list[list[str]]:
    keys = sorted(key for keys in source.splits.values() for key in keys)
    return [json.loads(source.read(key)["json"])["labels"] for key in keys]


CAT, DOG, BOTH = ["cat"], ["dog"], ["cat", "dog"]


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (('"cat, dog"', "cat"), [BOTH, CAT]),
        (("cat|dog", "cat"), [BOTH, CAT]),
        (("cat；dog", "cat"), [BOTH, CAT]),
        (('"cat\ndog"', "cat"), [BOTH, CAT]),
        (("cat;", ";dog|", '"cat,"'), [CAT, DOG, CAT]),
        (("Cat", "cat", "CAT;cat;dog"), [CAT, CAT, BOTH]),
        (("\u200bcat", "cat\u00a0", '"""cat"""', "“cat”", "'cat'"), [CAT] * 5),
        (("polar\u00a0bear", "polar  bear", "polar bear"), [["polar bear"]] * 3),
        ((unicodedata.normalize("NFD", "café"), "café"), [["café"]] * 2),
        (
            ("A", "a", "C", "C++", "1.5", "15", "car;cat"),
            [["A"], ["a"], ["C"], ["C++"], ["1.5"], ["15"], ["car", "cat"]],
        ),
    ],
)
def test_labels_that_are_the_same_are_one_class(tmp_path: Path, cells: tuple[str, ...], labels: list) -> None:
    assert labels_of(source_of(tmp_path, *cells)) == labels


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (("polar-bear", "polar bear"), r"'polar bear' \(line 3\) and 'polar-bear' \(line 2\) look like one class;"),
        (("polar_bear", "polarbear"), "look like one class"),
        (("cats", "cat"), "list both in classes.txt if they are two"),
        (("cat.", "cat"), "look like one class"),
        (("cat;dog", '"cat, dog"'), "line 3: 'cat, dog' holds what is a class elsewhere"),
        (("cat|dog", "cat/dog"), "line 3: 'cat/dog' holds what is a class elsewhere"),
        (('"bear, polar"', '"seal, harbor"'), "line 2: is 'bear, polar' one class or several"),
        (("\"['cat', 'dog']\"", "cat"), r"line 2: \['cat', 'dog'\] is a program's list; write labels as cat;dog"),
        (tuple(f"name {n}x" for n in range(255)), "255 classes; masks can number 254"),
    ],
)
def test_what_could_be_one_class_or_two_is_named_and_classes_txt_settles_it(
    tmp_path: Path, cells: tuple[str, ...], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        source_of(tmp_path, *cells)
    if len(cells) == 2 and ";" not in cells[0]:
        classes = tuple(cell.strip('"') for cell in cells)
        assert labels_of(source_of(tmp_path, *cells, classes=classes)) == [[name] for name in classes]


def test_lines_of_classes_txt_are_found_by_what_folds_alike_but_spelling_comes_first(tmp_path: Path) -> None:
    classes = ("Polar Bear", "seal, harbor", "dog", "Dog")
    cells = ("polar  bear|dog", '"seal, harbor"', '"Dog, polar bear"', "Dog;dog")
    source = source_of(tmp_path, *cells, classes=classes)
    assert source.classes == classes
    assert labels_of(source) == [["Polar Bear", "dog"], ["seal, harbor"], ["Polar Bear", "Dog"], ["dog", "Dog"]]
    with pytest.raises(DataError, match="line 2: label 'DOG' is not in the class list"):
        source_of(tmp_path, "DOG", classes=classes)
    with pytest.raises(DataError, match=r"classes\.txt names a class twice: cat"):
        source_of(tmp_path, "cat", classes=("cat", "cat\u200b"))


@pytest.mark.parametrize(
    "table",
    [
        '\ufeffsep=;\r\nImage;Labels;Split\r\n0.jpg;cat;train\r\n1.jpg;"cat;dog";train\r\n;;\r\n'.encode(),
        "image\tlabels\n0.jpg\tcat\n1.jpg\tcat;dog\n".encode("utf-16"),
        b"image,labels,,\r0.jpg,cat,,\r,,,\r1.jpg,cat;dog,,\r",
        b'image,labels\nimages\\0.jpg, "cat"\n./1.jpg, "cat;dog"\n',
    ],
)
def test_tables_of_spreadsheets_are_read(tmp_path: Path, table: bytes) -> None:
    source = source_of(tmp_path, table=table)
    assert labels_of(source) == [CAT, BOTH]
    assert bool(source.notes) == (b"images\\0.jpg" in table)  # photos under another name are said


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("image,labels\n0.jpg,café\n".encode("cp1252"), r"labels\.csv is not a UTF-8 text file \(line 2\): save it as"),
        ("image,labels\n0.jpg,cat\n".encode("utf-16-le"), r"not a UTF-8 text file \(it holds zero bytes\)"),
        (b"image;labels\n0.jpg;cat;dog\n", r"line 2: 3 columns instead of 2; .* in quotes \(\"cat;dog\"\)"),
        (b"image,labels,split\n0.jpg,cat,dog\n1.jpg,dog,\n", "line 2: split 'dog' is the name of a class"),
        (
            b"image,labels\n0.jpg,cat\n0.jpg,dog\n1.jpg,cat\n",
            "line 3: image 0.jpg stands in line 2 too; one row an image",
        ),
        (b"image,labels\n,cat\n..,cat\n/,cat\n0.jpg,cat\n1.jpg,cat\n", r"line 3: there is no image images/\.\.\n"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, table: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        source_of(tmp_path, table=table)


def test_photos_and_masks_are_found_in_the_other_unicode_form_and_a_mask_is_of_no_other_photo(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    for name in (apart, "a", "sub/a"):
        save_photo(tmp_path / f"images/{name}.jpg")
    for name in (composed, "sub/a"):
        save_mask(tmp_path / f"masks/{name}.png", np.ones((10, 20)))
    (tmp_path / "labels.csv").write_text(
        f"image,labels\n{composed}.jpg,cat\na.jpg,cat\nsub/a.jpg,cat\n", encoding="utf-8"
    )
    source = folder_source(str(tmp_path))
    assert source.splits == {"train": [composed, "a", "sub_a"]}
    assert ["mask.png" in source.read(key) for key in source.splits["train"]] == [True, False, True]


def test_create_prints_each_class_with_its_count_and_what_was_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source_of(tmp_path / "own", "cat|dog", "Cat", "cat", "train")
    assert cli.main(["create", "folder", f"{tmp_path}/own", "--out", f"{tmp_path}/out"]) == 0
    printed = capsys.readouterr().out
    counts = [line.split() for line in printed.splitlines()]
    assert all([name, count] in counts for name, count in (("cat", "3"), ("dog", "1"), ("train", "1")))
    assert "labels.csv: 'Cat' (1) is counted as 'cat' (2)\n" in printed
    assert "labels.csv: labels joined by | were taken apart in 1 cell\n" in printed


def test_near_names_are_not_near_enough() -> None:
    for names in (
        ("car", "cat"),
        ("dog", "dgo"),
        ("1-5", "15"),
        ("glass", "class"),
        ("A-", "A"),
        ("C#", "C"),
        ("s", "ss"),
    ):
        assert similar(names) == []
    for names in (("bus", "buses"), ("berry", "berries"), ("T-shirt", "t shirt"), ("type 1", "type1")):
        assert similar(names) == [names]


def test_names_of_files_and_keys() -> None:
    files = FileNames(["a.jpg", "x/b.jpg", "y/b.jpg", "sub/only.jpg", "my photo.jpg"])
    for name, found in {
        "images\\a.jpg": "a.jpg",
        "/data/upload/1/0a1b2c3d-a.jpg": "a.jpg",
        "/data/local-files/?d=x/b.jpg": "x/b.jpg",
        "https://host/photos/my%20photo.jpg": "my photo.jpg",
        "only.jpg": "sub/only.jpg",
        "b.jpg": None,  # there are two
        "x/a.jpg": None,  # x is here, and a.jpg is not in it
        "../a.jpg": None,
    }.items():
        assert files.find(name) == found
    long = "x" * 90
    assert safe_key("a.b c/d\\e") == "a_b_c_d_e"
    assert safe_key(long + "1") != safe_key(long + "2")
    assert max(len(safe_key(name).encode()) for name in (long, "é" * 90)) <= 80
