"""Procedural scenes with exact masks, made so that a class activation map finds a part and misses the body.

Each object is a small telling part (colours, pattern and shape that only its class has) on a larger plain body. Bodies
draw shape, colour and texture from pools that all classes and the clutter share; each class only prefers some, so that
a body is weak evidence. The background goes with the first object's class more often than not. All drawing is in
integers at twice the size, so that every machine draws the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from esol.base.errors import DataError
from esol.data.samples import encode_jpeg, encode_mask, encode_png
from shards.samples import Reads, Source, pack

CLASSES = ("cactus", "fish", "mushroom", "rocket", "snail")
_SHAPES, _PATTERNS = ("disc", "square", "triangle", "cross", "crescent"), ("striped", "checked", "ringed")
MORE_CLASSES = tuple(f"{pattern}-{shape}" for pattern in _PATTERNS for shape in _SHAPES)  # what their telling part is
BODY_PREFERENCE = 0.5  # how often a body has its class's own shape, colour or texture; drawn freely otherwise
BACKGROUND_PREFERENCE = 0.7  # how often the background is that of the first object's class
_UNIT = 1000  # object coordinates: the body reaches from -1000 to 1000 along u, the part sits at its +u end
_COS, _SIN = (np.rint(1024 * f(np.arange(64) * np.pi / 32)).astype(np.int32) for f in (np.cos, np.sin))
_BODY_COLOURS = np.array([(118, 134, 92), (104, 132, 158), (196, 176, 142), (148, 148, 156), (160, 124, 104)])
# top and bottom colour: desert, sea, forest, dusk, meadow
_GROUNDS = np.array(
    [
        [(232, 212, 168), (214, 180, 122)],
        [(126, 178, 206), (52, 104, 152)],
        [(84, 104, 76), (50, 66, 48)],
        [(48, 44, 84), (112, 78, 112)],
        [(168, 202, 128), (106, 154, 78)],
    ]
)
_BADGE_COLOURS = ((30, 90, 216), (240, 240, 232), (32, 168, 120), (232, 72, 40), (250, 214, 60))


@dataclass(frozen=True)
class _Placed:
    """Centre, radius (subpixels) and direction (64ths of a turn) of one object or piece of clutter."""

    x: int
    y: int
    radius: int
    turn: int


def synthetic_source(train: int, val: int, size: int = 96, seed: int = 0, classes: int = len(CLASSES)) -> Source:
    """Splits train and val of size x size scenes; a further member K.part.png is 255 where a telling part shows.

    classes: the first so many of CLASSES and MORE_CLASSES; from the sixth on they share bodies and backgrounds with the
    first five, so that the part alone tells them apart.
    """
    if size < 32:
        raise DataError(f"--size {size}: the parts need at least 32 pixels")
    names = (*CLASSES, *MORE_CLASSES)[:classes]
    if not 1 <= classes <= len(CLASSES) + len(MORE_CLASSES):
        raise DataError(f"--classes {classes}: there are 1 to {len(CLASSES) + len(MORE_CLASSES)}")
    splits = {"train": [f"train_{i:06d}" for i in range(train)], "val": [f"val_{i:06d}" for i in range(val)]}
    seeds = {key: [seed, name == "val", number] for name, keys in splits.items() for number, key in enumerate(keys)}
    read = Reads(partial(_scene, size, names), seeds)
    return Source(names, {name: keys for name, keys in splits.items() if keys}, read)


def _scene(size: int, names: tuple[str, ...], key: str, seed: list[int]) -> dict[str, bytes]:
    image, mask, part = draw_scene(np.random.default_rng(seed), size, len(names))
    labels = [names[c - 1] for c in np.unique(mask) if c]
    photo = encode_jpeg(Image.fromarray(image))
    sample = pack(key, f"{key}.jpg", photo, labels, names, encode_mask(mask), f"{key}.mask.png")
    sample["part.png"] = encode_png(Image.fromarray(part))
    return sample


def draw_scene(
    rng: np.random.Generator, size: int, classes: int = len(CLASSES)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One scene of the first so many classes, in arrays of size x size.

    image uint8 (size, size, 3), mask uint8 with 0 and 1..C, part uint8 with 0 and 255.
    """
    side = 2 * size
    kinds = rng.integers(0, classes, rng.choice(3, p=[0.35, 0.4, 0.25]) + 1)
    ground = kinds[0] % len(_GROUNDS) if rng.random() < BACKGROUND_PREFERENCE else rng.integers(0, len(_GROUNDS))
    canvas = _ground(rng, int(ground), side)
    codes = np.zeros((side, side), dtype=np.uint8)  # 0, or 2 * class for a body and 2 * class + 1 for a part
    for _ in range(rng.integers(2, 6)):
        _draw_body(rng, canvas, None, _spot(rng, side, (8, 22), int(rng.integers(0, 64))), None)
    placed: list[_Placed] = []
    for kind in kinds:
        # fish swim, the others stand: the part's end is up (48), with a tilt
        upright = 48 if kind != 1 else int(rng.choice([0, 32]))
        for _ in range(12 if placed else 1000):  # no scene without an object
            spot = _spot(rng, side, (18, 27), (upright + int(rng.integers(-7, 8))) % 64)
            tip = (spot.x + spot.radius * _COS[spot.turn] // 1024, spot.y + spot.radius * _SIN[spot.turn] // 1024)
            seen = all(side // 16 < t < side - side // 16 for t in tip)
            if seen and all((spot.x - p.x) ** 2 + (spot.y - p.y) ** 2 > (spot.radius + p.radius) ** 2 for p in placed):
                placed.append(spot)
                _draw_body(rng, canvas, codes, spot, int(kind))
                _draw_part(canvas, codes, spot, int(kind))
                break
    grain = rng.integers(-7, 8, (size, size, 1), dtype=np.int16)
    image = (canvas[::2, ::2] + canvas[::2, 1::2] + canvas[1::2, ::2] + canvas[1::2, 1::2]) // 4 + grain
    # a pixel belongs to what covers at least half of it: the third smallest of its four subpixels
    corners = np.stack([codes[::2, ::2], codes[::2, 1::2], codes[1::2, ::2], codes[1::2, 1::2]], axis=2)
    winner = np.sort(corners, axis=2)[:, :, 2]
    return image.clip(0, 255).astype(np.uint8), winner // 2, winner % 2 * np.uint8(255)


def _spot(rng: np.random.Generator, side: int, percent: tuple[int, int], turn: int) -> _Placed:
    radius = int(rng.integers(percent[0] * side // 100, percent[1] * side // 100 + 1))
    x, y = rng.integers(side * 12 // 100, side * 88 // 100, 2)
    return _Placed(int(x), int(y), radius, turn)


def _ground(rng: np.random.Generator, kind: int, side: int) -> np.ndarray:
    """int16 (side, side, 3): a vertical blend with soft blotches and the ground's own strokes."""
    top, bottom = _GROUNDS[kind].astype(np.int64)
    row = np.arange(side)[:, None, None]
    canvas = np.broadcast_to(top + (bottom - top) * row // side, (side, side, 3)).astype(np.int16)
    cell = max(2, side // 9)
    coarse = rng.integers(-22, 23, (side // cell + 2, side // cell + 2), dtype=np.int32)
    at, rest = np.arange(side) // cell, (np.arange(side) % cell).astype(np.int32)
    rows = coarse[at] * (cell - rest)[:, None] + coarse[at + 1] * rest[:, None]
    canvas += ((rows[:, at] * (cell - rest) + rows[:, at + 1] * rest) // cell**2).astype(np.int16)[:, :, None]
    unit = max(1, side // 96)
    fine = rng.random((side // (2 * unit) + 1, side // (2 * unit) + 1)).repeat(2 * unit, 0).repeat(2 * unit, 1)
    fine = fine[:side, :side]
    if kind == 1:  # waves
        y, x = np.ogrid[:side, :side]
        canvas[(y // unit + 3 * _COS[(x * 64 // (12 * unit)) % 64] // 1024) % 12 < 2] += 12
    elif kind == 2:  # trunks
        trunk = rng.random(side // (6 * unit) + 1).repeat(6 * unit)[:side] < 0.2
        canvas[:, trunk] -= 16
    elif kind == 3:  # stars
        canvas[fine < 0.006] += 90
    else:  # pebbles, blades
        canvas[fine < 0.05] -= 18
        canvas[fine > 0.96] += 18
    return canvas


def _frame(spot: _Placed, side: int, tenths: int) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """The window of so many tenths of a radius around a spot, and object coordinates u, v in it (int32)."""
    reach = spot.radius * tenths // 10 + 2
    window = tuple(slice(max(0, centre - reach), min(side, centre + reach)) for centre in (spot.y, spot.x))
    dy, dx = (np.arange(s.start, s.stop, dtype=np.int32) - c for s, c in zip(window, (spot.y, spot.x), strict=True))
    cos, sin = (np.int32((f[spot.turn] * _UNIT * 64) // spot.radius) for f in (_COS, _SIN))  # 16 bits of fraction
    u = (dx * cos + (dy * sin)[:, None]) >> 16
    v = ((dy * cos)[:, None] - dx * sin) >> 16
    return (window[0], window[1]), u + 250, v  # the part sticks out at +u: what is seen lies around the spot


def _inside_body(shape: int, u: np.ndarray, v: np.ndarray, grow: int = 0) -> np.ndarray:
    """The pool of body shapes: capsule, ellipse, egg, hull, bean; grow (1000ths of the radius) is for the outline."""
    if grow:
        u, v = u * _UNIT // (_UNIT + grow), v * _UNIT // (_UNIT + grow)
    along, across = np.abs(u), np.abs(v)
    if shape == 0:
        return np.maximum(along - 480, 0) ** 2 + v**2 <= 520**2
    if shape == 1:
        return u**2 * 36 + v**2 * 100 <= 36 * _UNIT**2
    if shape == 2:
        return (along < _UNIT) & (v**2 <= (_UNIT**2 - u**2) // 8 * (2500 - 2 * u) // 1250)
    if shape == 3:
        return (across <= 520) & (along * 5 + across * 5 <= 6 * _UNIT) & (along <= 950)
    bend = v - (_UNIT - u**2 // _UNIT) // 5 + 100
    return u**2 * 30 + bend**2 * 100 <= 30 * _UNIT**2


def _draw_body(
    rng: np.random.Generator, canvas: np.ndarray, codes: np.ndarray | None, spot: _Placed, kind: int | None
) -> None:
    """A body of a class, or a piece of clutter (kind None): the same pools, only without preference."""
    shape, colour, texture = (
        kind % 5 if kind is not None and rng.random() < BODY_PREFERENCE else int(rng.integers(0, 5)) for _ in range(3)
    )
    window, u, v = _frame(spot, len(canvas), 14)
    inside, outline = _inside_body(shape, u, v), _inside_body(shape, u, v, 70)
    paint = (_BODY_COLOURS[colour] + rng.integers(-14, 15, 3)).astype(np.int16)
    # light from above: from 24 to -12 over the radius
    shade = (24 - (v * _COS[spot.turn] + u * _SIN[spot.turn]) // 29127).astype(np.int16)
    if texture == 1:
        shade -= 14 * (u % 360 < 120)
    elif texture == 2:
        shade -= 14 * (v % 300 < 110)
    elif texture == 3:
        shade -= 14 * ((u // 220 + v // 220) % 2)
    elif texture == 4:
        shade -= 14 * ((u % 320 - 160) ** 2 + (v % 320 - 160) ** 2 < 90**2)
    view = canvas[window]
    np.copyto(view, paint // 2, where=outline[:, :, None])
    np.copyto(view, paint + shade[:, :, None], where=inside[:, :, None])
    if codes is not None and kind is not None:
        codes[window][outline] = 2 * (kind + 1)


def _draw_part(canvas: np.ndarray, codes: np.ndarray, spot: _Placed, kind: int) -> None:
    """The part that only this class has, over the +u end of the body."""
    window, u, v = _frame(spot, len(canvas), 17)
    u = u - 1000  # around the body's end
    ring = u**2 + v**2
    if kind == 0:  # flower: five petals and a heart
        petals = [(u - 270 * _COS[t] // 1024) ** 2 + (v - 270 * _SIN[t] // 1024) ** 2 for t in (0, 13, 26, 38, 51)]
        near = np.minimum.reduce(petals)
        inside, first, colours = near < 225**2, ring >= 175**2, ((226, 62, 148), (252, 214, 70))
    elif kind == 1:  # tail fin: stripes that fan out
        inside = (u > -260) & (u < 520) & (np.abs(v) < (u + 460) * 3 // 4)
        first, colours = (v * 8 // (u + 700).clip(1)) % 2 == 0, ((244, 128, 32), (252, 244, 226))
    elif kind == 2:  # cap: white dots on red
        inside = (u > -170) & ((u + 170) ** 2 + v**2 * 60 // 100 < 580**2)
        first = ((u + 40) % 300 - 150) ** 2 + ((v + 150) % 300 - 150) ** 2 > 85**2
        colours = ((212, 38, 36), (255, 250, 244))
    elif kind == 3:  # nose: black and white checks
        inside = (u > -420) & (u < 560) & (np.abs(v) * 3 < (560 - u) * 18 // 10)
        first, colours = (u // 165 + v // 165) % 2 == 0, ((24, 26, 36), (246, 246, 250))
    elif kind > 4:
        inside, first, colours = _badge(kind - 5, u, v, ring)
    else:  # shell: rings
        inside, first, colours = ring < 450**2, (ring // 42000) % 2 == 0, ((96, 46, 140), (250, 206, 92))
    view = canvas[window]
    paint = np.where(first[:, :, None], *np.array(colours, dtype=np.int16))
    np.copyto(view, paint, where=inside[:, :, None])
    codes[window][inside] = 2 * (kind + 1) + 1


def _badge(
    number: int, u: np.ndarray, v: np.ndarray, ring: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """Part number 0..14 of MORE_CLASSES: where it is, where it has its first colour, both colours."""
    shape, pattern = number % 5, number // 5
    if shape == 0:
        inside = ring < 430**2
    elif shape == 1:
        inside = (np.abs(u) < 390) & (np.abs(v) < 390)
    elif shape == 2:
        inside = (u > -380) & (u < 480) & (np.abs(v) * 17 < (480 - u) * 10)
    elif shape == 3:
        inside = (np.minimum(np.abs(u), np.abs(v)) < 170) & (np.maximum(np.abs(u), np.abs(v)) < 480)
    else:
        inside = (ring < 470**2) & ((u - 230) ** 2 + v**2 > 330**2)
    if pattern == 0:
        first = (v + 2000) // 130 % 2 == 0
    elif pattern == 1:
        first = ((u + 2000) // 190 + (v + 2000) // 190) % 2 == 0
    else:
        first = ring // 36000 % 2 == 0
    return inside, first, (_BADGE_COLOURS[shape], _BADGE_COLOURS[(shape + 1 + pattern) % 5])
