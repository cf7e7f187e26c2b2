"""What `esol predict` takes for photos, and the names of its outputs: bytes decide, nothing is lost without a word."""

import io
import json
import os
import socket
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from esol.base.errors import EsolError
from esol.deploy.gather import MARK, UNFINISHED, Gathered, gather, output_names, texts


def picture(kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 30, 30)).save(out, kind)
    return out.getvalue()


def folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def look(root: Path, files: dict[str, bytes] | None = None, out: str = "out") -> Gathered:
    return gather(folder(root / "photos", files or {}), root / out)


def test_bytes_decide_and_what_is_left_out_is_named_or_counted(tmp_path: Path) -> None:
    jpeg, heic = picture(), b"\0\0\0\x1cftypheic\0\0\0\0mif1heic"
    read = {f"a{suffix}": jpeg for suffix in (".jfif", ".jpe", ".pjpeg", ".JPG", ".dng", ".txt", "", ".v1.5")}
    read |= {"mpo.jpg": picture("MPO"), "really-webp.jpg": picture("WEBP"), "png": picture("PNG")}
    read |= {"c.tif": picture("TIFF"), "d.jpg": picture("GIF"), "e.bmp": picture("BMP")}
    left = {"a.heic": heic, "b": heic, "f.jxl": b"\xff\x0a" + bytes(80)}
    other = {"n.txt": b"notes", "n.json": b"{}", "Thumbs.db": b"\xd0\xcf", "empty": b"", "m.mp4": b"\0\0\0\x14ftypisom"}
    asked = {"empty.png": b"", "page.jpg": b"<html>"}  # pictures by name: decoding them says what is wrong
    found = look(tmp_path, {**read, **left, **other, **asked, ".DS_Store": b"", ".git/a.jpg": jpeg})
    assert found.photos == sorted([*read, *asked])
    assert found.skipped.keys() == left.keys()
    assert found.skipped["f.jxl"] == "JPEG XL is not read: convert it to JPEG, PNG or WebP"
    assert found.skipped["b"].startswith("HEIC is read with another package: pip install 'esol[heic]'")
    assert found.others.total() == len(other)
    assert found.notes()[0].startswith("5 files are no pictures (1 ")
    assert found.notes()[1] == "2 hidden, not read: .DS_Store, .git"


def test_links_are_followed_to_where_the_files_are_and_loops_end(tmp_path: Path) -> None:
    photos, store = tmp_path / "photos", folder(tmp_path / "store", {"blobs/0a1b": picture(), "set/y.jpg": picture()})
    folder(photos, {"real/r.jpg": picture()})
    links = {
        "hub.jpg": store / "blobs/0a1b", "sub": store / "set", "again": photos / "real", "loop": photos,
        "self.jpg": photos / "self.jpg", "gone.jpg": tmp_path / "nowhere",
    }  # fmt: skip
    for name, target in links.items():
        (photos / name).symlink_to(target)
    (store / "set/back").symlink_to(store)
    (store / "loop").symlink_to(photos)
    found = look(tmp_path)
    assert found.photos == ["hub.jpg", "real/r.jpg", "sub/back/blobs/0a1b", "sub/y.jpg"]
    assert found.repeated == ["again", "loop", "sub/back/loop", "sub/back/set"]
    assert found.skipped == {
        "gone.jpg": f"a link to {tmp_path}/nowhere, which is not there",
        "self.jpg": "a link that leads in a circle",
    }


