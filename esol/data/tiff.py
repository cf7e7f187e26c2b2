"""What Pillow does not do for TIFF files: kinds of pixels that it cannot read, and where on Earth they lie."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from esol.base.errors import DataError
from esol.base.palette import voc_palette

NEEDS_RASTERIO = "this kind of TIFF is read with another package: pip install 'esol[geo]', or convert it to 8-bit RGB"
MOST_PIXELS = 1 << 28  # of a photo: 0.8 GB as bytes; Pillow's own limit for what it decodes is two thirds of it
_PLACE = (33550, 33922, 34264, 34735, 34736, 34737)  # GeoTIFF's: pixel size, tie points, transformation, keys
_BIG = 43  # the version of BigTIFF, whose header is longer


def check_size(size: tuple[int, int], name: str, most: int | None) -> None:
    """DataError where a photo of this width and height has more than `most` pixels, before any of them is decoded.

    None: more than MOST_PIXELS, for a file of a few bytes may say that it holds whatever it likes.
    """
    most = MOST_PIXELS if most is None else most
    if size[0] * size[1] > most:
        pixels = f"{size[0]} x {size[1]} = {size[0] * size[1]:,} pixels"
        raise DataError(f"{name}: the photo has {pixels}, more than the {most:,} that are taken: make it smaller")


def wide_tiff(data: bytes, name: str, most: int | None = None) -> Image.Image:
    """The picture of a TIFF file of more bands or bits than Pillow reads, by rasterio: its red, green and blue, else
    its first three bands, else its first; DataError where that cannot be; most: see check_size."""
    try:
        import rasterio
        from rasterio.enums import ColorInterp
    except ImportError:
        raise DataError(f"{name}: {NEEDS_RASTERIO}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # many a TIFF lies nowhere on Earth
            with rasterio.MemoryFile(data) as file, file.open(driver="GTiff") as picture:
                check_size((picture.width, picture.height), name, most)
                named = {kind: band for band, kind in zip(picture.indexes, picture.colorinterp, strict=True)}
                wanted = [named.get(kind, 0) for kind in (ColorInterp.red, ColorInterp.green, ColorInterp.blue)]
                bands = picture.read(wanted if all(wanted) else [1, 2, 3] if picture.count >= 3 else [1])
    except DataError:
        raise
    except Exception as error:  # GDAL's own, of many kinds
        raise DataError(f"{name}: unreadable TIFF ({error}); {len(data)} bytes") from error
    if bands.dtype.kind != "u":
        what = "its pixels are fractions or signed numbers, not brightness: scale them to 8 or 16 bits"
        raise DataError(f"{name}: {what}")
    pixels = eight_bits(bands)
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)) if len(pixels) == 3 else pixels[0])
    image.format = "TIFF"
    return image


def eight_bits(values: NDArray[np.unsignedinteger]) -> NDArray[np.uint8]:
    """Brightness in the upper eight of as many bits as the brightest pixel needs, of 8, 10, 12, 14, 16 or 32.

    Cameras and microscopes write 12 bits into files of 16, whose upper eight would be all but black.
    """
    top = int(values.max(initial=0)).bit_length()
    bits = next(n for n in (8, 10, 12, 14, 16, 32, 64) if top <= n)
    return (values >> (bits - 8)).astype(np.uint8)


def place_on_earth(data: bytes) -> ImageFileDirectory_v2 | None:
    """GeoTIFF's tags of a file, None where it has none or is no TIFF."""
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    found = ImageFileDirectory_v2()
    with suppress(Exception):  # whatever a damaged directory leads the parser to
        file = io.BytesIO(data)
        header = file.read(16 if _BIG in data[2:4] else 8)
        tags = ImageFileDirectory_v2(header)
        file.seek(tags.next)
        tags.load(file)
        for tag in _PLACE:
            if tag in tags:
                found[tag] = tags[tag]
                found.tagtype[tag] = tags.tagtype[tag]
    return found if len(found) else None


def encode_geotiff(levels: NDArray[np.uint8], place: ImageFileDirectory_v2) -> bytes:
    """A mask uint8 (H, W) in VOC's colours as TIFF, at the place that `place_on_earth` found."""
    image, out = Image.fromarray(np.ascontiguousarray(levels)), io.BytesIO()
    image.putpalette(voc_palette().tobytes())
    image.save(out, "TIFF", compression="tiff_deflate", tiffinfo=place)
    return out.getvalue()
