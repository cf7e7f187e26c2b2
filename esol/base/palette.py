"""The numbers and colours of PASCAL VOC's masks: 0 is background, 255 is void, which counts for nothing."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

VOID = 255


@lru_cache(maxsize=1)
def voc_palette() -> NDArray[np.uint8]:
    """(256, 3) RGB: bits 3n, 3n+1, 3n+2 of a class number are bit 7-n of its red, green and blue (VOC devkit)."""
    number = np.arange(256)[:, None]
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        colours |= (((number >> (3 * bit + np.arange(3))) & 1) << (7 - bit)).astype(np.uint8)
    return colours
