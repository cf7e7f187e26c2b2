"""Charts of the page, as SVG text: lines and bars, nothing else. Every text that comes from a run is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 320, 180, 38, 26
INKS = ("#0b6e99", "#d1495b", "#2e933c", "#8d5a97", "#e08e00", "#5b5f97", "#7a4419", "#333333")

Points = Sequence[tuple[float, float]]


def lines(title: str, curves: Mapping[str, Points], across: str, up: str) -> str:
    """A chart of one or more curves, each a list of (x, y); "" where none has two points."""
    curves = {name: _thin([p for p in points if all(map(math.isfinite, p))]) for name, points in curves.items()}
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return ""
    xs, ys = ([p[axis] for points in curves.values() for p in points] for axis in (0, 1))
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)

    def place(x: float, y: float) -> str:
        right = _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - 8)
        down = 8 + (y1 - y) / (y1 - y0) * (_HEIGHT - _BOTTOM - 8)
        return f"{right:.1f},{down:.1f}"

    drawn = [
        f'<polyline fill="none" stroke="{ink}" stroke-width="1.6" points="{" ".join(place(*p) for p in points)}"/>'
        for ink, points in zip(_inks(len(curves)), curves.values(), strict=True)
    ]
    ends = [
        f'<text x="{_LEFT - 4}" y="14" text-anchor="end">{y1:.3g}</text>',
        f'<text x="{_LEFT - 4}" y="{_HEIGHT - _BOTTOM}" text-anchor="end">{y0:.3g}</text>',
        f'<text x="{_LEFT}" y="{_HEIGHT - 12}">{x0:.3g}</text>',
        f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 12}" text-anchor="end">{x1:.3g}</text>',
        f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 2}" text-anchor="middle">{escape(across)}</text>',
        f'<text transform="translate(9 {_HEIGHT / 2 - 8}) rotate(-90)" text-anchor="middle">{escape(up)}</text>',
    ]
    box = f'<path d="M{_LEFT} 8V{_HEIGHT - _BOTTOM}H{_WIDTH - 8}" fill="none" stroke="#999"/>'
    inside = box + "".join(drawn + ends)
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{inside}</svg>'
    named = "".join(
        f'<span><i style="background:{ink}"></i>{escape(name)}</span>'
        for ink, name in zip(_inks(len(curves)), curves, strict=True)
    )
    return f'<figure><figcaption>{escape(title)}</figcaption>{picture}<p class="key">{named}</p></figure>'


def _inks(count: int) -> list[str]:
    return [INKS[i % len(INKS)] for i in range(count)]


def _thin(points: Points, most: int = 200) -> Points:
    """At most so many points, evenly spread."""
    if len(points) <= most:
        return points
    return [points[i] for i in np.unique(np.linspace(0, len(points) - 1, most).astype(int))]


def bars(title: str, values: Mapping[str, float], unit: str, most: float | None = None) -> str:
    """A bar for each name."""
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    if not values:
        return ""
    top = most or max(values.values()) or 1.0
    rows = "".join(
        f'<tr><th>{escape(name)}</th><td class="bar"><i style="width:{100 * min(value / top, 1):.1f}%"></i></td>'
        f"<td>{value:.4g}</td></tr>"
        for name, value in values.items()
    )
    return f"<figure><figcaption>{escape(title)} ({escape(unit)})</figcaption><table class=bars>{rows}</table></figure>"


def confusion(title: str, matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """A table of what is there (rows) against what is said (columns), in percent of the row."""
    if len(names) > 31:
        return ""  # nobody reads eighty columns
    head = "".join(f"<th><span>{escape(name)}</span></th>" for name in names)
    rows = []
    for name, counts in zip(names, matrix, strict=True):
        total = sum(counts)
        cells = "".join(
            f'<td style="background:rgba(11,110,153,{count / total:.2f})" title="{100 * count / total:.1f} %">'
            f"{100 * count / total:.0f}</td>"
            if total
            else "<td></td>"
            for count in counts
        )
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    body = f"<tr><td></td>{head}</tr>{''.join(rows)}"
    return f"<figure><figcaption>{escape(title)}</figcaption><table class=confusion>{body}</table></figure>"
