"""`esol predict` on photos as people have them: sizes, formats, damage; the model file and its errors."""

import errno
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from esol import cli
from esol.base.errors import CheckpointError, EsolError
from esol.base.files import atomic_write
from esol.base.palette import voc_palette
from esol.config import BackboneConfig, CrfConfig, PredictionConfig
from esol.data.samples import encode_mask
from esol.data.transforms import decode
from esol.deploy.model import Model, load_network
from esol.deploy.predict import predict
from esol.models.backbones import build_backbone
from esol.models.deeplab import DeepLab
from esol.ops import tiles
from esol.ops.segmentation import enlarged_labels
from esol.pipeline.model_file import ModelInfo, read_info, write_model

GRAY, RED, BLUE = (128, 128, 128), (220, 20, 20), (20, 20, 220)
ON_EARTH = {33550: (0.2, 0.2, 0.0), 33922: (0.0, 0.0, 0.0, 5e5, 5.4e6, 0.0), 34735: (1, 1, 0, 1, 3072, 0, 1, 25832)}
INFO = ModelInfo(
    classes=("red", "blue"),
    backbone="small",
    rates=(1, 2),
    evaluate=PredictionConfig(scales=(1.0, 1.5), crf=CrfConfig(iterations=2)),
    photo_side=96,
    masks="truth",
    initial_weights="random",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that has learned to tell red and blue from gray."""
    torch.manual_seed(0)
    net = DeepLab(build_backbone(BackboneConfig("small", "none", output_stride=8, freeze="none")), 3, INFO.rates)
    colours = torch.tensor([GRAY, RED, BLUE], dtype=torch.uint8)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(40):
        cells = torch.randint(0, 3, (8, 3, 3))
        cells[:2] = 0  # background alone
        labels = cells.repeat_interleave(3, 1).repeat_interleave(3, 2)
        image = colours[labels].permute(0, 3, 1, 2).float()
        optimizer.zero_grad()
        logits = net(F.interpolate(image, (65, 65), mode="nearest"))
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    write_model(path, net.state_dict(), INFO)
    return path


def scene(width: int, height: int) -> Image.Image:
    """Gray; red on the left third, blue at the lower right."""
    pixels = np.full((height, width, 3), GRAY, np.uint8)
    pixels[:, : width // 3] = RED
    pixels[height // 2 :, width // 2 :] = BLUE
    return Image.fromarray(pixels)


def truth(width: int, height: int) -> np.ndarray:
    labels = np.zeros((height, width), np.uint8)
    labels[:, : width // 3] = 1
    labels[height // 2 :, width // 2 :] = 2
    return labels


def label_map(model: Model, image: torch.Tensor) -> np.ndarray:
    return model.label_maps([model.reduced(image)], [(image.shape[1], image.shape[2])])[0][0]


def mask_of(path: Path) -> np.ndarray:
    with Image.open(path) as png:
        assert (png.mode, png.getpalette()) == ("P", voc_palette().flatten().tolist())
        return np.asarray(png)


def test_photos_of_any_size_and_format(model: Path, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    (photos / "deep/er").mkdir(parents=True)
    scene(96, 80).save(photos / "a.jpg", quality=95)
    scene(96, 80).convert("CMYK").save(photos / "cmyk.JPG", quality=95)
    scene(200, 100).save(photos / "deep/er/wide.webp", lossless=True)
    scene(640, 960).save(photos / "deep/large.png")
    turned = scene(96, 80).transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    turned.save(photos / "turned.jpg", quality=95, exif=exif)
    assert cli_run("predict", model, photos, "--out", out) == 0
    sizes = {
        "a": (96, 80), "cmyk": (96, 80), "deep/er/wide": (200, 100), "deep/large": (640, 960), "turned": (96, 80)
    }  # fmt: skip
    for name, size in sizes.items():
        found = mask_of(out / f"masks/{name}.png")
        assert found.shape == size[::-1]
        assert (found == truth(*size)).mean() > 0.85, name
        with Image.open(out / f"overlays/{name}.jpg") as overlay:
            assert max(overlay.size) == min(max(size), 1024)
    report = json.loads((out / "predictions.json").read_text())
    assert report["classes"] == ["red", "blue"]
    assert report["skipped"] == {}
    large = report["images"]["deep/large.png"]
    assert (large["width"], large["height"]) == (640, 960)
    assert sum(large["shares"].values()) == pytest.approx(1, abs=1e-5)
    assert large["shares"]["red"] == pytest.approx((mask_of(out / "masks/deep/large.png") == 1).mean(), abs=1e-6)


def cli_run(*words: Any) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["esol", *map(str, words)])
        return cli.main()


def test_photos_without_content_are_background_or_what_they_show(model: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("L", (60, 60), 128).save(photos / "gray.png")
    Image.new("RGB", (1, 1), GRAY).save(photos / "dot.png")
    Image.new("I;16", (20, 10), 128 * 256).save(photos / "deep.png")
    assert predict(model, photos, tmp_path / "out") == 0
    for name, size in (("gray", (60, 60)), ("dot", (1, 1)), ("deep", (20, 10))):
        assert mask_of(tmp_path / f"out/masks/{name}.png").shape == size[::-1]
    report = json.loads((tmp_path / "out/predictions.json").read_text())
    assert report["images"]["gray.png"]["shares"] == {"background": 1.0}


def test_what_cannot_be_read_is_skipped_and_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    scene(96, 80).save(photos / "good.jpg")
    (photos / "cut.jpg").write_bytes((photos / "good.jpg").read_bytes()[:500])
    (photos / "empty.png").touch()
    (photos / "text.webp").write_text("no photo")
    (photos / "scan.jxl").write_bytes(b"\xff\x0a" + bytes(80))
    (photos / "notes.txt").write_text("of no concern")
    assert cli_run("predict", model, photos, "--out", out) == 1
    said = capsys.readouterr()
    assert "1 photos predicted" in said.out
    assert "4 skipped" in said.out
    assert "1 files are no pictures (1 .txt)" in said.out
    assert "skipped text.webp: the image cannot be decoded (it is neither JPEG, PNG nor WebP)" in said.err
    assert "skipped empty.png: the image is empty" in said.err
    assert "skipped scan.jxl: JPEG XL is not read: convert it to JPEG, PNG or WebP" in said.err
    report = json.loads((out / "predictions.json").read_text())
    assert list(report["images"]) == ["good.jpg"]
    assert set(report["skipped"]) == {"cut.jpg", "empty.png", "text.webp", "scan.jxl"}
    for number in range(30):
        (photos / f"{number}.gif").write_bytes(b"GIF89a")
    assert cli_run("predict", model, photos, "--out", out) == 1
    assert "and 14 more, all in " in capsys.readouterr().err


def test_odd_names_and_a_file_system_that_refuses_one_end_no_job(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "photos" / "out"
    photos.mkdir()
    png = io.BytesIO()
    scene(24, 20).save(png, "PNG")
    names = [
        b"caf\xe9.png",
        b"x" * 250,
        b"new\nline\x1b[31m.jpg",
        b"good",
        b"refused.png",
        b"A.jpg",
        b"a.jpg",
        b"a.png",
    ]
    for name in names:
        Path(os.fsdecode(bytes(photos) + b"/" + name)).write_bytes(png.getvalue())

    def write(path: Path, data: bytes | str) -> None:
        if path.name == "refused.png":
            raise OSError(errno.EILSEQ, "Illegal byte sequence")
        atomic_write(path, data)

    monkeypatch.setattr("esol.deploy.predict.atomic_write", write)
    for _ in range(2):  # the second time out is inside of what is looked at
        assert predict(model, photos, out, fast=True) == 1
        report = json.loads((out / "predictions.json").read_bytes())
        assert report["skipped"] == {"refused.png": "its outputs cannot be written (Illegal byte sequence)"}
        assert len(report["images"]) == len(names) - 1
        assert {"caf\\xe9.png", "new\nline\x1b[31m.jpg", "good"} < report["images"].keys()
        masks = {about["mask"] for about in report["images"].values()}
        assert masks == {f"masks/{path.name}" for path in (out / "masks").iterdir()}
        assert report["images"]["good"]["mask"] == "masks/good.png"
        assert len(masks) == len(names) - 1
        assert not (out / "predictions-unfinished").exists()
    said = capsys.readouterr()
    assert "2 written by esol predict, not read: out/masks, out/overlays" in said.out
    assert "\x1b" not in said.out + said.err


def test_a_full_disk_ends_the_job_in_one_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene(24, 20).save(tmp_path / "a.png")
    assert predict(model, tmp_path / "a.png", tmp_path / "out", fast=True) == 0

    def full(path: Path, data: bytes | str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("esol.deploy.predict.encode_mask", lambda labels: full(Path("masks/a.png"), b""))
    with pytest.raises(EsolError, match=r"^cannot write masks/a\.png: No space left on device$"):
        predict(model, tmp_path / "a.png", tmp_path / "out", fast=True)
    assert not (tmp_path / "out/predictions.json").exists()  # the earlier one no longer says what is there


def test_two_photos_of_one_name_do_not_overwrite_each_other(model: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    scene(40, 30).save(photos / "a.jpg")
    scene(30, 40).save(photos / "a.png")
    assert predict(model, photos, tmp_path / "out", fast=True) == 0
    assert {p.name for p in (tmp_path / "out/masks").iterdir()} == {"a.jpg.png", "a.png.png"}


def test_threads_and_batches_change_nothing(model: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(7):
        scene(60 + 10 * (i % 2), 50).rotate(30 * i, fillcolor=GRAY).save(photos / f"{i}.png")
    outs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert predict(model, photos, tmp_path / f"out{count}") == 0
            outs.append([(tmp_path / f"out{count}/masks/{i}.png").read_bytes() for i in range(7)])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert outs[0] == outs[1]
    images = [decode((photos / f"{i}.png").read_bytes(), "") for i in range(7)]
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    together = Model(model).label_maps(images, sizes)
    assert [encode_mask(mask) for mask, _ in together] == outs[0]


def test_large_photos_are_seen_at_the_size_that_was_learned_and_answered_at_their_own(model: Path) -> None:
    predictor = Model(model)
    large = torch.from_numpy(np.asarray(scene(400, 300)).copy()).permute(2, 0, 1)
    assert predictor.reduced(large).shape == (3, 72, 96)
    assert predictor.reduced(large[:, :50, :60]).shape == (3, 50, 60)
    found = label_map(predictor, large)
    assert found.shape == (300, 400)
    assert (found == truth(400, 300)).mean() > 0.9


def test_enlarged_labels_are_the_argmax_of_the_enlarged_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esol.ops.segmentation.STRIP", 2000)  # bands of a few rows
    found = torch.rand(4, 13, 21, generator=torch.Generator().manual_seed(0))
    for size in ((50, 97), (13, 21), (14, 200), (7, 9)):
        whole = F.interpolate(found[None], size, mode="bilinear", align_corners=False)[0]
        top = whole.topk(2, 0).values
        sure = (top[0] - top[1]) > 1e-5
        labels, confidence = enlarged_labels(found, found, size)
        assert torch.equal(torch.from_numpy(labels)[sure], whole.argmax(0).to(torch.uint8)[sure])
        assert np.allclose(confidence / 65535, top[0], atol=1e-4)


def test_what_is_too_large_for_the_network_is_seen_at_its_own_size_in_windows(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene(400, 300).save(tmp_path / "large.png")
    large = decode((tmp_path / "large.png").read_bytes(), "large")
    predictor = Model(model, full_size=True)
    predictor.config = replace(predictor.config, crf=CrfConfig(iterations=0))
    whole = label_map(predictor, large)
    heard: list[str] = []
    monkeypatch.setattr(tiles, "SIDE", 128)
    monkeypatch.setattr(tiles, "MARGIN", 32)
    cut, confidence = predictor.label_maps([large], [(300, 400)], heard.append)[0]
    assert heard[0].startswith("scale 1, window 1 of ")
    assert heard[-1] == "mask, window 20 of 20"
    assert (cut == whole).mean() > 0.99
    assert (cut == truth(400, 300)).mean() > 0.97
    assert confidence.shape == (300, 400)
    assert (confidence / 65535 > 1 / 3).all()
    # a photo that is made smaller first, and still too large: answered at its own size
    seen = predictor.label_maps([large], [(600, 800)])[0][0]
    assert (seen == truth(800, 600)).mean() > 0.97


@pytest.mark.parametrize("has", [True, False])
def test_a_model_predicts_in_the_precision_in_which_it_was_evaluated_where_the_machine_has_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: bool
) -> None:
    monkeypatch.setattr("esol.engines.ranks.cpu_has_bf16", lambda: has)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    net, info = load_network(model)
    half = tmp_path / "half.safetensors"
    write_model(half, net.state_dict(), replace(info, precision="bf16"))
    image = torch.from_numpy(np.asarray(scene(96, 80)).copy()).permute(2, 0, 1)
    seen: list[torch.dtype] = []
    answers = []
    for path in (model, half):
        predictor = Model(path)
        predictor.net.aspp[0].register_forward_hook(lambda layer, given, made: seen.append(given[0].dtype))
        answers.append(label_map(predictor, image))
    assert set(seen[: len(seen) // 2]) == {torch.float32}
    assert set(seen[len(seen) // 2 :]) == {torch.bfloat16 if has else torch.float32}
    assert (answers[0] == answers[1]).mean() > 0.99


def test_confidence_and_a_place_on_earth_beside_the_masks(model: Path, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    scene(96, 80).save(photos / "plain.tif")
    scene(96, 80).save(photos / "aerial.tif", tiffinfo=ON_EARTH)
    assert predict(model, photos, out, confidence=True, full_size=True) == 0
    report = json.loads((out / "predictions.json").read_text())["images"]
    assert "geotiff" not in report["plain.tif"]
    assert report["aerial.tif"]["geotiff"] == "geotiff/aerial.tif"
    with Image.open(out / "geotiff/aerial.tif") as mask:
        assert np.array_equal(np.asarray(mask), mask_of(out / "masks/aerial.png"))
        assert {tag: mask.tag_v2[tag] for tag in ON_EARTH} == ON_EARTH
    with Image.open(out / report["plain.tif"]["confidence"]) as sure:
        assert sure.mode == "I;16"
        assert 0 <= np.asarray(sure).min() < np.asarray(sure).max() <= 65535


def test_the_file_says_how_to_predict(model: Path, tmp_path: Path) -> None:
    assert read_info(model) == INFO
    net, info = load_network(model.parent)  # a folder that holds it
    assert not net.training
    assert info == INFO
    other = tmp_path / "other.safetensors"
    for _ in range(8):  # an order left to chance would show in one of them
        write_model(other, net.state_dict(), INFO)
        assert other.read_bytes() == model.read_bytes()
    write_model(other, net.state_dict(), replace(INFO, classes=("red", "blue", "green")))
    with pytest.raises(CheckpointError, match=r"other\.safetensors cannot be used"):
        load_network(other)


def test_errors_name_the_place_and_what_to_give(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    photo = tmp_path / "a.png"
    scene(20, 20).save(photo)
    with pytest.raises(CheckpointError, match=r"nowhere is missing: give the run directory"):
        predict(tmp_path / "nowhere", photo, out)
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match=r"plain\.safetensors is no DeepLab that esol wrote"):
        read_info(tmp_path / "plain.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(CheckpointError, match=r"cannot be read as safetensors"):
        read_info(tmp_path / "text.safetensors")
    with pytest.raises(EsolError, match="no such photo or folder"):
        predict(model, tmp_path / "nowhere", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EsolError, match=r"empty holds no photo \(JPEG, PNG, WebP, TIFF, BMP, GIF or AVIF\)$"):
        predict(model, tmp_path / "empty", out)
    with pytest.raises(EsolError, match=r"--cam: .*model\.safetensors is no run directory"):
        predict(model, photo, out, cam=True)
    with pytest.raises(EsolError, match=r"--out .*a\.png is a file"):
        predict(model, photo, photo)
    assert not out.exists()


def test_served_photos_are_answered_like_predicted_ones(model: Path, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="comes with mlflow")
    from base64 import b64decode

    from esol.deploy.serving import _load_pyfunc

    scene(120, 90).save(tmp_path / "a.png")
    assert predict(model, tmp_path / "a.png", tmp_path / "out") == 0
    served = _load_pyfunc(str(model)).predict(pandas.DataFrame({"image": [(tmp_path / "a.png").read_bytes()]}))
    mask = np.asarray(Image.open(io.BytesIO(b64decode(served["mask"][0]))))
    assert np.array_equal(mask, mask_of(tmp_path / "out/masks/a.png"))
    report = json.loads((tmp_path / "out/predictions.json").read_text())
    assert json.loads(served["shares"][0]) == report["images"]["a.png"]["shares"]
