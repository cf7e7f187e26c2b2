"""The MLflow model that `esol export` writes: photos in, masks and class shares out. MLflow calls _load_pyfunc."""

from __future__ import annotations

import base64
import json
from collections import deque
from concurrent.futures import Future
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from esol.base.errors import DataError
from esol.data.samples import encode_mask
from esol.data.transforms import decode
from esol.deploy.model import Model
from esol.pipeline.crew import AHEAD, Crew

LARGEST = 2**26  # bytes or characters of a photo as it is sent
PIXELS = 2**25  # of a photo: what a small file says that it holds may be more than there is memory


class ServedModel:
    """predict as MLflow's python_function wants it.

    MLflow calls it from many threads. Whoever sent them, as many photos are worked on at once as there are cores, one
    thread each; all others wait as the text that was sent.
    """

    def __init__(self, path: str) -> None:
        model = Model(path)
        self._models = {False: model, True: model.faster()}
        self._crew = Crew(model.device)
        self._pool = self._crew.pool()

    def predict(self, table: Any, params: dict[str, Any] | None = None) -> Any:
        """A pandas table with a column image, bytes of JPEG, PNG or WebP or their base64 -> one with mask and shares.

        mask: base64 of a palette PNG of the photo's size; shares: JSON, label -> its share of the pixels; params: fast,
        whether to predict as Model(..., fast=True) does. DataError names the row of a photo that cannot be decoded or
        is too large, and why.
        """
        import pandas

        if "image" not in table:
            raise DataError(f"the table needs a column image, not {', '.join(map(str, table))}")
        model = self._models[bool(params and params.get("fast"))]
        rows, waiting = [], deque[Future[dict[str, str]]]()
        try:
            for number, data in enumerate(table["image"]):
                waiting.append(self._pool.submit(self._answer, model, data, f"row {number}"))
                if len(waiting) > AHEAD * self._crew.threads:  # so that long tables let others in between
                    rows.append(waiting.popleft().result())
            while waiting:
                rows.append(waiting.popleft().result())
        finally:
            for one in waiting:
                one.cancel()
        return pandas.DataFrame(rows, columns=["mask", "shares"])

    def _answer(self, model: Model, sent: Any, name: str) -> dict[str, str]:
        image = decode(photo_bytes(sent, name), name, PIXELS)
        reduced, size = model.reduced(image), (image.shape[1], image.shape[2])
        with self._crew.room((reduced.shape[1], reduced.shape[2])):
            labels = model.label_maps([reduced], [size])[0][0]
        return {"mask": base64.b64encode(encode_mask(labels)).decode(), "shares": json.dumps(model.shares(labels))}


def photo_bytes(value: Any, name: str) -> bytes:
    """A photo from what clients send: its bytes, base64 in either alphabet, or a data URI; DataError naming `name`."""
    if isinstance(value, (bytes, bytearray, memoryview, str)) and len(value) > LARGEST:
        raise DataError(f"{name}: image is longer than {LARGEST:,} bytes: make the photo smaller")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if not isinstance(value, str):
        raise DataError(f"{name}: image must be a photo's bytes or their base64, not {type(value).__name__}")
    text = value.strip()
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma:
            raise DataError(f"{name}: the data URI has no comma before its content")
        if not head.lower().endswith(";base64"):
            return unquote_to_bytes(text)
        text = unquote(text)
    text = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise DataError(f"{name}: image is no base64 ({error})") from error


def _load_pyfunc(path: str) -> ServedModel:
    return ServedModel(path)
