"""What a sample of a shard is made of: label maps and maps as PNG, tar files that mirror others, and batches."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from esol.base.errors import DataError
from esol.base.files import sync_folder
from esol.base.palette import VOID, voc_palette
from esol.data.index import scan_shard
from esol.data.photos import check_png, photo_format
from esol.data.storage import filesystem, is_local, patient

if TYPE_CHECKING:
    from torch import Tensor


def encode_mask(levels: NDArray[np.uint8]) -> bytes:
    """PNG with VOC's colours as palette, from class numbers uint8 (H, W)."""
    image = Image.fromarray(np.ascontiguousarray(levels))
    image.putpalette(voc_palette().tobytes())
    return encode_png(image)


def encode_png(image: Image.Image) -> bytes:
    """A picture as PNG."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def encode_jpeg(image: Image.Image) -> bytes:
    """A picture as JPEG of quality 95."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95)
    return out.getvalue()


def decode_mask(data: bytes, name: str, classes: int = 254) -> NDArray[np.uint8]:
    """A mask's class numbers (H, W), 0 background, 1..classes, 255 void; DataError naming `name` where it is none."""
    wanted = "a mask must be an 8-bit palette or gray PNG of class numbers"
    mode, levels = _png(data, name, wanted)
    if mode not in ("P", "L"):
        raise DataError(f"{name}: {wanted}, not PNG {mode}")
    largest = levels.max(where=levels != VOID, initial=0)
    if largest > classes:
        raise DataError(f"{name}: value {largest} is no class; 0 is background, 1..{classes} are classes, 255 is void")
    return levels


def decode_gray(data: bytes, name: str) -> NDArray[np.uint8]:
    """A map of 0..255 (H, W) from a gray PNG of 1, 8 or 16 bits; one of nothing but 0 and 1 means 0 and 255."""
    mode, values = _png(data, name, "a map must be a gray PNG")
    if mode not in ("1", "L", "P") and not mode.startswith("I"):
        raise DataError(f"{name}: a map must be a gray PNG, not PNG {mode}")
    if mode.startswith("I"):
        values = values.astype(np.int64) >> 8
    return (values * 255 if values.max(initial=0) <= 1 else values).astype(np.uint8)


def _png(data: bytes, name: str, wanted: str) -> tuple[str, NDArray[Any]]:
    """Mode and values of an undamaged PNG."""
    if (known := photo_format(data)) not in ("", "PNG"):
        raise DataError(f"{name}: {wanted}, not {known}")
    try:
        check_png(data)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as png:
            return png.mode, np.array(png)
    except Exception as error:  # PIL raises whatever a damaged file leads its parsers to
        raise DataError(f"{name}: the PNG cannot be decoded ({error}); it has {len(data)} bytes") from error


def write_mirror_shard(
    out_dir: str | os.PathLike[str], shard_name: str, samples: Iterable[dict[str, Any]]
) -> dict[str, Any]:
    """Writes one tar file, whole or not at all, and returns its record for write_index.

    samples: {"__key__": key, extension: bytes, ...}, e.g. "cam.npy". An inference stage gives its input's shard name
    and keys, in order, so that its output mirrors the input. Same samples, same bytes. A file of that name is replaced.
    """
    fs, path = filesystem(os.fspath(out_dir))
    if is_local(fs):
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{shard_name}.tmp"
        try:
            _write_tar(temporary, samples)
            record = scan_shard(folder, temporary.name) | {"name": shard_name}
            os.replace(temporary, folder / shard_name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(folder)
        return record
    with tempfile.TemporaryDirectory() as scratch:
        _write_tar(Path(scratch, shard_name), samples)
        record = scan_shard(scratch, shard_name)
        local, place = str(Path(scratch, shard_name)), f"{path}/{shard_name}"
        patient(fs, place, record["bytes"], fs.put_file, local, place)  # whole objects or none
    return record


def _write_tar(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    os.environ.setdefault("WDS_SECURE", "1")
    from webdataset.writer import TarWriter  # imports torch: not at the top, so that --help is quick

    with open(path, "wb") as file:
        # mtime is the only thing of TarWriter's headers that changes from run to run
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for sample in samples:
                tar.write(sample)
        file.flush()
        os.fsync(file.fileno())


class Batch(TypedDict):
    """One micro-batch as the data stream yields it.

    image: uint8 (B, 3, H, W), RGB 0..255, not normalised (the network knows its own mean and deviation); features: in
    their place in the stages behind a frozen backbone, where those of all the crops are kept (esol.data.features);
    labels: float32 (B, C) multi-hot, C classes without background; key: B sample keys; skipped: what was wrong with the
    damaged samples for which others stand in (data.damaged = skip); target: uint8 (B, H, W), the label map,
    0 background, 1..C classes, 255 ignored, in the stages that learn from one; crop: the numbers of its B crops;
    weight: how much its losses count in the plain mean over the micro-batches of all ranks, 1 where it is not given
    (esol.data.plan.Share); done: float32 (), the share of the stage's steps that lie before this one, 0 where
    it is not given.
    """

    image: NotRequired[Tensor]
    features: NotRequired[Tensor]
    labels: Tensor
    key: list[str]
    skipped: NotRequired[list[str]]
    target: NotRequired[Tensor]
    crop: NotRequired[NDArray[np.int64]]
    weight: NotRequired[float]
    done: NotRequired[Tensor]
