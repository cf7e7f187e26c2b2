"""`esol doctor`: what a job would find on its machines, measured by its own processes, and what to change."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esol.base.errors import DataError
from esol.base.machine import cores
from esol.config import Config
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.transforms import decode
from esol.engines.base import Engine, gather_text
from esol.engines.ranks import precision_of
from esol.pipeline.needs import missing

PACKAGES = ("esol", "torch", "torchvision", "accelerate", "deepspeed", "numpy", "webdataset", "mlflow", "timm")
SIZES = (1 << 10, 1 << 20, 64 << 20)  # bytes of the all-reduces
PHOTOS = 200  # that are read and decoded
SKEW = 1.0  # seconds between two ranks' clocks that are worth a word


@dataclass
class Findings:
    """Lines of the report, and what to change; the main rank's count."""

    lines: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def add(self, name: str, value: str) -> None:
        self.lines.append(f"{name:<14}{value}")


def examine(config: Config, engine: Engine) -> int:
    """Prints the report on the main rank; every rank must call it. Returns 1 where something should be changed."""
    found = Findings()
    each = [json.loads(text) for text in gather_text(engine, json.dumps(_about(engine)))]
    _programs(found, each)
    _devices(found, each, config)
    _network(found, each)
    _clocks(found, engine, each)
    _folder(found, engine, Path(config.run_dir), each)
    _limits(found, each, config)
    _all_reduce(found, engine)
    _shards(found, engine, config, each)
    _needs(found, engine, config, each)
    if engine.is_main:
        print("\n".join(found.lines))
        print("\n".join(["", "to change:", *(f"- {text}" for text in found.advice)]) if found.advice else "\nall well")
    return int(bool(found.advice))


