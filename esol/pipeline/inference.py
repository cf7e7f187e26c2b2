"""A stage that goes over shards: one shard is one unit of work, done by one rank, its output a shard of the same name.

Beside <shard>, written whole or not at all, lies <shard>.counts.npz: whole numbers that add up over shards in any
order, so that scores do not depend on who did what, and the hash of the shard. What a killed job has finished is kept
where it still is what was written.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esol.base.errors import DataError
from esol.base.files import atomic_write, sha256
from esol.base.progress import progress
from esol.data.index import scan_shard, write_index
from esol.data.samples import write_mirror_shard
from esol.data.transforms import decode
from esol.ops.tiles import portions
from esol.pipeline.crew import TOGETHER, Crew
from esol.pipeline.made import ARRAY_ERRORS, read_arrays, truth_of
from esol.pipeline.registry import Stage
from esol.pipeline.scores import Results
from esol.report.pictures import Pixels, paint, sheet

Tally = dict[str, NDArray[Any]]
Members = dict[str, bytes]
_SHARD = "shard sha256"  # of the counts: what the shard beside them holds
Made = TypeVar("Made")


@dataclass(frozen=True)
class Sample:
    """One photo of the shards, as inference stages get it.

    ordinal: its place in the index; key; name: of shard and key, for messages; image: uint8 (3, H, W), on the CPU;
    labels: float32 (C,), multi-hot; truth: its true mask (H, W), where it is scored and has one.
    """

    ordinal: int
    key: str
    name: str
    image: Tensor
    labels: NDArray[np.float32]
    truth: NDArray[np.uint8] | None

    @property
    def classes(self) -> list[int]:
        """The classes that it is labelled with, without background."""
        return np.flatnonzero(self.labels).tolist()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[1], self.image.shape[2]

    @property
    def pixels(self) -> Pixels:
        """uint8 (H, W, 3), for pictures."""
        return self.image.permute(1, 2, 0).numpy()


class InferenceStage(Stage, Generic[Made]):
    """A stage that makes something of every photo of some splits; what it makes of one is a `Made`.

    splits: keys below `data` that name the splits; scored: the key of the split whose truth it is held against;
    labelled: whether it needs every photo's labels, so that one without any record of them is an error; writes: whether
    what it makes is kept as shards, or the counts alone; beside: whether it has small operators, such as a CRF's, of
    which it makes one pass for several photos: it gets them together on a GPU, where such operators wait to be started,
    and one by one on a CPU, where that is not slower.
    """

    produces: ClassVar[tuple[str, ...]] = ("index.*", "*.tar")
    splits: ClassVar[tuple[str, ...]] = ("mask_split", "score_split")
    shaped_by: ClassVar[tuple[str, ...]] = ("data.mask_split", "data.score_split")
    scored: ClassVar[str] = "score_split"
    labelled: ClassVar[bool] = True
    writes: ClassVar[bool] = True
    beside: ClassVar[bool] = False

    def open(self) -> None:
        """Loads networks and earlier stages' shards; every rank does, so that it may hold collectives."""

    @property
    def batch(self) -> int:
        """How many photos `make` gets at most; of what is alike in them a network may make one pass."""
        return TOGETHER if self.beside and self.context.engine.device.type != "cpu" else 1

    def make(self, samples: Sequence[Sample]) -> list[Made]:
        """What it makes of photos of any sizes; without gradients, in several threads at a time."""
        raise NotImplementedError

    def members(self, sample: Sample, made: Made) -> Members:
        """What is written of it: extension -> bytes."""
        return {}

    def confidence(self, sample: Sample, mask: NDArray[np.uint8]) -> NDArray[np.float32]:
        """How sure it is of the label map (H, W) that it has made, float (H, W) in 0..1; of stages that make masks."""
        raise NotImplementedError

    def count(self, sample: Sample, made: Made) -> Tally:
        """Numbers that add up over all photos."""
        return {}

    def tiles(self, sample: Sample, made: Made) -> dict[str, Pixels]:
        """Its pictures by heading, to stand between the photo and its truth."""
        return {}

    def results(self, tally: Tally) -> Results:
        """What all counts come to; on the main rank."""
        return Results()

    def run(self) -> Results:
        """Goes over the shards, draws some photos, and returns the results."""
        self.open()
        tally = over_shards(self)
        if not self.context.engine.is_main:
            return Results()
        found = self.results(tally)
        if self.writes:
            draw(self, self.name)
        return found

    def sample(self, ordinal: int) -> Sample:
        """A photo of the data by its place in the index; DataError where it cannot be read."""
        context, reader = self.context, self.context.reader
        context.engine.beat(f"the photo {context.index.keys[ordinal]}")  # a picture's too, while other ranks wait
        image = decode(reader.image(ordinal), reader.name(ordinal))
        known = self.labelled or context.index.labels is not None
        labels = reader.labels(ordinal) if known else np.zeros(len(context.index.classes), np.float32)
        truth = truth_of(context, ordinal, (image.shape[1], image.shape[2]), getattr(context.config.data, self.scored))
        return Sample(ordinal, str(context.index.keys[ordinal]), reader.name(ordinal), image, labels, truth)


