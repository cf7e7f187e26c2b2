"""What a row of `python -m benchmarks` is: the same work done two ways, turn by turn in one process."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.common import CLASSES, interleaved, once, ratios
from esol.config import Config
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.engines import make_engine
from esol.pipeline.config_file import load
from esol.pipeline.context import Context
from esol.training.loop import StopSignal
from shards.folder import folder_source
from shards.writer import create

ROOT = Path(__file__).parents[1]
HEADINGS = ("row", "of it", "ours, s", "other, s", "other / ours", "by round", "largest difference", "allowed")


class NotRun(Exception):  # noqa: N818  it is no error: the row says so
    """Why a row cannot be measured on this machine."""


@dataclass(frozen=True)
class Comparison:
    """The same work done two ways.

    name: what of the row it is, "" where the row has one; other: the other's way; ours: by variant; apart: the largest
    difference of what ours and the other's gave, None where they do not compute the same; within: what it may be, by
    variant; units: photos or steps in a call; warm: calls that are not timed, of which the last's results are compared.
    """

    name: str
    other: Callable[[], Any]
    ours: dict[str, Callable[[], Any]]
    apart: Callable[[Any, Any], float] | None = None
    within: dict[str, float] = field(default_factory=dict)
    units: int = 1
    warm: int = 1


@dataclass(frozen=True)
class Row:
    """One line of the list of rows: what ours and the other do, and how its comparisons are built."""

    ours: str
    other: str
    build: Callable[[Photos], Iterator[Comparison]]


@dataclass
class Photos:
    """Some JPEGs of a folder, scaled to one long side and written again, and a shard set of them.

    folder: where they come from; count: of the first by name; side: their new long side in pixels; place: a folder for
    what is made. Labels are two of CLASSES made-up classes each, drawn by the photo's number.
    """

    folder: Path
    count: int
    side: int
    place: Path
    paths: list[Path] = field(init=False)

    def __post_init__(self) -> None:
        found = sorted(p for p in self.folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg"))[: self.count]
        if len(found) < self.count:
            raise SystemExit(f"{self.folder} has {len(found)} JPEGs and {self.count} are asked for: lower --photos")
        images = self.place / "images"
        images.mkdir(parents=True)
        self.paths = [images / f"{number:05}.jpg" for number in range(len(found))]
        classes = [f"class-{number:02}" for number in range(CLASSES)]
        with (self.place / "labels.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("image", "labels"))
            for number, (path, copy) in enumerate(zip(found, self.paths, strict=True)):
                chosen = np.random.default_rng(number).choice(classes, 2, replace=False)
                table.writerow((copy.name, ";".join(chosen)))
                with Image.open(path) as photo:
                    size = tuple(max(1, round(n * self.side / max(photo.size))) for n in photo.size)
                    photo.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(copy, quality=95)
        (self.place / "classes.txt").write_text("\n".join(classes))

    @cached_property
    def reader(self) -> ShardReader:
        """Of a shard set of these photos."""
        root = self.place / "shards"
        create(folder_source(str(self.place)), str(root))
        return ShardReader(Index.load(root))

    @cached_property
    def ordinals(self) -> list[int]:
        """The places of the photos in the shard set, in the order of `paths`."""
        keys = {str(key): ordinal for ordinal, key in enumerate(self.reader.index.keys)}
        return [keys[path.stem] for path in self.paths]

    def context(self, config: str, *overrides: str) -> Context:
        """What stages are given for these photos, in a job of this process, by a config without weights or tracking."""
        settings: Config = load(
            ROOT / "configs" / config,
            [
                f"run_dir={self.place / 'run'}",
                f"data.root={self.reader.index.root}",
                *(f"data.{key}_split=train" for key in ("train", "mask", "score", "eval")),
                *("model.weights=none", "segment.model.weights=none", "tracking.uri=none"),
                f"engine.threads={torch.get_num_threads()}",
                *overrides,
            ],
        )
        engine, reader = make_engine(settings.engine, settings.seed), self.reader
        nobody: Any = None  # follows it
        return Context(settings, engine, nobody, reader.index, reader, StopSignal(), resume=False)


def measure(name: str, row: Row, photos: Photos, rounds: int) -> Iterator[list[object]]:
    """The lines of one row of the list, under HEADINGS: medians a unit, and the ratio's median, lowest and highest."""
    try:
        for case in row.build(photos):
            yield from _lines(name, case, rounds)
    except NotRun as reason:
        yield [name, f"not run: {reason}", *[""] * (len(HEADINGS) - 2)]


def _lines(name: str, case: Comparison, rounds: int) -> Iterator[list[object]]:
    ways = {"other": case.other, **case.ours}
    for _ in range(case.warm):
        gave = {way: work() for way, work in ways.items()}
    other = gave["other"]
    found = interleaved({way: partial(once, work) for way, work in ways.items()}, rounds)
    for way in case.ours:
        middle, least, most = ratios(found["other"], found[way])
        medians = [statistics.median(found[which]) / case.units for which in (way, "other")]
        apart = ("", "")
        if case.apart:
            found_apart, allowed = case.apart(gave[way], other), case.within[way]
            apart = (f"{found_apart:.1e}" if found_apart <= allowed else f"**{found_apart:.1e}**", f"{allowed:.0e}")
        what = ", ".join(part for part in (case.name, way) if part)
        yield [name, what, *medians, middle, f"{least:.3g} to {most:.3g}", *apart]


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference / largest value."""
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-3)).item()
