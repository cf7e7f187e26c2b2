"""Damaged shard sets, sources and photos, hostile runs: is all that matters reported, without a crash or a hang?

python -m benchmarks.fuzz [--count 200] [--seed 0] [--first 0]   prints a Markdown table; exit status 1 after a miss.

Outcomes are kept in runs/fuzz/ as they come, so that a run that was stopped goes on when it is called again; those of
other code are thrown away.

Each case damages a copy of a small set in one way and lets every reader have it: verify, every member through the
reader and its decoder, and an epoch of training. A miss is damage that changes what is read and that none of them
reports, or reports without saying where. Cases run in child processes under a time limit, so that a crash of a decoder
is a line of the table. Harmless: what is read stayed the same, e.g. a field of index.json that nobody needs. Valid:
another sound photo or json whose crc32 the index was given anew, which nobody can tell from the first. Sources for
`create` and folders for `predict` are in fuzz_sources.py, run directories that a stranger sent in fuzz_runs.py.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.common import machine, table
from benchmarks.fuzz_kinds import CONTENT, FILES, NAME, make_set
from benchmarks.fuzz_runs import RUNS
from benchmarks.fuzz_sources import SOURCES
from esol.base.errors import DataError, EsolError
from esol.base.progress import progress
from esol.config import DataConfig
from esol.data.index import Index
from esol.data.plan import Plan, share_of
from esol.data.reader import ShardReader
from esol.data.samples import decode_mask, encode_mask, encode_png
from esol.data.transforms import Crop, decode
from esol.ops.metrics import confusion_matrix
from esol.ops.pairs import pair_labels, pair_offsets
from shards.verify import verify

SECONDS = 30.0  # for one case; they take a tenth of one
MEMORY = 4 << 30  # bytes that a child may take beyond what its imports took
PLACE = re.compile(r"\.tar|index\.json|sample |split|" + NAME)  # what a report must name, one of them
BAD = ("miss", "crash", "hang")
Kind = Callable[..., Any]


def _labels(rng: np.random.Generator, most: int) -> np.ndarray:
    """uint8 (H, W) from 1 x 1 up, of numbers 0..most and void, of void alone, or of one number."""
    shape = tuple(rng.integers(1, 20, 2))
    if rng.random() < 0.2:
        return np.full(shape, rng.choice([0, most, 255]), np.uint8)
    return rng.choice([*range(most + 1), 255], shape).astype(np.uint8)


def _pairs(rng: np.random.Generator) -> str:
    labels, radius = _labels(rng, int(rng.integers(1, 255))), int(rng.integers(1, 7))
    found = torch.stack(pair_labels(torch.from_numpy(labels)[None], radius))[:, 0].numpy()
    expected = np.zeros_like(found)
    height, width = labels.shape
    for k, (dy, dx) in enumerate(pair_offsets(radius)):
        for y, x in itertools.product(range(height - dy), range(max(0, -dx), min(width, width - dx))):
            a, b = int(labels[y, x]), int(labels[y + dy, x + dx])
            if 255 not in (a, b):
                expected[2 if a != b else 1 if a else 0, k, y, x] = True
    return "harmless" if (found == expected).all() else "miss"


def _confusion(rng: np.random.Generator) -> str:
    classes = int(rng.integers(1, 30))
    truth = _labels(rng, classes)
    predicted = rng.integers(0, classes + 1, truth.shape)
    expected = np.zeros((classes + 1, classes + 1), np.int64)
    for t, p in zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True):
        if t != 255:
            expected[t, p] += 1
    return "harmless" if (confusion_matrix(truth, predicted, classes + 1) == expected).all() else "miss"


def _confusion_odd(rng: np.random.Generator) -> str:
    """Numbers outside the labels, or two sizes: what comes back is wrong."""
    classes = int(rng.integers(1, 30))
    truth = rng.integers(0, classes + 1, (int(rng.integers(1, 9)), 5))
    predicted = rng.integers(0, classes + 1, truth.shape)
    if rng.random() < 0.4:
        predicted = predicted[:, :4]
    else:
        wrong = (truth, predicted)[int(rng.integers(2))]
        wrong[-1, -1] = rng.choice([classes + 1, 254, -1])
    confusion_matrix(truth, predicted, classes + 1)
    return "miss"


def _decoded(rng: np.random.Generator) -> str:
    levels, classes = _labels(rng, int(rng.integers(1, 255))), int(rng.integers(1, 255))
    data = encode_mask(levels) if rng.random() < 0.5 else encode_png(Image.fromarray(levels))
    back = decode_mask(data, "map", classes)
    return "harmless" if (back == levels).all() and (levels[levels != 255] <= classes).all() else "miss"


LABEL_MAPS: dict[str, Kind] = {
    "label map: pair_labels": _pairs,
    "label map: confusion_matrix": _confusion,
    "label map: confusion_matrix, odd": _confusion_odd,
    "label map: decode_mask": _decoded,
}


@dataclass(frozen=True)
class Case:
    """kind(root, rng) damages the set in root; for a label map, kind(rng) says itself how it went."""

    number: int
    name: str
    kind: Kind
    seed: int


@dataclass(frozen=True)
class Outcome:
    """verdict: reported, harmless, valid, or one of BAD; detail: the first report, or what went wrong."""

    case: Case
    verdict: str
    by_verify: bool = False
    by_reading: bool = False
    detail: str = ""


KINDS: dict[str, Kind] = {**FILES, **CONTENT, **SOURCES, **RUNS, **LABEL_MAPS}


def cases(count: int, seed: int, first: int = 0) -> list[Case]:
    """Numbers first, first + 1, ...; the kinds take turns."""
    names = list(KINDS)
    chosen = ((number, names[number % len(names)]) for number in range(first, first + count))
    return [Case(number, name, KINDS[name], seed) for number, name in chosen]


def judge(case: Case, base: Path) -> Outcome:
    """One case, in this process; base: the whole set."""
    rng = np.random.default_rng([case.seed, case.number])
    if case.name in LABEL_MAPS:
        try:
            return Outcome(case, case.kind(rng))
        except (EsolError, ValueError) as error:  # ValueError: the contract of functions of arrays
            return Outcome(case, "reported", by_reading=True, detail=str(error))
        except Exception as error:
            return Outcome(case, "crash", detail=f"{type(error).__name__}: {error}")
    if case.name in SOURCES or case.name in RUNS:
        with tempfile.TemporaryDirectory(dir=base.parent) as scratch:
            try:
                verdict, detail = case.kind(Path(scratch), rng)
            except Exception as error:  # the command's own, which it must not let through
                verdict, detail = "crash", f"{type(error).__name__}: {error}"
        return Outcome(case, verdict, by_reading=verdict == "reported", detail=detail)
    with tempfile.TemporaryDirectory(dir=base.parent) as scratch:
        root = Path(shutil.copytree(base, Path(scratch, NAME)))
        case.kind(root, rng)
        try:
            by_verify = verify(str(root))
            by_reading, found = read_all(root, whole=case.name in FILES)
        except Exception as error:
            return Outcome(case, "crash", detail=f"{type(error).__name__}: {error}")
    reports = by_verify + by_reading
    nowhere = [report for report in reports if not PLACE.search(report)]
    if nowhere:
        return Outcome(case, "miss", bool(by_verify), bool(by_reading), f"names no place: {nowhere[0]}")
    if reports:
        return Outcome(case, "reported", bool(by_verify), bool(by_reading), reports[0])
    _, before = read_all(base, whole=case.name in FILES)
    changed = sorted(part for part in before.keys() | found.keys() if before.get(part) != found.get(part))
    if not changed:
        return Outcome(case, "harmless")
    valid = case.name in CONTENT and CONTENT[case.name].may_be_valid
    return Outcome(case, "valid" if valid else "miss", detail=f"changed without a word: {', '.join(changed[:3])}")


def read_all(root: Path, whole: bool) -> tuple[list[str], dict[str, Any]]:
    """Reports, and all that a reader gets: classes, splits by key, and every sample's members, labels and pixels.

    whole: the members' own bytes count, not only what they decode to.
    """
    from esol.data.stream import training_stream  # secures webdataset for the process, which is for who runs it to ask

    reports: list[str] = []
    try:
        index = Index.load(root)
        index.check_files()
    except EsolError as error:
        return [str(error)], {}
    reader = ShardReader(index)
    found: dict[str, Any] = {
        "classes": index.classes,
        "splits": {n: index.keys[o].tolist() for n, o in index.splits.items()},
    }
    for ordinal, key in enumerate(index.keys.tolist()):
        try:
            found[f"sample {key}"] = _read_one(reader, ordinal, whole)
        except EsolError as error:
            reports.append(str(error))
    try:
        ordinals = index.split("train")
        plan = Plan(ordinals, index.shard_of[ordinals], seed=0, global_batch=1)
        share, config = share_of(0, 1, 1, micro_batch=1), DataConfig(root=str(root), workers=0)
        stop = plan.steps_per_epoch
        for _ in training_stream(reader, plan, share, 0, stop, Crop(24, scale=(0.5, 1.5)), config, (0, 0, 0)):
            pass
    except EsolError as error:
        reports.append(str(error))
    return reports, found


def _read_one(reader: ShardReader, ordinal: int, whole: bool) -> list[Any]:
    index = reader.index
    where = reader.name(ordinal)
    members = {ext: reader.read(ordinal, ext) for ext, rows in index.members.items() if rows[ordinal, 0] >= 0}
    photo = decode(reader.image(ordinal), where).numpy()
    if photo.ndim != 3 or photo.dtype != np.uint8:
        raise AssertionError(f"{where}: the photo became {photo.dtype} {photo.shape}")
    arrays = [photo, reader.labels(ordinal)]
    if "mask.png" in members:
        mask = decode_mask(members["mask.png"], where, len(index.classes))
        if mask.shape != photo.shape[1:]:
            raise DataError(f"{where}: the mask is {mask.shape}, the photo {photo.shape[1:]}")  # as the stages say
        arrays.append(mask)
    found = [(array.shape, hashlib.sha256(array.tobytes()).hexdigest()) for array in arrays]
    return [found, members if whole else sorted(members)]


class _Child:
    """A process that judges one case after the other."""

    def __init__(self, base: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.fuzz_kinds", "esol.data.stream"])  # torch is imported once
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=_serve, args=(far, base), daemon=True)
        self.process.start()
        far.close()
        self.pipe.recv()  # it is ready

    def judge(self, case: Case, seconds: float) -> Outcome:
        self.pipe.send(case)
        if not self.pipe.poll(seconds):
            return Outcome(case, "hang", detail=f"no answer in {seconds:g} s")
        try:
            outcome: Outcome = self.pipe.recv()
            return outcome
        except (EOFError, ConnectionError):
            self.process.join()
            return Outcome(case, "crash", detail=f"the process died with exit code {self.process.exitcode}")

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Any, base: Path) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress, and what decoders have to say
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    pipe.send("ready")
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        pipe.send(judge(case, base))


def run(
    chosen: Sequence[Case],
    jobs: int = 1,
    seconds: float = SECONDS,
    done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Every case in a child under a time limit; a child that hangs is killed, one that died is replaced.

    done is told of each outcome as it comes, by several threads.
    """
    with tempfile.TemporaryDirectory() as scratch:
        base = make_set(Path(scratch, "whole"))
        reports = verify(str(base)) + read_all(base, whole=True)[0]
        if reports:
            raise AssertionError(f"the set is damaged before the first case: {reports[0]}")

        def work(some: Sequence[Case]) -> list[Outcome]:
            child, outcomes = None, []
            for case in some:
                child = child or _Child(base)
                outcomes.append(child.judge(case, seconds))
                done(outcomes[-1])
                if outcomes[-1].verdict == "hang" or not child.process.is_alive():
                    child.end()
                    child = None
            if child:
                child.end()
            return outcomes

        with ThreadPoolExecutor(jobs) as pool:
            parts = list(pool.map(work, (chosen[i::jobs] for i in range(jobs))))
    return sorted((outcome for part in parts for outcome in part), key=lambda outcome: outcome.case.number)