def over_shards(stage: InferenceStage[Any]) -> Tally:
    """Makes every photo of the stage's splits; returns the sum of all counts on every rank.

    Stopped after a signal, between two photos: the shards that are finished by then are kept.
    """
    context, name, folder = stage.context, stage.name, stage.folder
    engine, index = context.engine, context.index
    splits = list(dict.fromkeys(getattr(context.config.data, key) for key in stage.splits))
    ordinals = np.unique(np.concatenate([index.split(split) for split in splits]))
    shard_of = index.shard_of[ordinals]
    shards = np.unique(shard_of)
    _discard_foreign(stage)
    if advice := advice_on_shards(name, len(shards), len(ordinals), engine.world_size):
        context.say(advice)
    mine = shards[engine.rank :: engine.world_size]
    crew = Crew(engine.device)
    to_do = (int(s) for s in mine if not (folder / f"{index.shards[s].name}.counts.npz").exists())
    context.reader.ahead(to_do)
    with progress(name, int(np.isin(shard_of, mine).sum()), "images of this process", engine.is_main) as advance:
        done = 0
        for shard in mine:
            spec = index.shards[shard].name
            members = ordinals[shard_of == shard]
            engine.beat(f"the check of {folder / spec}")
            if not _finished(folder, spec, stage.writes):
                _one_shard(stage, crew, spec, members, partial(_advance, advance, done, spec))
            if context.stop:
                break
            done += len(members)
            advance(done, spec)
    if engine.any(bool(context.stop)):
        raise context.stop.stopped(engine, f"{name} stopped, its finished shards are kept")
    engine.barrier(f"the shards of {name} from all ranks")
    names = [index.shards[s].name for s in shards]
    if engine.is_main and stage.writes:
        places = {s: np.searchsorted(ordinals, index.split(s)) for s in splits}
        records = []
        for shard_name in names:
            engine.beat(f"the index of {folder / shard_name}")
            records.append(scan_shard(folder, shard_name))
        write_index(folder, index.classes, places, records)
    return _sum(folder / f"{n}.counts.npz" for n in names)


def _advance(advance: Callable[[int, str], None], before: int, spec: str, count: int) -> None:
    advance(before + count, spec)


def advice_on_shards(name: str, shards: int, samples: int, world_size: int) -> str:
    """What to say where processes outnumber shards, else nothing: a shard is the unit of work here."""
    if shards >= world_size:
        return ""
    return (
        f"{name}: the split lies in {shards} shards, fewer than {world_size} processes: some have nothing to do. "
        f"To use all, create the set again with --samples-per-shard {max(1, samples // world_size)} or fewer"
    )


def _discard_foreign(stage: InferenceStage[Any]) -> None:
    """Removes what a run with other settings left in the folder."""
    context, folder = stage.context, stage.folder
    mark = folder / "fingerprint.json"  # of the settings that the shards beside it were made with
    if context.engine.is_main:
        stamp = json.dumps({"fingerprint": context.fingerprint})
        if not mark.exists() or mark.read_text() != stamp:
            for path in folder.iterdir():
                if path.is_file():
                    path.unlink(missing_ok=True)
            atomic_write(mark, stamp)
    context.engine.barrier(f"the main rank to clear the folder of {stage.name}")


