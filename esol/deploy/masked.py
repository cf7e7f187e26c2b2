"""A photo with its mask, what its parts are, and what a writer of them is; mask_formats.py has the writers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, indent, tostring

import numpy as np
from numpy.typing import NDArray

from esol.base.errors import DataError
from esol.base.files import atomic_write
from esol.base.palette import VOID
from esol.base.strangers import plain
from esol.ops.shapes import Shape, raster, shapes, simpler

SPECK = 16  # pixels: smaller parts are no objects of their own, and no outline says them well


@dataclass(frozen=True)
class Masked:
    """A photo with its mask uint8 (H, W): 0 background, 1 + i for class i, 255 void; split: train, val, ..."""

    key: str
    file: str
    photo: bytes
    mask: NDArray[np.uint8]
    split: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.mask.shape[0], self.mask.shape[1]

    def parts(self) -> list[tuple[int, Shape]]:
        """Class numbers from 1 and the parts of the mask, exact; void belongs to none."""
        numbers = [n for n in np.unique(self.mask).tolist() if 0 < n < VOID]
        return [(number, shape) for number in numbers for shape in shapes(self.mask == number)]

    def objects(self) -> list[tuple[int, NDArray[np.bool_]]]:
        """Class numbers and parts (H, W), which together are the mask exactly: specks belong to the largest part."""
        found: list[tuple[int, NDArray[np.bool_]]] = []
        parts = self.parts()
        for number in dict.fromkeys(number for number, _ in parts):
            own = sorted((shape for n, shape in parts if n == number), key=lambda shape: -shape.area)
            large = [raster([shape], self.size) for shape in own if shape.area >= SPECK]
            whole = self.mask == number
            first = whole & ~np.any(large[1:], 0) if len(large) > 1 else whole
            found += [(number, one) for one in (first, *large[1:])]
        return found


class Writer:
    """A format of masks."""

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        self.out, self.classes = out, tuple(classes)
        self.lost: Counter[str] = Counter()

    def add(self, one: Masked) -> None:
        """Writes a photo."""
        raise NotImplementedError

    def close(self) -> None:
        """Writes what stands once for all photos."""

    def save(self, place: str, data: bytes | str) -> None:
        """A file below the folder; DataError for a place that leads out of it."""
        if not plain(place):
            raise DataError(f"{place!r} is no place below {self.out}")
        path = self.out / place
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)

    def save_xml(self, place: str, root: Element, declared: bool = True) -> None:
        """A tree of elements, indented; declared: the first line says that it is XML, in UTF-8."""
        indent(root)
        self.save(place, tostring(root, encoding="utf-8", xml_declaration=declared))

    def outlined(self, one: Masked) -> list[tuple[int, Shape]]:
        """The parts of a photo's mask in few corners, without specks, which are counted."""
        found = []
        for number, shape in one.parts():
            if shape.area < SPECK:
                self.lost[f"parts of less than {SPECK} pixels"] += 1
            else:
                found.append((number, simpler(shape, one.size)))
        self.lose_void(one)
        return found

    def lose_void(self, one: Masked) -> None:
        """Counts a photo with void pixels, where the format has no word for them."""
        if (one.mask == VOID).any():
            self.lost["photos whose void pixels became background"] += 1


def box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """x, y, width, height of what a mask covers."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


def run_lengths(flat: NDArray[np.bool_]) -> list[int]:
    """Lengths of the runs of a flat mask, the first of them of what is not in it."""
    changes = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    lengths = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *lengths] if flat.size and flat[0] else lengths
