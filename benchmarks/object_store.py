"""What shards behind a URL cost: requests, bytes and seconds against a local folder; S3 by moto, HTTP with ranges.

    python -m benchmarks.object_store line      create, verify, classify (two ranks, stopped and resumed), localize
    python -m benchmarks.object_store epochs    an epoch from an empty cache and the next one, in one process
    python -m benchmarks.object_store ranges    the wanted samples of shards by ranges, or whole shards, by their share
    python -m benchmarks.object_store ahead     an epoch's stream and a walk over shards, with shards fetched ahead
    python -m benchmarks.object_store faults    two ranks whose store fails in the middle: how and when the job ends

Servers run in this process, on loopback; what stands before them counts, and answers after --delay seconds with --rate
bytes a second, of all answers together. Bytes are those of bodies.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import machine, table
from benchmarks.stores import AWS, Between, folder_server, s3_server
from esol.base.files import sha256
from esol.config import DataConfig
from esol.data import remote
from esol.data.index import Index
from esol.data.plan import BLOCK, Plan, share_of
from esol.data.reader import ShardReader
from esol.data.stream import training_stream
from esol.data.transforms import Crop
from shards import cli

ROOT = Path(__file__).parents[1]
SET = ["create", "synthetic", "--train", "512", "--val", "64", "--size", "256", "--samples-per-shard", "32", "--out"]
CONFIG = """
model: {backbone: small, weights: none, output_stride: 8, freeze: none, kernel_channels: 16}
data: {mask_split: val, score_split: val, long_side: [96, 128], crop: 96, workers: 1}
stages: [classify, localize]
classify: {duration: 2 epochs, global_batch: 32, lr_batch: 32, optimizer: adamw, lr: 1e-4}
localize: {scales: [1.0], batch: 4}
engine: {threads: 1}
checkpoint: {every: 10}
tracking: {uri: none, every: 1, page: 0, pictures: 0}
"""
STEP = 0.3  # seconds that a step, or a shard of a walk, takes beside its data, in `ahead`
BATCH = 32


@contextmanager
def places(
    folder: Path, delay: float, rate: float, names: list[str]
) -> Iterator[dict[str, tuple[str, Between | None]]]:
    """Name -> root and what counts before it: a set in `folder`, behind HTTP, and in a bucket that holds it as well."""
    with ExitStack() as stack:
        found: dict[str, tuple[str, Between | None]] = {"folder": (str(folder), None)}
        if "http" in names:
            http = stack.enter_context(Between(stack.enter_context(folder_server(folder)), delay, rate))
            found["http"] = (http.url, http)
        if "s3" in names:
            import s3fs

            s3 = stack.enter_context(Between(stack.enter_context(s3_server()), delay, rate))
            os.environ.update(AWS | {"AWS_ENDPOINT_URL": s3.url})
            store = s3fs.S3FileSystem()
            store.mkdir("bucket")
            for path in folder.glob("*") if folder.exists() else ():
                store.put_file(str(path), f"bucket/set/{path.name}")
            s3.take()
            found["s3"] = ("s3://bucket/set", s3)
        yield {name: found[name] for name in names}


def cost(between: Between | None) -> tuple[int, float]:
    """Requests and megabytes since the last call."""
    found = between.take() if between else []
    return len(found), sum(request.sent + request.received for request in found) / 1e6


def start(root: str, run_dir: Path, cache: Path, *more: str, ranks: int = 2) -> subprocess.Popen[bytes]:
    config = run_dir.parent / "config.yaml"
    config.write_text(CONFIG)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "esol/train.py"), "--config", str(config), *more]
    for override in (f"data.root={root}", f"data.cache={cache}", f"run_dir={run_dir}"):
        command += ["--set", override]
    log = open(run_dir.with_suffix(".log"), "ab")  # noqa: SIM115  the process writes to it
    return subprocess.Popen(command, stdout=log, stderr=log)


def first_step(run_dir: Path) -> float:
    """When the first step was done, in seconds since the epoch."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return float(next(line["time"] for line in map(json.loads, lines) if "metrics" in line))


def line(args: argparse.Namespace, work: Path) -> None:
    """Create, verify, train, stop, resume, localize, from and to each place."""
    rows: list[tuple[Any, ...]] = []
    shared = work / "shared"  # what HTTP serves; nobody can write there
    assert cli.main([*SET, str(shared)]) == 0
    with places(shared, args.delay, args.rate, ["http", "s3"]) as found:
        (http, before_http), (_, before_s3) = found["http"], found["s3"]
        made = [
            _line("folder", str(work / "own"), None, work, rows),
            _line("http", http, before_http, work, rows),
            _line("s3", "s3://bucket/own", before_s3, work, rows),
        ]
    print(f"\n{machine()}; {_settings(args)}")
    size = sum(shard.bytes for shard in Index.load(shared).shards) / 1e6
    print(f"{size:.1f} MB in {len(Index.load(shared).shards)} shards\n")
    print(table(("place", "what", "requests", "MB", "first step, s", "seconds"), rows))
    print(f"\nweights and maps are {'the same bytes' if len(set(made)) == 1 else 'DIFFERENT'} from all places")


