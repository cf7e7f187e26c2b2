"""What tracking costs a training step: python -m benchmarks.tracking

A step of a small convolutional network is timed in turn with and without tracking into sqlite. Beside that difference,
which a busy machine blurs, stand the two costs that can be counted: the time inside the tracker's calls, and the CPU
seconds of the follower process once it has started.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import torch
from torch import nn

from benchmarks.common import machine
from esol.config import Config, DataConfig
from esol.tracking.tracker import Tracker

METRICS = ("loss", "lr", "grad_norm", "images_per_second", "step_seconds", "data_wait_seconds", "peak_memory_mib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="of 20 steps, half of them tracked")
    parser.add_argument("--every", type=int, default=10, help="steps between records (10 is tracking.every's default)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    step = _step()
    for _ in range(10):
        step()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    calls = []
    with tempfile.TemporaryDirectory() as folder:
        config = Config(run_dir=f"{folder}/run", data=DataConfig(root="none"))
        with Tracker(config, True, "hash", 1) as tracker, tracker.stage("classify"):
            assert tracker._process is not None
            follower = psutil.Process(tracker._process.pid)
            tracker.metrics(0, dict.fromkeys(METRICS, 1.0))
            _wait_for_start(Path(folder))
            start_cpu = _cpu(follower)
            begun, number = time.perf_counter(), 0
            for turn in range(args.rounds):
                tracked = bool(turn % 2)
                for _ in range(20):
                    began = time.perf_counter()
                    loss = step()
                    number += tracked
                    if tracked and number % args.every == 0:
                        called = time.perf_counter()
                        tracker.metrics(number, dict.fromkeys(METRICS, loss))
                        calls.append(time.perf_counter() - called)
                    seconds[tracked].append(time.perf_counter() - began)
            wall, cpu = time.perf_counter() - begun, _cpu(follower) - start_cpu
    plain, with_tracking = statistics.median(seconds[False]), statistics.median(seconds[True])
    call, follow = sum(calls) / number, cpu / number
    head = (
        f"{number} tracked steps, {len(METRICS)} values every {args.every}, {args.threads} threads, {wall:.0f} s in all"
    )
    print(machine())
    print(head + "\n")
    print("| what | per step | share of a step |\n|---|---|---|")
    print(f"| step without tracking, median | {plain * 1e3:.2f} ms | |")
    print(f"| step with tracking, median | {with_tracking * 1e3:.2f} ms | {with_tracking / plain - 1:+.2%} |")
    print(f"| inside the tracker's call, mean | {call * 1e6:.0f} us | {call / plain:.3%} |")
    print(f"| follower process, CPU time, another core or shared | {follow * 1e6:.0f} us | {follow / plain:.3%} |")
    print(f"\nonce per run: {start_cpu:.1f} s CPU of the follower for import and a new sqlite store")


def _step():  # type: ignore[no-untyped-def]
    """A closure that runs one step of a batch of 16 at 128x128 and returns its loss."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 6))
    optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9)
    images, labels = torch.rand(16, 3, 128, 128), torch.randint(0, 2, (16, 6)).float()

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.multilabel_soft_margin_loss(network(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _wait_for_start(runs: Path) -> None:
    """Until the follower has sent the first records."""
    while not (runs / "run" / "mlflow.json").exists() or '"classify"' not in (runs / "run" / "mlflow.json").read_text():
        time.sleep(0.1)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    main()
