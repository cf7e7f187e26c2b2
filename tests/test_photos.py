"""One decision of what a photo is and which way up, whoever asks: create, verify, training, predict."""

import io
import itertools
import json
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esol.base.errors import DataError
from esol.data.photos import photo_format, upright_rgb
from esol.data.samples import decode_mask, encode_mask
from esol.data.tiff import encode_geotiff, place_on_earth
from esol.data.transforms import decode
from shards.samples import open_image, pack
from shards.verify import check_sample

WIDTH, HEIGHT = 24, 16
SCENE = np.kron(np.random.default_rng(1).integers(0, 256, (2, 3, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
TIFF_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # BYTE, SHORT, LONG, and signed


def exif(value: int, order: str = "<", kind: int = 3, count: int = 1, tags_before: int = 0) -> bytes:
    """An EXIF block as cameras write it: one IFD with the orientation in it."""
    packed = struct.pack(order + TIFF_TYPES[kind] * count, *[value] * count)[:4].ljust(4, b"\0")
    entries = [struct.pack(f"{order}HHI", 0x0100 + i, 3, 1) + b"\1\0\0\0" for i in range(tags_before)]
    entries.append(struct.pack(f"{order}HHI", 0x0112, kind, count) + packed)
    header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return header + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)


def segment(payload: bytes, marker: int = 0xE1) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/">'
XMP += b'<rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def jpeg(*segments: bytes, image: Image.Image | None = None) -> bytes:
    out = io.BytesIO()
    (image or Image.fromarray(SCENE)).save(out, "JPEG", quality=95, subsampling=0)
    data = out.getvalue()
    return data[:2] + b"".join(segments) + data[2:]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_photos_of_more_pixels_than_are_taken_are_refused_in_every_format(kind: str) -> None:
    data, pixels = encoded(Image.fromarray(SCENE), kind), WIDTH * HEIGHT
    assert decode(data, "x", pixels).shape == (3, HEIGHT, WIDTH)
    with pytest.raises(DataError, match=rf"^x: the photo has {WIDTH} x {HEIGHT} = {pixels} pixels, more than the"):
        decode(data, "x", pixels - 1)


def str_only(value: object) -> str:
    return value if isinstance(value, str) else ""


def turned_photos() -> Iterator[tuple[str, bytes, int]]:
    """Name, bytes, and the orientation that counts."""
    for value, order, kind in itertools.product((1, 3, 6, 8), "<>", TIFF_TYPES):
        yield f"{value} {order} type {kind}", jpeg(segment(b"Exif\0\0" + exif(value, order, kind))), value
    for value in (0, 9, 65535):
        yield f"value {value}", jpeg(segment(b"Exif\0\0" + exif(value))), 1
    block = segment(b"Exif\0\0" + exif(6, tags_before=3))
    yield "behind XMP", jpeg(segment(XMP), block), 6
    yield "behind a thermal camera's", jpeg(segment(b"FLIR\0\1\0\1" + bytes(40)), block), 6
    yield "behind JFIF and ICC", jpeg(segment(b"ICC_PROFILE\0\1\1" + bytes(9), 0xE2), block), 6
    yield "in XMP alone, as browsers have it", jpeg(segment(XMP)), 1
    yield "EXIF says 1, XMP 6", jpeg(segment(b"Exif\0\0" + exif(1)), segment(XMP)), 1
    yield "damaged block", jpeg(segment(b"Exif\0\0II*\0" + b"\xff" * 30)), 1
    yield "an IFD that is cut off", jpeg(segment(b"Exif\0\0" + exif(6)[:14])), 1
    for value in (2, 5, 7):
        block = b"Exif\0\0" + exif(value)
        for kind in ("PNG", "WEBP"):
            yield f"{kind} {value}", encoded(Image.fromarray(SCENE), kind, exif=block, lossless=True), value


@pytest.mark.parametrize(("name", "data", "expected"), turned_photos(), ids=str_only)
def test_create_verify_and_training_see_one_upright_picture(name: str, data: bytes, expected: int) -> None:
    by_training = decode(data, name).permute(1, 2, 0).numpy()
    by_pillow = np.asarray(upright_rgb(Image.open(io.BytesIO(data))))
    size = (WIDTH, HEIGHT) if expected < 5 else (HEIGHT, WIDTH)
    assert by_training.shape[1::-1] == size
    assert by_pillow.shape == by_training.shape
    assert np.abs(by_pillow.astype(int) - by_training).max() <= 3  # two JPEG decoders
    corner = {1: SCENE[0, 0], 2: SCENE[0, -1], 3: SCENE[-1, -1], 5: SCENE[0, 0], 6: SCENE[-1, 0], 7: SCENE[-1, -1]}
    corner[8] = SCENE[0, -1]
    assert np.abs(by_training[0, 0].astype(int) - corner[expected]).max() < 12
    mask = encode_mask(np.ones(size[::-1], np.uint8))
    sample = pack("k", "k", data, ["cat"], ["cat"], mask, "k.png")
    assert json.loads(sample["json"]) == {"labels": ["cat"], "height": size[1], "width": size[0]}
    assert check_sample({k: v for k, v in sample.items() if k != "__key__"}, ["cat"], "k") == []


def odd_modes() -> Iterator[tuple[str, bytes, tuple[int, int, int]]]:
    """Name, bytes, and the colour that is seen at the left, where red (or gray 200) is drawn."""
    red = Image.new("RGB", (8, 6), (255, 0, 0))
    gray = np.full((6, 8), 200 * 256 + 77, np.uint16)
    yield "16-bit gray", encoded(Image.fromarray(gray), "PNG"), (200, 200, 200)
    yield "1 bit", encoded(Image.new("1", (8, 6), 1), "PNG"), (255, 255, 255)
    yield "palette", encoded(red.quantize(4), "PNG"), (255, 0, 0)
    hidden = Image.new("RGBA", (8, 6), (255, 0, 0, 0))
    yield "hidden under full transparency", encoded(hidden, "PNG"), (255, 255, 255)
    yield "the same in WebP", encoded(hidden, "WEBP", lossless=True, exact=True), (255, 255, 255)
    yield "gray and alpha", encoded(Image.new("LA", (8, 6), (10, 0)), "PNG"), (255, 255, 255)
    yield "one transparent colour", encoded(red, "PNG", transparency=(255, 0, 0)), (255, 255, 255)
    yield "a transparent palette entry", encoded(red.quantize(4), "PNG", transparency=0), (255, 255, 255)
    yield "half", encoded(Image.new("RGBA", (8, 6), (255, 0, 0, 128)), "PNG"), (255, 127, 127)
    yield "CMYK", encoded(Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)


@pytest.mark.parametrize(("name", "data", "expected"), odd_modes(), ids=str_only)
def test_every_mode_is_the_picture_that_viewers_show_small_or_not(
    name: str, data: bytes, expected: tuple[int, int, int]
) -> None:
    large, small = (pack("k", name, data, ["cat"], ["cat"], long_side=side) for side in (0, 4))
    assert next(v for k, v in large.items() if k in ("jpg", "png", "webp")) == data
    for photo, tolerance in ((data, 1), (small["jpg"], 8)):
        seen = decode(photo, name)[:, 2, 2].tolist()
        assert max(abs(a - b) for a, b in zip(seen, expected, strict=True)) <= tolerance, (seen, expected)


def test_bytes_say_what_a_photo_is_and_what_is_wrong_with_it() -> None:
    image = Image.fromarray(SCENE)
    mpo = encoded(image, "MPO", save_all=True, append_images=[image])
    assert "jpg" in pack("k", "IMG_1.jpg", mpo, ["cat"], ["cat"])
    assert decode(mpo, "IMG_1.jpg").shape == (3, HEIGHT, WIDTH)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(80)
    if find_spec("pillow_heif") is None:
        for read in (lambda: pack("k", "k", heic, ["cat"], ["cat"]), lambda: decode(heic, "k")):
            with pytest.raises(DataError, match=r"^k: HEIC is read with another package: pip install 'esol\[heic\]'"):
                read()
    with pytest.raises(DataError, match=r"^k: .*JPEG XL.*convert it to"):
        decode(b"\xff\x0a" + bytes(80), "k")


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "GIF", "AVIF"])
def test_other_formats_are_read_as_pillow_reads_them_and_packed_as_jpeg(kind: str) -> None:
    image = Image.fromarray(SCENE)
    data = encoded(image, kind)
    assert photo_format(data).startswith(kind)
    with Image.open(io.BytesIO(data)) as again:
        expected = np.asarray(again.convert("RGB"))
    assert np.array_equal(decode(data, "k").permute(1, 2, 0).numpy(), expected)
    sample = pack("k", "k", data, ["cat"], ["cat"])
    assert photo_format(sample["jpg"]) == "JPEG"
    assert json.loads(sample["json"]) == {"labels": ["cat"], "height": HEIGHT, "width": WIDTH}
    with pytest.raises(DataError, match=r"^k: (unreadable|this kind of) "):
        decode(data[:40], "k")


