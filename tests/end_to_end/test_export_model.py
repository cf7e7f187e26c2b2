"""`esol export` and `esol predict` of a finished run: graphs, a served model that answers, the model card."""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import BIN, ROOT, esol

from esol.config import BackboneConfig
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.samples import decode_mask
from esol.data.transforms import decode
from esol.deploy.export import TOLERANCE, Graph, _with_fixed_padding
from esol.deploy.model import load_network
from esol.models.backbones import build_backbone
from esol.models.deeplab import DeepLab
from esol.ops.segmentation import blended, logits_by_scale


@pytest.fixture(scope="module")
def exported(one: Path) -> Path:
    out = one.parent / "exported"
    done = esol("export", one, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def photos(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photos of val as files."""
    folder, reader = tmp_path_factory.mktemp("photos"), ShardReader(Index.load(shard_set))
    for ordinal in reader.index.split("val")[:4]:
        suffix = reader.index.image_ext(ordinal)
        (folder / f"{reader.index.keys[ordinal]}.{suffix}").write_bytes(reader.image(ordinal))
    return folder


def test_graphs_agree_with_the_network_at_sizes_that_export_has_not_tried(exported: Path, photos: Path) -> None:
    import onnxruntime

    net, _ = load_network(exported)
    graph, program = Graph(net), torch.export.load(exported / "model.pt2").module()
    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    first = sorted(photos.iterdir())[0]
    photo = decode(first.read_bytes(), first.name)[None]
    for image in (photo, photo[..., :49, :57].repeat(3, 1, 1, 1), photo[..., :9, :10], photo.repeat(1, 1, 3, 2)):
        with torch.no_grad():
            found = graph(image)
        assert found.shape == (len(image), net.num_labels, *image.shape[2:])
        torch.testing.assert_close(found.sum(1), torch.ones(len(image), *image.shape[2:]))
        torch.testing.assert_close(program(image), found, rtol=0, atol=1e-5)
        onnx = session.run(None, {"image": image.numpy()})[0]
        assert np.abs(onnx - found.numpy()).max() <= TOLERANCE
    # at sizes of the network's grid padding does nothing, and this is what predict --fast sees
    with torch.no_grad():
        torch.testing.assert_close(
            graph(photo[..., :49, :57])[0], blended(logits_by_scale(photo[..., :49, :57], net, flip=False)[0], (49, 57))
        )


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "test_convnext"])  # the second has kernels of 2 by 2
def test_networks_that_pad_by_size_are_exported_with_fixed_padding(name: str) -> None:
    """TensorFlow's padding, which torch.export cannot write, is constant at the sizes that the graph pads photos to."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(f"timm:{name}", "none", output_stride=8, freeze="all"))
    net = DeepLab(backbone, 3).eval()
    fixed = _with_fixed_padding(net)
    assert any(type(module).__name__ == "Conv2dSame" for module in net.modules())
    assert not any(type(module).__name__ == "Conv2dSame" for module in fixed.modules())
    for size in ((9, 17), (65, 97), (129, 41)):
        image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
        with torch.no_grad():
            torch.testing.assert_close(fixed(image), net(image))


def test_run_and_exported_folder_predict_as_evaluate_did(
    one: Path, exported: Path, photos: Path, tmp_path: Path
) -> None:
    for name, model in (("run", one), ("folder", exported), ("file", exported / "model.safetensors")):
        done = esol("predict", model, photos, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert "4 photos predicted" in done.stdout
    evaluated = ShardReader(Index.load(one / "evaluate"))
    for mask in (tmp_path / "run/masks").iterdir():
        (ordinal,) = np.flatnonzero(evaluated.index.keys == mask.stem)
        there = decode_mask(evaluated.read(ordinal, "mask.png"), mask.name)
        assert (np.asarray(Image.open(mask)) == there).mean() > 0.999  # another number of threads
        for name in ("folder", "file"):
            assert (tmp_path / name / "masks" / mask.name).read_bytes() == mask.read_bytes()


def test_class_maps_of_a_users_photos(one: Path, exported: Path, photos: Path, tmp_path: Path) -> None:
    done = esol("predict", one, photos, "--out", tmp_path / "out", "--cam", "--fast")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/predictions.json").read_text())
    maps = {f"{Path(name).stem}.{label}.png" for name, own in report["images"].items() for label in own["found"]}
    assert all(0.5 < chance <= 1 for own in report["images"].values() for chance in own["found"].values())
    assert {path.name for path in (tmp_path / "out").glob("cams/*")} == maps
    done = esol("predict", exported, photos, "--out", tmp_path / "other", "--cam")
    assert done.returncode == 2
    assert "exported is no run directory; class maps need the networks of classify" in done.stderr


def test_masks_come_with_how_sure_their_stage_is_of_them(one: Path, tmp_path: Path) -> None:
    for stage in ("psa_masks", "evaluate"):
        done = esol("export-masks", one, "--to", "png", "--stage", stage, "--confidence", "--out", tmp_path / stage)
        assert done.returncode == 0, done.stderr
        masks = {path.name for path in (tmp_path / stage / "masks").iterdir()}
        assert {path.name for path in (tmp_path / stage / "confidence").iterdir()} == masks
        with Image.open(tmp_path / stage / "confidence" / min(masks)) as sure:
            assert sure.mode == "I;16"
            assert 0 <= np.asarray(sure).min() < np.asarray(sure).max() <= 65535
    # where a class's score is above one half its mask is that class, before the CRF at least
    for name in masks:
        shape = np.asarray(Image.open(tmp_path / "evaluate/masks" / name)).shape
        assert np.asarray(Image.open(tmp_path / "evaluate/confidence" / name)).shape == shape


def test_the_model_card_is_the_runs(one: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    results = json.loads((one / "results.json").read_text())
    for part in (
        "background or one of 5 classes: cactus, fish, mushroom, rocket, snail",
        "pseudo masks (irn_masks) that image-level labels led to",
        "segment learned from 48 photos of the split train",
        "evaluated on 8 photos of the split val",
        "initial weights: random",
        f"| DeepLab, learned from irn_masks + CRF | val | {results['evaluate']['crf_miou']:.2f} |",
        f"| fish | {results['evaluate']['iou_fish']:.2f} |",
        "probabilities within",
        "Weakest class:",
    ):
        assert part in card, part
    config = json.loads((exported / "config.json").read_text())
    assert config["classes"] == ["cactus", "fish", "mushroom", "rocket", "snail"]


def test_no_file_names_a_folder_of_the_machine_that_exported_it(exported: Path) -> None:
    folders = (str(ROOT), str(exported.parent), str(Path(torch.__file__).parents[1]))
    files = [path for path in exported.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        data = path.read_bytes()
        if path.suffix == ".pt2":
            with zipfile.ZipFile(path) as parts:
                data = b"".join(map(parts.read, parts.namelist()))
        assert not [folder for folder in folders if folder.encode() in data], path


def test_mlflow_serves_the_model_and_answers(exported: Path, photos: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [BIN / "mlflow", "models", "serve", "-m", exported / "mlflow", "--env-manager", "local"]
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, server.stderr and server.stderr.read()
            assert time.monotonic() < deadline, "the server did not come up in 120 s"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        photo = sorted(photos.iterdir())[0]
        (answer,) = _ask(port, photo.read_bytes())["predictions"]
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["mask"]))))
        assert esol("predict", exported, photo, "--out", tmp_path / "out").returncode == 0
        assert np.array_equal(mask, np.asarray(Image.open(tmp_path / f"out/masks/{photo.stem}.png")))
        assert sum(json.loads(answer["shares"]).values()) == pytest.approx(1, abs=1e-5)
        (quick,) = _ask(port, photo.read_bytes(), {"fast": True})["predictions"]
        assert esol("predict", exported, photo, "--out", tmp_path / "fast", "--fast").returncode == 0
        assert base64.b64decode(quick["mask"]) == (tmp_path / f"fast/masks/{photo.stem}.png").read_bytes()
        with pytest.raises(urllib.error.HTTPError) as error:
            _ask(port, photo.read_bytes(), {"fast": "quite"})
        assert error.value.code == 400
        assert b"fast" in error.value.read()
        with pytest.raises(urllib.error.HTTPError) as error:
            _ask(port, b"no photo")
        assert error.value.code == 400
        assert b"row 0: the image cannot be decoded" in error.value.read()
        text = base64.urlsafe_b64encode(photo.read_bytes()).decode().rstrip("=")
        assert _ask(port, f"data:image/jpeg;base64,{text}")["predictions"] == [answer]
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def _ask(port: int, photo: bytes | str, params: dict[str, object] | None = None) -> dict:
    text = photo if isinstance(photo, str) else base64.b64encode(photo).decode()
    table = {"columns": ["image"], "data": [[text]]}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps({"dataframe_split": table, "params": params or {}}).encode(),
        {"Content-Type": "application/json"},
    )
    return json.loads(urllib.request.urlopen(request, timeout=60).read())


def test_export_wants_a_finished_run_and_an_empty_folder(one: Path, exported: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in exported.rglob("*")}
    again = esol("export", one, "--out", exported)
    assert again.returncode == 2
    assert f"--out {exported}: choose a new or an empty folder" in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in exported.rglob("*")}
    nothing = esol("export", tmp_path, "--out", tmp_path / "out")
    assert nothing.returncode == 2
    assert "is no run directory: give the run_dir of a run with a finished segment stage" in nothing.stderr
    shutil.copytree(one / "classify", tmp_path / "run/classify")
    early = esol("export", tmp_path / "run", "--out", tmp_path / "out")
    assert early.returncode == 2
    assert "run has no finished segment: run it to its end" in early.stderr
    assert not (tmp_path / "out").exists()
