"""A folder of photos as people have it: files by their bytes, masks by what they must mean, classes without 0."""

import io
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esol.base.errors import DataError
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.samples import decode_mask, encode_png
from shards import cli
from shards.folder import folder_source
from shards.writer import create

NFD = unicodedata.normalize("NFD", "café")


def picture(kind: str = "JPEG", seed: int = 0, **options: object) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def lay(root: Path, table: str | bytes, names: tuple[str, ...] = ("a.jpg", "b.jpg", "c.jpg"), **more: str) -> str:
    """A folder of photos with this labels.csv; more: classes="a line each"."""
    (root / "images").mkdir(parents=True)
    for number, name in enumerate(names):
        (root / "images" / name).parent.mkdir(exist_ok=True)
        (root / "images" / name).write_bytes(picture(seed=number))
    (root / "labels.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    if "classes" in more:
        (root / "classes.txt").write_text(more["classes"])
    return str(root)


def draw(root: Path, name: str, *numbers: int) -> None:
    levels = np.zeros((12, 16), np.uint8)
    for number in numbers:
        levels[3 * numbers.index(number) :, 4:9] = number
    path = root / "masks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(Image.fromarray(levels)))


def test_classes_txt_is_matched_by_the_same_folding_and_its_background_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = "__ignore__\n_background_\nCat\nbear, polar\n"
    table = 'image,labels\na.jpg,"cat ;BEAR,  polar"\nb.jpg,"bear, polar"\n'
    root = lay(tmp_path / "set", table, ("a.jpg", "b.jpg"), classes=lists)
    assert cli.main(["create", "folder", root, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "classes.txt: __ignore__, _background_ is no class, masks number it 0" in said
    for line in ("  class        labelled", "  Cat                 1", "  bear, polar         2"):
        assert line in said.splitlines()
    (tmp_path / "set/classes.txt").write_text("cat\nbackground\n")
    with pytest.raises(
        DataError, match=r"classes\.txt, entry 2: 'background' cannot be a class, since 0 is background"
    ):
        folder_source(root)
    (tmp_path / "set/classes.txt").write_text("\n".join(f"c{i}" for i in range(255)))
    with pytest.raises(DataError, match="255 classes; masks can number 254"):
        folder_source(root)


def test_photos_are_what_their_bytes_say_and_links_are_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "elsewhere"
    store.mkdir()
    (store / "9f86d0").write_bytes(picture(seed=9))
    rows = [
        "a.jfif,cat",
        "b,cat",
        "c.JPE,cat",
        "caf\u00e9.jpg,cat",
        "link,cat",
        "more/d.png,cat",
        "tif.jpg,cat",
        "e.jpg,cat",
    ]
    root = Path(lay(tmp_path / "set", "image,labels\n" + "\n".join(rows), ("a.jfif", "b", "c.JPE", f"{NFD}.jpg")))
    (root / "images/link").symlink_to(store / "9f86d0")
    (root / "images/more").symlink_to(tmp_path / "folder", target_is_directory=True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/d.png").write_bytes(picture("PNG"))
    (tmp_path / "folder/back").symlink_to(root / "images", target_is_directory=True)  # a circle
    (root / "images/Thumbs.db").write_bytes(b"no photo")
    (root / "images/tif.jpg").write_bytes(b"\xff\x0a" + bytes(80))  # JPEG XL
    (root / "images/e.jpg").write_bytes(picture()[:-300])
    out = str(tmp_path / "out")
    assert cli.main(["create", "folder", str(root), "--out", out]) == 2
    said = capsys.readouterr().err
    assert "error: 2 images cannot be used; nothing was finished; --drop-damaged leaves them out" in said
    assert "images/tif.jpg: unreadable image (JPEG XL: convert it to JPEG, PNG or WebP)" in said
    assert "images/e.jpg: unreadable image" in said
    assert cli.main(["create", "folder", str(root), "--out", out, "--drop-damaged"]) == 0
    assert "warning: 2 images were left out\n  images/e.jpg: unreadable" in capsys.readouterr().out
    index = Index.load(out)
    assert sorted(index.keys.tolist()) == ["a", "b", "c", "caf\u00e9", "link", "more_d"]
    assert len(index.split("train")) == 6
    (root / "images/extra").write_bytes(picture())
    with pytest.raises(DataError, match="images/extra has no row in"):
        folder_source(str(root))


def read_masks(out: Path) -> dict[str, list[int]]:
    reader = ShardReader(Index.load(out))
    keys = reader.index.keys.tolist()
    return {k: np.unique(decode_mask(reader.read(i, "mask.png"), k)).tolist() for i, k in enumerate(keys)}


@pytest.mark.parametrize("labels", ["cat cat cat", "cat dog dog"])
def test_masks_of_0_and_255_are_the_class_of_their_photo(tmp_path: Path, labels: str) -> None:
    own = labels.split()
    table = "image,labels\n" + "".join(f"{n}.jpg,{label}\n" for n, label in zip("abc", own, strict=True))
    root = Path(lay(tmp_path / "set", table))
    for name in "abc":
        draw(root, f"{name}.png", 255)
    source = folder_source(str(root))
    assert "in 3 masks of 0 and 255 alone 255 is taken as the class" in source.notes[-1]
    create(source, str(tmp_path / "out"))
    numbers = {name: source.classes.index(label) + 1 for name, label in zip("abc", own, strict=True)}
    assert read_masks(tmp_path / "out") == {name: [0, number] for name, number in numbers.items()}


def test_masks_of_0_and_255_in_folders_named_by_class_and_of_none(tmp_path: Path) -> None:
    names = ("cat/a.jpg", "dog/b.jpg")
    root = Path(lay(tmp_path / "set", "image,labels\ncat/a.jpg,cat;dog\ndog/b.jpg,cat;dog\n", names))
    for name in names:
        draw(root, name.replace(".jpg", ".png"), 255)
    create(folder_source(str(root)), str(tmp_path / "out"))
    assert read_masks(tmp_path / "out") == {"cat_a": [0, 1], "dog_b": [0, 2]}
    flat = Path(lay(tmp_path / "flat", "image,labels\na.jpg,cat;dog\n", ("a.jpg",)))
    draw(flat, "a.png", 255)
    with pytest.raises(DataError, match=r"a\.png holds 0 and 255 alone, and its photo is labelled cat, dog: number"):
        folder_source(str(flat))
    draw(flat, "a.png", 255, 1)  # 255 beside a number is void, as in VOC
    create(folder_source(str(flat)), str(tmp_path / "void"))
    assert read_masks(tmp_path / "void") == {"a": [0, 1, 255]}


def test_masks_that_are_numbered_otherwise_are_refused_and_slips_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = "image,labels\n" + "".join(f"{n}.jpg,{'cat' if n < 'd' else 'dog'}\n" for n in "abcdef")
    root = Path(lay(tmp_path / "set", table, tuple(f"{n}.jpg" for n in "abcdef")))
    for name in "abcdef":
        draw(root, f"{name}.png", 2 if name < "d" else 1)
    command = ["create", "folder", str(root), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "cat is drawn in 3 masks, and 3 of their photos are not labelled with it (such as: a shows dog" in said
    assert "masks must be numbered 0 = background, 1 = cat, 2 = dog, 255 = void" in said
    for name in "abcdef":
        draw(root, f"{name}.png", 1 if name < "d" else 2)
    draw(root, "f.png", 1)
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert ["cat", "3", "4", "3"] in [line.split() for line in said.splitlines()]  # labelled, drawn, both
    assert "warning: 1 of 6 masks show a class that their photo is not labelled with: f shows cat, its labels" in said
    (root / "masks/a.jpg").write_bytes(picture())
    with pytest.raises(DataError, match=r"masks/a\.jpg: JPG masks are not read; save class numbers as PNG"):
        folder_source(str(root))
