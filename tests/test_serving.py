"""What clients of the served model send as a photo."""

import base64
from urllib.parse import quote, quote_from_bytes

import pandas
import pytest

from esol.base.errors import DataError
from esol.deploy.serving import ServedModel, photo_bytes

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