def _line(name: str, root: str, between: Between | None, work: Path, rows: list[tuple[Any, ...]]) -> tuple[str, str]:
    """One place's rows; returns what its weights and maps are."""
    cache, run_dir = work / f"cache-{name}", work / f"run-{name}"

    def note(what: str, work: Callable[[], bool], steps: bool = False) -> None:
        began = time.time()
        ok = work()
        seconds, first = f"{time.time() - began:.1f}", f"{first_step(run_dir) - began:.1f}" if steps and ok else ""
        rows.append((name, what, *_counted(cost(between)), first, seconds))
        if not ok:
            raise SystemExit(f"{name}: {what} failed:\n{run_dir.with_suffix('.log').read_text()[-2000:]}")

    def stopped() -> bool:
        process = start(root, run_dir, cache, "--stages", "classify")
        while not (run_dir / "classify/checkpoints/latest").exists() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        return process.wait() != 0 and (run_dir / "classify/checkpoints/latest").exists()

    if name != "http":
        note("create", lambda: cli.main([*SET, root]) == 0)
    note("verify", lambda: cli.main(["verify", root]) == 0)
    note("classify, stopped", stopped, steps=True)
    note("classify, resumed", lambda: not start(root, run_dir, cache, "--stages", "classify", "--resume").wait())
    note("localize", lambda: not start(root, run_dir, cache, "--stages", "localize").wait())
    return sha256(run_dir / "classify/model.safetensors"), Index.load(run_dir / "localize").hash


def epochs(args: argparse.Namespace, work: Path) -> None:
    """An epoch from an empty cache and the next one, without launching anything."""
    assert cli.main([*SET, str(work / "set")]) == 0
    rows = []
    with places(work / "set", args.delay, args.rate, ["folder", "http", "s3"]) as found:
        for name, (root, between) in found.items():
            index = Index.load(root)
            rows.append((name, "index", *_counted(cost(between)), "", ""))
            index.check_files()
            rows.append((name, "sizes of all shards", *_counted(cost(between)), "", ""))
            for epoch in ("first epoch", "the same again"):
                first, seconds = _epoch(index, work / f"cache-{name}", 0.0)
                rows.append((name, epoch, *_counted(cost(between)), f"{first:.2f}", f"{seconds:.1f}"))
    print(f"\n{machine()}; {_settings(args)}\n")
    print(table(("place", "what", "requests", "MB", "first batch, s", "seconds"), rows))


def _counted(found: tuple[int, float]) -> tuple[int, str]:
    return found[0], f"{found[1]:.2f}"


def _settings(args: argparse.Namespace) -> str:
    rate = f"{args.rate / 1e6:g} MB/s" if args.rate else "no limit of bytes a second"
    return f"{args.delay * 1000:g} ms before each answer, {rate}"


def _epoch(index: Index, cache: Path, pause: float) -> tuple[float, float]:
    """Seconds to the first batch and for an epoch of the split train, with a data worker and `pause` s a step."""
    ordinals = index.split("train")
    plan = Plan(ordinals, index.shard_of[ordinals], 0, BATCH)
    config = DataConfig(root=index.root, workers=1)
    reader = ShardReader(index, str(cache), ordinals)
    began, first = time.perf_counter(), 0.0
    share, crop = share_of(0, 1, BATCH, 0), Crop(96, (96, 128))
    for _ in training_stream(reader, plan, share, 0, plan.steps_per_epoch, crop, config, (0, 0, 0)):
        first = first or time.perf_counter() - began
        time.sleep(pause)
    return first, time.perf_counter() - began


