"""The processes of benchmarks.scaling: how they start, on one machine or at the two ends of a link, and what they run.

A rank is `python -m benchmarks.scaling_ranks FUNCTION ARGUMENTS RESULT`, with torchrun's environment variables.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.common import CLASSES, interleaved
from esol.base.files import sha256
from esol.base.progress import progress
from esol.config import Config, DeepSpeedConfig, EngineConfig, TrainConfig
from esol.data.samples import Batch
from esol.engines import make_engine
from esol.engines.base import Engine
from esol.models.affinity_net import AffinityNet
from esol.models.backbones import build_backbone
from esol.models.deeplab import DeepLab
from esol.models.irn_net import IrnNet
from esol.pipeline.cam import new_net
from esol.pipeline.config_file import load
from esol.stages.classify import ClassifyTask
from esol.stages.expand import ExpandTask, expansion
from esol.stages.irn import IrnTask
from esol.stages.psa import PsaTask
from esol.stages.segment import SegmentTask
from esol.stages.shrink import ShrinkTask
from esol.tracking.tracker import Tracker
from esol.training.checkpoint import Checkpointer
from esol.training.loop import StopSignal, train
from esol.training.optim import build_optimizer
from esol.training.task import Task

ROOT = Path(__file__).parents[1]
STAGES = ("classify", "expand", "shrink", "psa", "irn", "segment")
WARMUP = 3  # DDP orders its buckets anew after the first step, ZeRO 3 traces it


def settings(*overrides: str) -> Config:
    """VOC 2012's configuration with random weights."""
    return load(ROOT / "configs/voc12.yaml", ["model.weights=none", "segment.model.weights=none", *overrides])


def build_task(name: str, config: Config) -> Task:
    """A stage's task as the pipeline builds it, but with nothing handed over by an earlier one: weights are random."""
    model = config.model
    if name == "psa":
        backbone = build_backbone(replace(model, output_stride=8), pretrained=False)
        return PsaTask(AffinityNet(backbone), config.psa)
    if name == "irn":
        return IrnTask(IrnNet(build_backbone(replace(model, freeze="all"), pretrained=False)), config.irn)
    if name == "segment":
        backbone = build_backbone(config.segment.model, pretrained=False)
        return SegmentTask(DeepLab(backbone, CLASSES + 1, config.segment.rates), config.segment)
    net = new_net(config, CLASSES, pretrained=False)
    if name == "classify":
        return ClassifyTask(net, config.classify)
    if name == "expand":
        return ExpandTask(net, config.expand)
    return ShrinkTask(net, expansion(net, config.expand), config.shrink)


def crop_of(name: str, config: Config) -> int:
    """The side of the stage's training crops."""
    return getattr(getattr(config, name), "crop", config.data.crop)


def random_batch(images: int, side: int) -> Batch:
    """Noise with labels and a label map."""
    generator = torch.Generator().manual_seed(0)
    return Batch(
        image=torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=generator),
        labels=torch.randint(0, 2, (images, CLASSES), generator=generator).float(),
        target=torch.randint(0, CLASSES + 1, (images, side, side), dtype=torch.uint8, generator=generator),
        key=[str(i) for i in range(images)],
    )


@dataclass(frozen=True)
class Link:
    """The two ends of a virtual cable: the namespaces and their interfaces, which have the same names."""

    ends: tuple[str, str]


@contextmanager
def virtual_link(mbit: int = 0) -> Iterator[Link]:
    """Two network namespaces joined by a veth pair with the packets of an Ethernet; needs root.

    mbit: rate of each direction in Mbit/s, 0 = as fast as the machine can. Packets leave at the MTU's 1,500 bytes and
    not in 64 KiB pieces, so that the interface's counter sees the headers that a real cable carries.
    """
    ends = (f"esol{os.getpid()}a", f"esol{os.getpid()}b")  # an interface's name has at most 15 characters
    with ExitStack() as stack:
        for end in ends:
            _ip("netns", "add", end)
            stack.callback(_ip, "netns", "del", end)  # its end of the cable goes with it
        _ip("link", "add", ends[0], "netns", ends[0], "type", "veth", "peer", "name", ends[1], "netns", ends[1])
        for number, end in enumerate(ends, 1):
            _ip("-n", end, "address", "add", f"10.77.0.{number}/24", "dev", end)
            _ip("-n", end, "link", "set", "lo", "up")
            _ip("-n", end, "link", "set", end, "up", *(() if mbit else ("gso_max_segs", "1")))
            if mbit:
                shape = ("root", "tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "50ms")
                subprocess.run(("ip", "netns", "exec", end, "tc", "qdisc", "add", "dev", end, *shape), check=True)
        yield Link(ends)


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True)