def _one_shard(
    stage: InferenceStage[Any], crew: Crew, spec: str, ordinals: NDArray[np.int64], advance: Callable[[int], None]
) -> None:
    """One shard's samples, then its two files in the order of the samples, the counts last; nothing after a signal."""
    tally: Tally = {}
    written: dict[int, Members] = {}
    groups = [ordinals[start : start + stage.batch].tolist() for start in range(0, len(ordinals), stage.batch)]
    try:
        for found in crew.map(partial(_finish, stage, crew), groups):
            for sample, counted, members in found:
                for key, counts in counted.items():
                    tally[key] = tally[key] + counts if key in tally else counts
                written[sample.ordinal] = members
                stage.context.engine.beat(f"{stage.name} behind sample {sample.key} of {spec}")
            advance(len(written))
            if stage.context.stop:
                return
    except DataError as error:
        raise DataError(f"{error}; {stage.name} needs every sample of its split") from error
    digest = ""
    if stage.writes:
        keys = stage.context.index.keys
        mirrored = ({"__key__": str(keys[o]), **written[o]} for o in ordinals.tolist())
        digest = write_mirror_shard(stage.folder, spec, mirrored)["sha256"]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **tally, **{_SHARD: np.array(digest)})  # type: ignore[arg-type]
    atomic_write(stage.folder / f"{spec}.counts.npz", buffer.getvalue())


def _finish(stage: InferenceStage[Any], crew: Crew, ordinals: Sequence[int]) -> list[tuple[Sample, Tally, Members]]:
    """What a stage makes of some photos, counted and packed; in a thread of the crew."""
    samples, found = [stage.sample(ordinal) for ordinal in ordinals], list[tuple[Sample, Tally, Members]]()
    for some in portions([sample.size for sample in samples]) if stage.beside else [slice(len(samples))]:
        with torch.no_grad(), crew.room(*(sample.size for sample in samples[some])):
            found += [
                (sample, stage.count(sample, made), stage.members(sample, made) if stage.writes else {})
                for sample, made in zip(samples[some], stage.make(samples[some]), strict=True)
            ]
    return found


def _finished(folder: Path, spec: str, writes: bool) -> bool:
    """Whether a shard's two files are there and undamaged."""
    try:
        members = read_arrays(folder / f"{spec}.counts.npz")  # reading checks every member's checksum
        return not writes or sha256(folder / spec) == str(members[_SHARD])
    except ARRAY_ERRORS:
        return False


def _sum(paths: Iterator[Path]) -> Tally:
    total: Tally = {}
    for path in paths:
        for key, counts in read_arrays(path).items():
            if key != _SHARD:
                total[key] = total[key] + counts if key in total else counts
    return total


def draw(stage: InferenceStage[Any], name: str) -> None:
    """pictures/<name>.png, in MLflow as well: some photos of the scored split, what the stage makes of them, truth."""
    context = stage.context
    members = context.index.split(getattr(context.config.data, stage.scored))
    count = min(context.config.tracking.pictures, len(members))
    chosen = members[np.linspace(0, len(members) - 1, count).astype(int)].tolist()  # evenly spread
    crew = Crew(context.engine.device)
    rows: list[tuple[str, list[Pixels]]] = []
    headings: list[str] = []
    for tiles, row in crew.map(partial(_drawn, stage, crew), chosen):
        headings = max(headings, tiles, key=len)
        rows.append(row)
    if rows:
        path = context.run_dir / "pictures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        sheet(rows, headings).save(path)
        context.tracker.picture(path)


def _drawn(stage: InferenceStage[Any], crew: Crew, ordinal: int) -> tuple[list[str], tuple[str, list[Pixels]]]:
    """Headings and a row of the pictures; in a thread of the crew."""
    sample = stage.sample(ordinal)
    with torch.no_grad(), crew.room(sample.size):
        tiles = {"photo": sample.pixels, **stage.tiles(sample, stage.make([sample])[0])}
    if sample.truth is not None:
        tiles["truth"] = paint(sample.pixels, sample.truth)
    shown = ", ".join(stage.context.index.classes[c] for c in sample.classes)
    return list(tiles), (f"{sample.key}: {shown}" if shown else sample.key, list(tiles.values()))
