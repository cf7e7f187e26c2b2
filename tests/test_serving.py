"""The served model: what clients send as a photo, and many of them at once."""

import base64
import io
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, quote_from_bytes

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from esol.base.errors import DataError
from esol.config import BackboneConfig, CrfConfig, PredictionConfig
from esol.deploy import serving
from esol.deploy.model import Model
from esol.deploy.serving import ServedModel, photo_bytes
from esol.models.backbones import build_backbone
from esol.models.deeplab import DeepLab
from esol.pipeline.model_file import ModelInfo, write_model

PHOTO = bytes(range(256)) + b"\xfb\xff"  # its base64 has + and /, and padding
TEXT = base64.b64encode(PHOTO).decode()


@pytest.mark.parametrize(
    "sent",
    [
        PHOTO,
        bytearray(PHOTO),
        TEXT,
        TEXT.rstrip("="),
        f"  {TEXT[:50]}\r\n{TEXT[50:]}\n",
        base64.urlsafe_b64encode(PHOTO).decode(),
        base64.urlsafe_b64encode(PHOTO).decode().rstrip("="),
        f"data:image/jpeg;base64,{TEXT}",
        f"DATA:image/jpeg;charset=utf-8;BASE64,{quote(TEXT)}",
        f"data:image/jpeg,{quote_from_bytes(PHOTO)}",
    ],
)
def test_bytes_base64_of_either_alphabet_and_data_uris_are_one_photo(sent: object) -> None:
    assert photo_bytes(sent, "row 0") == PHOTO


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ("no photo!", "row 3: image is no base64"),
        ("data:image/png;base64", "row 3: the data URI has no comma"),
        (None, "row 3: image must be a photo's bytes or their base64, not NoneType"),
        (["x"], "not list"),
    ],
)
def test_what_is_no_photo_says_why(sent: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        photo_bytes(sent, "row 3")
    with pytest.raises(DataError, match="needs a column image, not picture"):
        ServedModel.predict(object.__new__(ServedModel), pandas.DataFrame({"picture": [PHOTO]}))


def jpeg(seed: int, side: int = 40) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((side, side - 7)).save(out, "JPEG")
    return out.getvalue()


def claiming(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header says that it has this size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def ask(model: ServedModel, *photos: bytes | str, **params: bool) -> list[tuple[str, str]]:
    answer = model.predict(pandas.DataFrame({"image": list(photos)}), params)
    return list(answer.itertuples(index=False, name=None))


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = DeepLab(build_backbone(BackboneConfig("small", "none", output_stride=8, freeze="none")), 3, (1, 2))
    for layer in net.aspp:
        torch.nn.init.normal_(layer.weight)  # labels that differ from pixel to pixel
    settings = PredictionConfig(scales=(1.0, 1.5), crf=CrfConfig(iterations=2))
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    write_model(path, net.state_dict(), ModelInfo(("red", "blue"), "small", (1, 2), settings, 64, "truth", "random"))
    return path


@pytest.mark.usefixtures("three_threads")
def test_many_clients_at_once_get_bit_for_bit_what_each_gets_alone(weights: Path) -> None:
    model = ServedModel(str(weights))
    photos = [jpeg(seed, 40 + 9 * (seed % 4)) for seed in range(12)]
    alone = {(i, fast): ask(model, photo, fast=fast) for i, photo in enumerate(photos) for fast in (False, True)}
    with ThreadPoolExecutor(12) as clients:
        asked = {key: clients.submit(ask, model, photos[key[0]], fast=key[1]) for key in alone}
        assert {key: answer.result(60) for key, answer in asked.items()} == alone
    assert ask(model, *photos) == [alone[i, False][0] for i in range(12)]  # as one table, in its order
    assert [alone[i, True] for i in range(12)] != [alone[i, False] for i in range(12)]
    for fast in (False, True):
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(alone[1, fast][0][0]))))
        image = Image.open(io.BytesIO(photos[1]))
        assert np.array_equal(mask, Model(weights, fast=fast).predict(image).mask)


class Counting:
    """Stands in for a model: counts how many photos are worked on at once, three at a time alone get past it."""

    device = torch.device("cpu")

    def __init__(self, path: str) -> None:
        self.barrier, self.lock = threading.Barrier(3, timeout=20), threading.Lock()
        self.now, self.most, self.all = 0, 0, 0

    def faster(self) -> "Counting":
        return self

    def reduced(self, image: torch.Tensor) -> torch.Tensor:
        return image

    def label_maps(
        self, images: list[torch.Tensor], sizes: list[tuple[int, int]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        with self.lock:
            self.now, self.all = self.now + len(images), self.all + len(images)
            self.most = max(self.most, self.now)
        self.barrier.wait()
        with self.lock:
            self.now -= len(images)
        return [(np.zeros(size, np.uint8), np.zeros(size, np.uint16)) for size in sizes]

    def shares(self, labels: np.ndarray) -> dict[str, float]:
        return {"threads": torch.get_num_threads()}


@pytest.mark.usefixtures("three_threads")
def test_as_many_photos_are_worked_on_as_there_are_cores_whoever_sent_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Counting] = []
    monkeypatch.setattr(serving, "Model", lambda path: made.append(Counting(path)) or made[0])
    model = ServedModel("x")
    with ThreadPoolExecutor(14) as clients:
        asked = [clients.submit(ask, model, *[jpeg(0)] * count) for count in (10, *[1] * 14)]
        found = [row for one in asked for row in one.result(60)]
    assert len(found) == made[0].all == 24
    assert made[0].most == 3
    assert {shares for _, shares in found} == {'{"threads": 1}'}


@pytest.mark.usefixtures("three_threads")
def test_a_bad_photo_is_named_and_hurts_no_other_request(weights: Path) -> None:
    model, good = ServedModel(str(weights)), jpeg(0)
    alone = ask(model, good)
    bad = [b"no photo", good[:300], claiming(good, 8000, 8000), base64.b64encode(good).decode() + "!"]
    with ThreadPoolExecutor(12) as clients:
        wrong = [clients.submit(ask, model, good, photo, good) for photo in bad * 2]
        right = [clients.submit(ask, model, good) for _ in range(8)]
        for one in wrong:
            with pytest.raises(DataError, match=r"^row 1: "):
                one.result(60)
        assert [one.result(60) for one in right] == [alone] * 8
    assert ask(model, good) == alone


def test_what_is_too_large_is_refused_before_it_is_decoded(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = ServedModel(str(weights)), io.BytesIO()
    Image.new("L", (9000, 8000)).save(out, "PNG")  # 70 kB that would be 288 MB on the way to a tensor
    too_many = r"row 0: the photo has {} pixels, more than the 33,554,432 that are taken: make it smaller"
    with pytest.raises(DataError, match=too_many.format("9000 x 8000 = 72,000,000")):
        ask(model, out.getvalue())
    with pytest.raises(DataError, match=too_many.format("10000 x 9000 = 90,000,000")):
        ask(model, claiming(jpeg(0), 10000, 9000))
    with pytest.raises(DataError, match=too_many.format("65000 x 65000 = 4,225,000,000")):
        ask(model, claiming(jpeg(0), 65000, 65000))
    monkeypatch.setattr(serving, "LARGEST", 1000)
    for sent in (bytes(1001), "A" * 1001):
        with pytest.raises(DataError, match=r"row 0: image is longer than 1,000 bytes: make the photo smaller"):
            ask(model, sent)