def run_ranks(
    count: int, function: str, link: Link | None = None, alone: bool = False, **arguments: Any
) -> list[dict[str, Any]]:
    """Calls a function of this module in `count` processes and returns what each returned.

    link: the two ranks stand at its ends, else all on the loopback interface. alone: each is a job of its own, at the
    same time as the others. RuntimeError with the output of a rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        ranks = []
        for rank in range(count):
            interface = link.ends[rank] if link else "lo"
            env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": interface}
            if not alone:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
                env |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_PORT": str(port)}
                env["MASTER_ADDR"] = "10.77.0.1" if link else "127.0.0.1"
            place = ("ip", "netns", "exec", link.ends[rank]) if link else ()
            result, output = Path(folder, f"{rank}.json"), Path(folder, f"{rank}.txt")
            command = (sys.executable, "-m", "benchmarks.scaling_ranks", function, json.dumps(arguments), str(result))
            with open(output, "wb") as file:
                process = subprocess.Popen((*place, *command), cwd=ROOT, env=env, stdout=file, stderr=file)
            ranks.append((process, result, output))
        try:
            for process, _, _ in ranks:
                process.wait(600)
        finally:
            for process, _, _ in ranks:
                process.kill()
        for rank, (process, _, output) in enumerate(ranks):
            if process.returncode:
                raise RuntimeError(f"rank {rank} of {function} failed:\n{output.read_text(errors='replace')[-3000:]}")
        return [json.loads(result.read_text()) for _, result, _ in ranks]


def _engine(name: str = "accelerate", zero: int = 0) -> Engine:
    options = EngineConfig(name=name, deepspeed=DeepSpeedConfig(zero=zero), threads=1, timeout=5)  # type: ignore[arg-type]
    return make_engine(options, seed=0)


def _prepare(engine: Engine, stage: str, config: Config) -> TrainConfig:
    """The stage's task in the engine. Steps are taken at rate 0, because random networks run away at the recipe's."""
    task, section = build_task(stage, config), getattr(config, stage)
    engine.prepare(task, build_optimizer(task, section), section.clip_norm)
    return section


def _steps(engine: Engine, batch: Batch, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        engine.train_step([batch], 0.0)
        seconds.append(time.perf_counter() - began)
    return seconds


def wire(engine: str, zero: int, stages: list[str], steps: int) -> dict[str, float]:
    """Bytes that this end's interface sent per optimizer step; they do not depend on the crops, which are small."""
    job, config = _engine(engine, zero), settings()
    counter = Path("/sys/class/net", os.environ["GLOO_SOCKET_IFNAME"], "statistics/tx_bytes")
    found = {}
    for stage in stages:
        _prepare(job, stage, config)
        batch = random_batch(1, 65)
        _steps(job, batch, WARMUP)
        job.barrier("the first reading")
        before = int(counter.read_text())
        _steps(job, batch, steps)
        job.barrier("the second reading")
        found[stage] = (int(counter.read_text()) - before) / steps
    job.close()
    return found


