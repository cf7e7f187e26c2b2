"""The MLflow model that `esol export` writes: photos in, masks and class shares out. MLflow calls _load_pyfunc."""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from esol.base.errors import DataError
from esol.data.samples import encode_mask
from esol.data.transforms import decode
from esol.deploy.model import Model


class ServedModel:
    """predict as MLflow's python_function wants it."""

    def __init__(self, path: str) -> None:
        self._model = Model(path)

    def predict(self, table: Any, params: dict[str, Any] | None = None) -> Any:
        """A pandas table with a column image, bytes of JPEG, PNG or WebP or their base64 -> one with mask and shares.

        mask: base64 of a palette PNG of the photo's size; shares: JSON, label -> its share of the pixels. DataError
        names the row of a photo that cannot be decoded, and why.
        """
        import pandas

        if "image" not in table:
            raise DataError(f"the table needs a column image, not {', '.join(map(str, table))}")
        rows = []
        for number, data in enumerate(table["image"]):
            labels = self._model.label_map(decode(photo_bytes(data, f"row {number}"), f"row {number}"))
            mask = base64.b64encode(encode_mask(labels)).decode()
            rows.append({"mask": mask, "shares": json.dumps(self._model.shares(labels))})
        return pandas.DataFrame(rows, columns=["mask", "shares"])


def photo_bytes(value: Any, name: str) -> bytes:
    """A photo from what clients send: its bytes, base64 in either alphabet, or a data URI; DataError naming `name`."""
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