def ranges(args: argparse.Namespace, work: Path) -> None:
    """Reads what is wanted of the set from an empty cache: by the rule, only by ranges, and by whole shards."""
    assert cli.main([*SET, str(work / "set"), "--samples-per-shard", "64"]) == 0
    rows = []
    with places(work / "set", args.delay, args.rate, [args.place]) as found:
        root, between = found[args.place]
        index, rng = Index.load(root), np.random.default_rng(0)
        photos = np.arange(4 * 64)  # of four shards
        for share in (1, 2, 4, 8, 16, 32, 64):
            for how in ("apart", "in one run"):
                drawn = np.sort(np.concatenate([rng.permutation(64)[:share] + 64 * s for s in range(4)]))
                wanted = drawn if how == "apart" else photos[photos % 64 < share]
                for way in ("ranges", "whole", "rule"):
                    near = remote.NEAR
                    remote.NEAR = 4096 if way == "ranges" else near
                    cache = work / "cache"
                    cost(between)
                    reader = ShardReader(index, str(cache), None if way == "whole" else wanted)
                    began = time.perf_counter()
                    for ordinal in wanted.tolist():
                        reader.image_and_labels(ordinal)
                    seconds = time.perf_counter() - began
                    disk = sum(path.stat().st_blocks * 512 for path in cache.rglob("*.tar")) / 1e6
                    rows.append((share, how, way, *_counted(cost(between)), f"{disk:.2f}", f"{seconds:.2f}"))
                    remote.NEAR = near
                    shutil.rmtree(cache)
    mean = statistics.mean(shard.bytes for shard in index.shards) / 1e6
    print(f"\n{machine()}; {args.place}, {_settings(args)}; four shards of 64 photos and {mean:.2f} MB\n")
    print(table(("of 64", "where", "fetched as", "requests", "MB", "MB on disk", "seconds"), rows))


def ahead(args: argparse.Namespace, work: Path) -> None:
    """Streams and walks from an empty cache with no, one and a block's shards ahead."""
    assert cli.main([*SET, str(work / "set"), "--samples-per-shard", "8"]) == 0  # four blocks of the plan's, and a half
    rows = []
    with places(work / "set", args.delay, args.rate, [args.place]) as found:
        root, between = found[args.place]
        index = Index.load(root)
        for remote.AHEAD in (0, 1, BLOCK) * args.rounds:
            first, seconds = _epoch(index, work / "cache", STEP)
            shutil.rmtree(work / "cache")
            rows.append(("an epoch of training", remote.AHEAD, f"{first:.2f}", f"{seconds:.1f}"))
        for remote.AHEAD in (0, 1) * args.rounds:
            reader = ShardReader(index, str(work / "cache"))
            reader.ahead(range(len(index.shards)))
            began, first = time.perf_counter(), 0.0
            for shard in range(len(index.shards)):
                reader.image(int(index.first[shard]))
                first = first or time.perf_counter() - began
                time.sleep(STEP)
            rows.append(("a walk over the shards", remote.AHEAD, f"{first:.2f}", f"{time.perf_counter() - began:.1f}"))
            shutil.rmtree(work / "cache")
        cost(between)
    print(f"\n{machine()}; {args.place}, {_settings(args)}; {len(index.shards)} shards, {STEP} s a step and a shard\n")
    print(table(("what", "shards ahead at most", "first, s", "seconds"), rows))


class _Failing:
    """The store's faults from the fourth shard that is fetched on, for some seconds, 0 = for ever."""

    def __init__(self, fault: str, lasts: float) -> None:
        self.fault, self.lasts, self.since = fault, lasts, 0.0
        self.seen: set[str] = set()

    def __call__(self, method: str, path: str) -> str:
        path = path.partition("?")[0]
        if method != "GET" or not path.endswith(".tar"):
            return ""
        if len(self.seen | {path}) < 4:
            self.seen.add(path)
            return ""
        self.since = self.since or time.monotonic()
        return "" if self.lasts and time.monotonic() - self.since > self.lasts else self.fault


def faults(args: argparse.Namespace, work: Path) -> None:
    """Two ranks train while the store begins to fail at its fourth shard; 503 and drop also for ten seconds only."""
    assert cli.main([*SET, str(work / "set")]) == 0
    rows = []
    with places(work / "set", args.delay, args.rate, [args.place]) as found:
        for name, (root, between) in found.items():
            assert between is not None
            for fault, lasts in (("503", 10), ("drop", 10), ("503", 0), ("drop", 0), ("stall", 0), ("damage", 0)):
                between.fault = _Failing(fault, lasts)
                run_dir = work / f"run-{name}-{fault}-{lasts}"
                began = time.monotonic()
                code = start(root, run_dir, work / f"cache-{run_dir.name}", "--stages", "classify").wait()
                seconds = time.monotonic() - began
                between.fault = lambda method, path: ""
                said = [part for part in run_dir.with_suffix(".log").read_text().splitlines() if "error: " in part]
                words = next((part[part.index("error: ") + 7 :] for part in said if ".tar" in part), "")
                words = words.replace(root, "URL").replace("|", "/")[:240]
                long = f"{lasts} s" if lasts else "for ever"
                rows.append((name, fault, long, code, f"{seconds:.0f}", words))
                print(*rows[-1], flush=True)
    print(f"\n{machine()}\n")
    print(table(("place", "fault", "lasts", "exit code", "seconds", "what it said"), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("line", "epochs", "ranges", "ahead", "faults"))
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--place", choices=("http", "s3"), default="s3", help="of ranges, ahead and faults")
    parser.add_argument("--rounds", type=int, default=3, help="of ahead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        globals()[args.what](args, Path(work))


if __name__ == "__main__":
    main()