def step_times(stages: list[str], images: int, side: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each stage's steps after the warm-up."""
    job, config = _engine(), settings()
    batch, found = random_batch(images, side), {}
    for stage in stages:
        _prepare(job, stage, config)
        _steps(job, batch, WARMUP)
        found[stage] = _steps(job, batch, steps)
    job.close()
    return found


def bandwidth(mebibytes: int, repeats: int) -> dict[str, float]:
    """Bytes/s that a rank sends in an all-reduce of a bucket of DDP's size, with nothing computed meanwhile."""
    job = _engine()
    values = torch.ones(mebibytes * 2**18)
    dist.all_reduce(values)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        dist.all_reduce(values)
        seconds.append(time.perf_counter() - began)
    sent = 2 * (job.world_size - 1) / job.world_size * values.nbytes
    job.close()
    return {"bytes_per_second": sent / statistics.median(seconds)}


def saves(stage: str, images: int, side: int, steps: int, repeats: int, folder: str) -> dict[str, Any]:
    """Seconds of steps and of saves on this rank, to the end of writing, and of hashing; bytes of a checkpoint."""
    job = _engine()
    _prepare(job, stage, settings())
    batch = random_batch(images, side)
    _steps(job, batch, 1)
    step = _steps(job, batch, steps)
    checkpoints = Checkpointer(Path(folder), job, fingerprint="", config={})
    seconds, hashing, total = [], [], 0
    for number in range(repeats):
        job.barrier("the save")
        began = time.perf_counter()
        checkpoints.save(number)
        checkpoints.finish()
        path = checkpoints.folder / f"step-{number}"
        seconds.append(time.perf_counter() - began)
        if job.is_main:
            began = time.perf_counter()
            for file in path.iterdir():
                sha256(file)
            hashing.append(time.perf_counter() - began)
            total = sum(file.stat().st_size for file in path.iterdir())
    job.close()
    return {"step": step, "seconds": seconds, "hashing": hashing, "bytes": total}


class _NoSaver:
    """Saves cost what `checkpoint` measures."""

    every, writing = 1_000_000, False

    def save(self, step: int) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


def overhead(
    overrides: list[str], images: int, side: int, block: int, rounds: int, folder: str
) -> dict[str, dict[str, list[float]]]:
    """Blocks of steps, in turn: without the agreement, with it, in the whole loop; seconds per step, and this thread's.

    The agreement is the all-reduce of "a loss is not finite" and "stop". The loop adds batches, learning rate, beats
    under a watchdog, meter, values every tracking.every steps, metrics.jsonl and progress, as the pipeline has them.
    """
    config = settings(f"run_dir={folder}", "tracking.uri=none", *overrides)
    job = _engine()
    section = replace(_prepare(job, "classify", config), lr=0.0)
    batch = random_batch(images, side)
    _steps(job, batch, WARMUP)

    with ExitStack() as stack:
        tracker = stack.enter_context(Tracker(config, job.is_main, "", job.world_size))
        stop = stack.enter_context(StopSignal())
        stack.enter_context(tracker.stage("classify"))
        advance = stack.enter_context(progress("classify", block, "steps", job.is_main))

        def log(step: int, metrics: dict[str, float]) -> None:
            tracker.metrics(step, metrics)
            advance(step, f"loss {metrics['loss']:.4f}  {metrics['images_per_second']:.0f} images/s")

        thread: dict[str, list[float]] = {"without": [], "bare": [], "whole": []}

        def bare(name: str = "bare") -> float:
            job.barrier("the block")
            began = time.thread_time()
            seconds = sum(_steps(job, batch, block)) / block
            thread[name].append((time.thread_time() - began) / block)
            return seconds

        def disagreeing() -> float:
            with mock.patch.object(dist, "all_reduce"):  # DDP's own all-reduce is not this one
                return bare("without")

        def whole() -> float:
            with job.watched(Path(folder, "stalled")):
                job.barrier("the block")
                began, began_thread = time.perf_counter(), time.thread_time()
                train(
                    job,
                    itertools.repeat([batch]),
                    block,
                    section,
                    start_step=0,
                    checkpointer=_NoSaver(),
                    stop=stop,
                    log=log,
                    log_every=config.tracking.every,
                )
                thread["whole"].append((time.thread_time() - began_thread) / block)
                return (time.perf_counter() - began) / block

        found = interleaved({"without": disagreeing, "bare": bare, "whole": whole}, rounds)
    job.close()
    return {"wall": found, "thread": thread}


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[3]).write_text(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
