"""What a photo's bytes are and which way up it is: decided here for create, verify, training, predict and serving."""

from __future__ import annotations

import io
import warnings
import zlib
from contextlib import suppress

import numpy as np
from PIL import Image, UnidentifiedImageError

from esol.base.errors import DataError
from esol.data.tiff import check_size, eight_bits, wide_tiff

warnings.filterwarnings("ignore", "Corrupt EXIF data")  # such a block counts for nothing, and every reader meets it

ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
HEAD = 64  # bytes that tell a format
NEEDS_HEIC = "HEIC is read with another package: pip install 'esol[heic]', or convert it to JPEG"
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"crx ": "RAW"}
_BRANDS |= dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC")
_PNG = b"\x89PNG\r\n\x1a\n"
_STARTS = {
    b"\xff\xd8\xff": "JPEG", _PNG: "PNG",
    b"GIF8": "GIF", b"II*\0": "TIFF or RAW", b"MM\0*": "TIFF or RAW", b"II+\0": "TIFF", b"MM\0+": "TIFF",
    b"\0\0\0\x0cJXL ": "JPEG XL", b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"8BPS": "Photoshop", b"FUJIFILMCCD-RAW": "RAW", b"IIRO": "RAW", b"IIRS": "RAW", b"IIU\0": "RAW", b"FOVb": "RAW",
    b"II\x1a\0\0\0HEAPCCDR": "RAW", b"v/1\x01": "OpenEXR", b"#?RADIANCE": "Radiance HDR",
}  # fmt: skip


def photo_format(data: bytes) -> str:
    """The picture format that a file begins with, one that is read or not; empty where none is known."""
    if data[4:8] == b"ftyp":
        end = min(len(data), HEAD, int.from_bytes(data[:4], "big"))
        brands = {data[start : start + 4] for start in range(8, end, 4)}
        return next((name for brand, name in _BRANDS.items() if brand in brands), "")
    if data[:4] == b"RIFF":
        return "WebP" if data[8:12] == b"WEBP" else ""
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0":
        return "BMP"
    return next((name for start, name in _STARTS.items() if data.startswith(start)), "")


OTHERS = {"TIFF or RAW": "TIFF", "TIFF": "TIFF", "BMP": "BMP", "GIF": "GIF", "AVIF": "AVIF", "HEIC": "HEIF"}
"""Formats that are read by way of Pillow, as `photo_format` names them, and Pillow's own names."""

_SUBFILE, _DNG = 254, 50706  # TIFF tags: a smaller version of another picture; a camera's raw data


def other_photo(data: bytes, name: str, most: int | None = None) -> Image.Image | None:
    """The first picture of a file in one of OTHERS, None for any other file; most: see check_size.

    DataError where such a file cannot be read, or holds numbers that are no picture's.
    """
    kind = photo_format(data)
    if kind not in OTHERS:
        return None
    if kind == "HEIC":
        try:
            import pillow_heif
        except ImportError:
            raise DataError(f"{name}: {NEEDS_HEIC}") from None
        pillow_heif.register_heif_opener()
    try:
        image = Image.open(io.BytesIO(data), formats=[OTHERS[kind]])
        tags = getattr(image, "tag_v2", {})
        if data[8:10] == b"CR" or _DNG in tags or int(tags.get(_SUBFILE, 0)) & 1:
            raise DataError(f"{name}: camera raw data are not read: convert them to JPEG, PNG or WebP")
        check_size(image.size, name, most)
        image.load()
    except UnidentifiedImageError as error:
        if OTHERS[kind] == "TIFF":
            return wide_tiff(data, name, most)
        raise DataError(f"{name}: this kind of {kind} is not read: convert it to 8 bits, or to PNG") from error
    except DataError:
        raise
    except Exception as error:  # Pillow raises whatever a damaged file leads its parsers to
        raise DataError(f"{name}: unreadable {kind} ({error}); {len(data)} bytes") from error
    if image.mode in ("F", "I"):
        raise DataError(f"{name}: its pixels are fractions or wide numbers, not brightness: scale them to 8 or 16 bits")
    return image


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height as a JPEG's header has them, for a tenth of what Pillow takes where nothing is odd."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xFF:  # a filling byte
            at += 1
        elif 0xC0 <= data[at + 1] <= 0xCF and data[at + 1] not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        elif data[at + 1] in (0x01, *range(0xD0, 0xD9)):  # these have no length
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as header:
        return header.size


def check_png(data: bytes) -> None:
    """ValueError for a PNG whose header, palette or pixels are not those that were written, by their checksums.

    Pillow stops reading once it has every pixel, before the checksum of the last piece: damage near its end would give
    other pixels without a word. Nothing for other formats, and where a chunk cannot be followed: decoding says that.
    """
    at = 8 if data.startswith(_PNG) else len(data)
    while at + 12 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 8 + int.from_bytes(data[at : at + 4], "big")
        if kind == b"IEND":
            return
        if kind in (b"IHDR", b"PLTE", b"IDAT"):
            if end + 4 > len(data):
                raise ValueError(f"it is cut off in its {kind.decode()}")
            if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
                raise ValueError(f"the checksum of its {kind.decode()} is wrong")
        at = end + 4


def orientation(image: Image.Image) -> int:
    """1..8, how a photo has to be turned: the Orientation of its EXIF block, 1 where that has none or another value.

    The block may stand behind others (XMP, a thermal camera's own), the value may have any whole-number type. XMP alone
    does not count, as in browsers: what a viewer shows is what a mask was drawn over.
    """
    value = None
    if image.format == "PNG":
        image.load()  # eXIf may stand behind the pixels
    with suppress(Exception):  # whatever a damaged block leads Pillow's parser to
        if block := image.info.get("exif"):
            exif = Image.Exif()
            exif.load(block)
            value = exif.get(ORIENTATION)
    if isinstance(value, (tuple, bytes)) and value:  # several values, or of type BYTE
        value = value[0]
    return value if isinstance(value, int) and value in _TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as viewers show it."""
    width, height = image.size
    return (height, width) if orientation(image) >= 5 else (width, height)


def upright_rgb(image: Image.Image) -> Image.Image:
    """The photo as viewers show it: upright, 8-bit RGB, what is transparent over white.

    16-bit gray keeps the upper eight of the bits that it uses (tiff.eight_bits). The colours under full transparency
    are nobody's business: cameras and editors leave anything there.
    """
    turn = _TURNS.get(orientation(image))
    if image.mode.startswith("I"):  # 16-bit gray
        image = Image.fromarray(eight_bits(np.asarray(image).astype(np.int64).clip(0).astype(np.uint64)))
    elif image.mode == "F":
        image = image.convert("L")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)
