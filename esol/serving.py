"""The MLflow model that `esol export` writes: photos in, masks and class shares out. MLflow calls _load_pyfunc."""

from __future__ import annotations

import base64
import json
from typing import Any

from esol.data.transforms import decode
from esol.predict import Predictor
from shards.samples import encode_mask


class ServedModel:
    """predict as MLflow's python_function wants it."""

    def __init__(self, path: str) -> None:
        self._predictor = Predictor(path)

    def predict(self, table: Any, params: dict[str, Any] | None = None) -> Any:
        """A pandas table with a column image, bytes of JPEG, PNG or WebP -> one with mask and shares.

        mask: base64 of a palette PNG of the photo's size; shares: JSON, label -> its share of the pixels. DataError
        names the row of a photo that cannot be decoded.
        """
        import pandas

        rows = []
        for number, data in enumerate(table["image"]):
            labels = self._predictor.label_map(decode(bytes(data), f"row {number}"))
            mask = base64.b64encode(encode_mask(labels)).decode()
            rows.append({"mask": mask, "shares": json.dumps(self._predictor.shares(labels))})
        return pandas.DataFrame(rows, columns=["mask", "shares"])


def _load_pyfunc(path: str) -> ServedModel:
    return ServedModel(path)