def test_what_is_no_file_is_never_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = folder(tmp_path / "photos", {"a.jpg": picture(), "shut/b.jpg": picture(), "denied.jpg": picture()})
    os.mkfifo(photos / "pipe.jpg")
    os.mkfifo(photos / "predictions.json")
    (photos / "null.png").symlink_to("/dev/null")
    (photos / "tty").symlink_to("/dev/zero")
    monkeypatch.chdir(photos)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
    whole_open, whole_scan = os.open, os.scandir

    def denied(path, *rest):
        if str(path).endswith("denied.jpg"):
            raise PermissionError(13, "Permission denied")
        return whole_open(path, *rest)

    def shut(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return whole_scan(path)

    monkeypatch.setattr("os.open", denied)  # the tests may run as root, whom nothing is denied
    monkeypatch.setattr("os.scandir", shut)
    found = look(tmp_path)
    assert found.photos == ["a.jpg"]
    assert found.skipped == {
        **dict.fromkeys(("null.png", "pipe.jpg", "socket.jpg"), "neither a file nor a folder"),
        "denied.jpg": "cannot be read (Permission denied)",
        "shut": "the folder cannot be read (Permission denied)",
    }
    assert found.others.total() == 2


def test_predictions_are_not_read_again_wherever_they_lie(tmp_path: Path) -> None:
    report = json.dumps({"model": "m", "classes": [], "images": {}, "skipped": {}}).encode()
    made = {f"{name}/a.png": picture("PNG") for name in ("masks", "overlays", "cams")}
    marks = (
        ("old", "predictions.json", report),
        ("stopped", UNFINISHED, MARK.encode()),
        ("", UNFINISHED, MARK.encode()),
    )
    photos = folder(tmp_path / "photos", {"a.jpg": picture(), "own/masks/b.png": picture("PNG")})
    for place, name, content in marks:
        folder(photos / place, {**made, name: content})
    (tmp_path / "elsewhere").symlink_to(photos)
    for out in ("elsewhere", "photos", "photos/new", "out"):
        found = look(tmp_path, out=out)
        assert found.photos == ["a.jpg", "own/masks/b.png"]
        assert len(found.written) == 9
        assert found.notes()[-1].startswith("9 written by esol predict, not read: cams, masks, old/cams")
        (photos / "new").mkdir(exist_ok=True)
    folder(tmp_path / "out", {**made, "predictions.json": report, "photos/c.jpg": picture()})
    assert gather(tmp_path / "out/photos", tmp_path / "out").photos == ["c.jpg"]
    (photos / "link").symlink_to(tmp_path / "out/overlays")
    assert "link" in look(tmp_path).written
    for place in ("out/overlays", "out/overlays/a.png", "out/masks"):
        with pytest.raises(EsolError, match=r"is inside .*out/.*, which would be overwritten: give another --out"):
            gather(tmp_path / place, tmp_path / "out")


def test_folders_that_somebody_else_filled_are_not_written_over(tmp_path: Path) -> None:
    for name, data in (("masks/a.png", picture("PNG")), ("predictions.json", b'{"a": 1}')):
        root = folder(tmp_path / name[0], {"photos/a.jpg": picture(), f"photos/{name}": data})
        with pytest.raises(EsolError, match="was not written by esol predict: give another --out, or move it away"):
            look(root, out="photos")


def test_names_of_outputs_never_meet_and_fit_everywhere() -> None:
    assert output_names(["a.jpg", "b/c.d.png", "e", "f.v1"]) == {
        "a.jpg": "a",
        "b/c.d.png": "b/c.d",
        "e": "e",
        "f.v1": "f.v1",
    }
    assert output_names(["a.jpg", "a.png"]) == {"a.jpg": "a.jpg", "a.png": "a.png"}
    composed, deep = "café.jpg", ("deep" * 40 + "/") * 20
    hard = [
        "a.jpg", "A.jpg", "a.png", "a", "a.jpg.png", "a/b.jpg", "a_b.jpg", "a.png/x.jpg", "a.png_/x.jpg", "D/x.jpg",
        "d/x.jpg", composed, unicodedata.normalize("NFD", composed), "straße.jpg", "STRASSE.jpg", "new\nline.jpg",
        "new_line.jpg", "new\x1bline.jpg", os.fsdecode(b"caf\xe9.jpg"), os.fsdecode(b"caf\xe8.jpg"),
        "ü" * 120 + "1.jpg", "ü" * 120 + "2.jpg", deep + "1.jpg", deep + "2.jpg",
        " .jpg", "-.jpg",
    ]  # fmt: skip
    names = output_names(hard)
    assert names.keys() == set(hard)
    folded = [unicodedata.normalize("NFC", name.casefold()) for name in names.values()]
    assert len(set(folded)) == len(hard)
    for name in names.values():
        assert name.encode().decode().isprintable()
        assert max(len(part.encode()) for part in name.split("/")) <= 180
        assert len(name.encode()) < 1100
        assert not any(part.endswith((".png", ".jpg")) for part in name.split("/")[:-1])
    assert names == output_names(hard[::-1])


def test_paths_in_the_report_are_unicode_and_different() -> None:
    paths = [os.fsdecode(b"a\xff.jpg"), "a\\xff.jpg", "é.jpg"]
    said = texts(paths)
    assert said["é.jpg"] == "é.jpg"
    assert said["a\\xff.jpg"] == "a\\xff.jpg"
    assert said[paths[0]].startswith("a\\xff.jpg (")
    assert texts(paths[:1]) == {paths[0]: "a\\xff.jpg"}