def _about(engine: Engine) -> dict[str, Any]:
    """What one rank knows of its machine."""
    gpu = engine.device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(engine.device) if gpu else "CPU",
        "memory": torch.cuda.get_device_properties(engine.device).total_memory if gpu else 0,
        "bf16": precision_of("bf16", engine.device) is not None,
        "gpus": torch.cuda.device_count(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else "",
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "shm": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else -1,
        "interfaces": _interfaces(),
        "chosen": {name: os.environ.get(name, "") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")},
        "main": f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _interfaces() -> list[str]:
    """Names of the network interfaces but loopback."""
    return [name for _, name in socket.if_nameindex() if name != "lo"]


def _hosts(each: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Host -> its ranks."""
    hosts: dict[str, list[int]] = {}
    for rank, about in enumerate(each):
        hosts.setdefault(about["host"], []).append(rank)
    return hosts


def _programs(found: Findings, each: list[dict[str, Any]]) -> None:
    hosts = _hosts(each)
    found.add(
        "processes", f"{len(each)} on {len(hosts)} machine(s): {', '.join(f'{h} {len(r)}' for h, r in hosts.items())}"
    )
    versions = each[0]["versions"]
    found.add("versions", ", ".join(f"{name} {number}" for name, number in versions.items()))
    for rank, about in enumerate(each):
        other = [f"{name} {number}" for name, number in about["versions"].items() if number != versions[name]]
        if other:
            found.advice.append(f"rank {rank} ({about['host']}) has {', '.join(other)}: install what rank 0 has")


def _devices(found: Findings, each: list[dict[str, Any]], config: Config) -> None:
    names = sorted({about["device"] for about in each})
    found.add("devices", ", ".join(names))
    if each[0]["nccl"]:
        found.add("nccl", each[0]["nccl"])
    if len(names) > 1:
        found.advice.append(f"the ranks have different devices ({', '.join(names)}): the slowest sets the pace")
    for host, ranks in _hosts(each).items():
        idle = each[ranks[0]]["gpus"] - len(ranks)
        if each[ranks[0]]["device"] != "CPU" and idle > 0:
            found.advice.append(f"{host}: {idle} GPU(s) have no process: start {len(ranks) + idle} there")
        if each[ranks[0]]["device"] == "CPU" and each[ranks[0]]["gpus"]:
            found.advice.append(f"{host} has GPUs, but the processes are on the CPU: unset ACCELERATE_USE_CPU")
    if config.engine.precision == "bf16" and not all(about["bf16"] for about in each):
        fast = "auto, or fp16" if each[0]["device"] != "CPU" else "auto"
        found.advice.append(f"engine.precision = bf16, for which a machine here has no hardware: take {fast}")


def _network(found: Findings, each: list[dict[str, Any]]) -> None:
    about, hosts = each[0], _hosts(each)
    found.add("interfaces", ", ".join(about["interfaces"]) or "loopback only")
    if len(each) > 1:
        found.add("meeting at", about["main"])
    if len(hosts) > 1:
        variable = "NCCL_SOCKET_IFNAME" if about["nccl"] else "GLOO_SOCKET_IFNAME"
        for rank, own in enumerate(each):
            if len(own["interfaces"]) > 1 and not own["chosen"][variable]:
                found.advice.append(
                    f"rank {rank} ({own['host']}) has the interfaces {', '.join(own['interfaces'])}: say with "
                    f"{variable} which one reaches the other machines"
                )


def _clocks(found: Findings, engine: Engine, each: list[dict[str, Any]]) -> None:
    """Five barriers, the clock right behind each: the smallest spread is nearest to the skew."""
    spreads = []
    for _ in range(5):
        engine.barrier("the clocks of all ranks")
        times = torch.stack(engine.gather(torch.tensor([time.time()], dtype=torch.float64))).flatten()
        spreads.append((float(times.max() - times.min()), int(times.argmax()), int(times.argmin())))
    skew, late, early = min(spreads)
    if len(each) > 1:
        found.add("clocks", f"{skew * 1000:.1f} ms apart at most")
    if skew > SKEW:
        found.advice.append(
            f"the clocks of ranks {late} ({each[late]['host']}) and {early} ({each[early]['host']}) are {skew:.1f} s "
            "apart: start NTP there, or file times and logs will mislead"
        )


def _folder(found: Findings, engine: Engine, run_dir: Path, each: list[dict[str, Any]]) -> None:
    """Whether every rank sees in run_dir what the main rank writes there, and can write itself."""
    token, place = f"{os.getpid()} {time.time()}", run_dir / ".doctor"
    error = ""
    try:
        if engine.is_main:
            place.mkdir(parents=True, exist_ok=True)
            (place / "main").write_text(token)
    except OSError as problem:
        error = f"cannot write: {problem}"
    token = gather_text(engine, token)[0]
    try:
        if not error and (place / "main").read_text() != token:
            error = "sees another file there"
        if not error:
            (place / f"rank-{engine.rank}").write_text(token)
    except OSError as problem:
        error = error or str(problem)
    errors = gather_text(engine, error)
    if engine.is_main:
        seen = len(list(place.glob("rank-*"))) if place.exists() else 0
        free = shutil.disk_usage(place if place.exists() else Path(".")).free / 2**30
        shutil.rmtree(place, ignore_errors=True)
        found.add("run_dir", f"{run_dir}: {seen} of {len(each)} ranks write there, {free:.0f} GiB free")
        for rank, text in enumerate(errors):
            if text:
                found.advice.append(
                    f"rank {rank} ({each[rank]['host']}) does not share run_dir {run_dir} ({text}): put it on a file "
                    "system that all machines mount at the same place"
                )


def _limits(found: Findings, each: list[dict[str, Any]], config: Config) -> None:
    for host, ranks in _hosts(each).items():
        about = each[ranks[0]]
        threads = sum(each[rank]["threads"] for rank in ranks)
        found.add(
            host, f"{about['cores']} cores, {threads} threads of {len(ranks)} process(es), {about['files']} open files"
        )
        if threads > about["cores"]:
            found.advice.append(f"{host}: {threads} threads on {about['cores']} cores: leave engine.threads at 0")
        if 0 <= about["shm"] < config.data.workers * len(ranks) * 64 * 2**20:
            found.advice.append(
                f"{host}: /dev/shm has {about['shm'] / 2**20:.0f} MiB, data workers want about 64 each: "
                "start the container with --shm-size=1g or more"
            )
        if about["files"] < 1024:
            found.advice.append(f"{host}: at most {about['files']} open files: ulimit -n 4096")


def _all_reduce(found: Findings, engine: Engine) -> None:
    if engine.world_size == 1:
        return
    for size in SIZES:
        values = torch.ones(size // 4, device=engine.device)
        seconds = []
        for _ in range(6):
            engine.barrier("an all-reduce of the doctor's")
            began = time.perf_counter()
            float(engine.reduce(values, "sum")[0])  # fetched, so that a GPU has finished
            seconds.append(time.perf_counter() - began)
        took = statistics.median(seconds[1:])
        wire = 2 * (engine.world_size - 1) / engine.world_size * size
        text = f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"
        found.add("all-reduce", f"{text} in {took * 1000:.2f} ms, {wire / took / 1e9:.3g} GB/s a rank")


def _shards(found: Findings, engine: Engine, config: Config, each: list[dict[str, Any]]) -> None:
    """Every rank reads and decodes photos spread over the set, others than its neighbours'."""
    error, read, decoded = "", 0.0, 0.0
    try:
        index = Index.load(config.data.root, config.data.cache)
        index.check_files()
        step = max(1, len(index) // (PHOTOS * engine.world_size))
        picks = list(range(engine.rank * step % len(index), len(index), step * engine.world_size))[:PHOTOS]
        reader = ShardReader(index, config.data.cache, np.array(picks))
        began = time.perf_counter()
        data = [reader.image(ordinal) for ordinal in picks]
        read = sum(map(len, data)) / (time.perf_counter() - began) / 1e6
        began = time.perf_counter()
        for ordinal, photo in zip(picks, data, strict=True):
            decode(photo, reader.name(ordinal))
        decoded = len(picks) / (time.perf_counter() - began)
    except (DataError, OSError) as problem:
        error = str(problem)
    errors = gather_text(engine, error)
    speeds = torch.stack(engine.gather(torch.tensor([read, decoded], dtype=torch.float64)))
    for rank, text in enumerate(errors):
        if text:
            found.advice.append(f"rank {rank} ({each[rank]['host']}) cannot read the shards: {text}")
    if not any(errors):
        slowest = speeds.min(0).values.tolist()
        found.add(
            "shards",
            f"{config.data.root}: {slowest[0]:.0f} MB/s and {slowest[1]:.0f} photos/s decoded, the slowest rank",
        )


def _needs(found: Findings, engine: Engine, config: Config, each: list[dict[str, Any]]) -> None:
    """What a run of all stages would look for before its first step; shards that nobody can read are named above."""
    lacking: list[str] = []
    if engine.is_main:
        with suppress(DataError):
            index = Index.load(config.data.root, config.data.cache)
            lacking = [str(one) for one in missing(config, index, config.stages, len(each))]
    found.advice += json.loads(gather_text(engine, json.dumps(lacking))[0])


def run(config: Config) -> int:
    """Starts the engine of the config and examines; EsolError where there is no job to examine."""
    from esol.engines import make_engine

    engine = make_engine(config.engine, config.seed)
    try:
        return examine(config, engine)
    finally:
        engine.close()