class Log:
    """Outcomes on disk, a JSON object a line; those that other code came to do not count."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        code = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(_code()))).hexdigest()
        self.known: dict[int, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        if lines[:1] != [code]:
            path.write_text(f"{code}\n")
            return
        for line in lines[1:]:
            with contextlib.suppress(ValueError):  # half a line of a run that was killed
                record = json.loads(line)
                self.known[record.pop("number")] = record

    def outcome(self, case: Case) -> Outcome | None:
        """What is known of a case."""
        return Outcome(case, **self.known[case.number]) if case.number in self.known else None

    def add(self, outcome: Outcome) -> None:
        record = {"number": outcome.case.number, "verdict": outcome.verdict, "detail": outcome.detail}
        record |= {"by_verify": outcome.by_verify, "by_reading": outcome.by_reading}
        with self._lock, open(self._path, "a") as file:
            file.write(json.dumps(record) + "\n")


def _code() -> list[Path]:
    """Everything whose change may change an outcome."""
    root = Path(__file__).parents[1]
    return [*(root / "esol").rglob("*.py"), *(root / "shards").rglob("*.py"), *(root / "benchmarks").glob("fuzz*.py")]


def summary(outcomes: Sequence[Outcome]) -> str:
    """A row for each kind, and one for all."""
    rows = []
    for name in (*KINDS, "all"):
        some = [o for o in outcomes if name in (o.case.name, "all")]
        verdicts = Counter(o.verdict for o in some)
        seen = [o for o in some if o.verdict == "reported"]
        counts = [len(some), sum(o.by_verify for o in seen), sum(o.by_reading for o in seen)]
        rows.append([name, *counts, *(verdicts[v] for v in ("harmless", "valid", *BAD))])
    headings = (
        "mutation",
        "cases",
        "reported by verify",
        "by reading",
        "harmless",
        "valid",
        "misses",
        "crashes",
        "hangs",
    )
    return table(headings, [row for row in rows if row[1]])


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.fuzz")
    parser.add_argument("--count", type=int, default=200, help="cases (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first case; with --count 1 it alone")
    options = parser.parse_args()
    chosen, log = cases(options.count, options.seed, options.first), Log(Path(f"runs/fuzz/seed-{options.seed}.jsonl"))
    known = [outcome for case in chosen if (outcome := log.outcome(case))]
    left = [case for case in chosen if case.number not in log.known]
    begun, count = time.monotonic(), itertools.count(len(known) + 1)
    with progress("fuzz", len(chosen), "cases", visible=True) as advance:

        def done(outcome: Outcome) -> None:
            log.add(outcome)
            advance(next(count), outcome.case.name)

        outcomes = known + (run(left, len(os.sched_getaffinity(0)), done=done) if left else [])
    took = f"{len(left)} cases in {time.monotonic() - begun:.0f} s" + (f", {len(known)} known before" if known else "")
    print(f"{machine()}\n{took}\n\n{summary(outcomes)}")
    bad = [o for o in outcomes if o.verdict in BAD]
    for outcome in bad[:20]:
        print(f"\n{outcome.verdict}, case {outcome.case.number}, {outcome.case.name}: {outcome.detail:.300}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