def test_tiff_of_many_kinds() -> None:
    gray = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 170
    seen = decode(encoded(Image.fromarray(gray), "TIFF"), "k")
    assert np.array_equal(seen[0].numpy(), gray >> 8)  # the upper eight bits, as of a PNG
    for top, shift in ((4095, 4), (1023, 2), (255, 0)):  # a microscope's 12 bits are no darkness
        fewer = (gray.astype(np.int64) * top // 65535).astype(np.uint16)
        assert np.array_equal(decode(encoded(Image.fromarray(fewer), "TIFF"), "k")[0].numpy(), fewer >> shift), top
    many = encoded(Image.fromarray(SCENE), "TIFF", save_all=True, append_images=[Image.new("RGB", (5, 5))])
    assert decode(many, "k").shape == (3, HEIGHT, WIDTH)  # the first picture
    with pytest.raises(DataError, match=r"^k: its pixels are fractions or wide numbers, not brightness: scale them"):
        decode(encoded(Image.fromarray(gray.astype(np.float32) / 65535), "TIFF"), "k")
    thumbnail = encoded(Image.fromarray(SCENE), "TIFF", tiffinfo={254: 1})  # as Nikon's raw files begin
    with pytest.raises(DataError, match=r"^k: camera raw data are not read"):
        decode(thumbnail, "k")


def test_tiff_that_pillow_does_not_read_and_where_it_lies(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio", reason="comes with esol[geo]")
    wide = np.stack([SCENE[..., c].astype(np.uint16) * 16 for c in (0, 1, 2, 0)])  # 12 bits, infrared as a fourth band
    place = {"crs": "EPSG:25832", "transform": rasterio.Affine(0.2, 0, 500000, 0, -0.2, 5400000)}
    shape = {"width": WIDTH, "height": HEIGHT, "count": 4, "dtype": "uint16"}
    for big in ("NO", "YES"):
        with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", BIGTIFF=big, **shape, **place) as file:
            file.write(wide)
        data = (tmp_path / "a.tif").read_bytes()
        assert np.array_equal(decode(data, "k").permute(1, 2, 0).numpy(), SCENE)
        with pytest.raises(DataError, match=r"^k: the photo has 24 x 16 = 384 pixels, more than the 383"):
            decode(data, "k", 383)
        assert photo_format(pack("k", "k", data, ["cat"], ["cat"])["jpg"]) == "JPEG"
        found = place_on_earth(data)
        assert found is not None
        with rasterio.MemoryFile(encode_geotiff(SCENE[..., 0], found)) as file, file.open() as mask:
            assert (mask.crs, mask.transform) == (place["crs"], place["transform"])
            assert np.array_equal(mask.read(1), SCENE[..., 0])
    with pytest.raises(DataError, match=r"^k: unreadable TIFF"):
        decode(data[:200], "k")
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", **(shape | {"dtype": "float32"})) as file:
        file.write(wide.astype(np.float32))
    with pytest.raises(DataError, match=r"^k: its pixels are fractions or signed numbers, not brightness"):
        decode((tmp_path / "a.tif").read_bytes(), "k")
    assert place_on_earth(encoded(Image.fromarray(SCENE), "TIFF")) is None
    assert place_on_earth(b"II*\0" + b"\xff" * 40) is None


def test_damage_behind_the_last_pixel_that_pillow_waits_for_is_an_error() -> None:
    levels = np.random.default_rng(0).integers(0, 3, (40, 56)).astype(np.uint8)
    for data, read in (
        (encode_mask(levels), lambda d: decode_mask(d, "k", 3)),
        (encoded(Image.fromarray(SCENE), "PNG"), lambda d: decode(d, "k")),
    ):
        read(data)
        end = data.index(b"IEND") - 8  # the last four bytes before are the checksum of the pixels
        for back in (1, 3, 6, 12):
            damaged = bytearray(data)
            damaged[end - back] ^= 255
            with pytest.raises(DataError, match=r"^k: "):
                read(bytes(damaged))
            with pytest.raises(DataError, match=r"^k: unreadable image"):
                open_image(bytes(damaged), "k")
