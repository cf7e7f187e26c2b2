"""What scale costs: bytes on the wire, steps on 1 and 2 processes, saves, and what guards and logs a step.

    python -m benchmarks.scaling bytes        # root: two network namespaces with a cable between them
    python -m benchmarks.scaling steps        # root for the part with slower links
    python -m benchmarks.scaling checkpoint   # writes to $TMPDIR
    python -m benchmarks.scaling overhead
    python -m benchmarks.scaling_model        # 8 to 1,024 GPUs

The networks of configs/voc12.yaml with 20 classes and random weights, on noise, float32, a thread per process; engines,
tasks, loop, checkpointer and tracker are the real ones. benchmarks/SCALING.md has the results and what they mean.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

from benchmarks.common import machine, ratio, table
from benchmarks.scaling_model import bounds, count, gradient_bytes
from benchmarks.scaling_ranks import STAGES, build_task, run_ranks, settings, virtual_link

SIDE, IMAGES = 224, 1  # crops of the step times, and images per process
TIMED, STEPS = ("classify", "expand"), 5
RATES = (1000, 250)  # Mbit/s of the links that the model is held against
EVERY = 500  # checkpoint.every's default
GPU_STEP = 0.1  # seconds, of the step that overheads are also held against


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"bytes": wire_bytes, "steps": steps, "checkpoint": checkpoint, "overhead": overhead}
    parser.add_argument("part", choices=parts)
    part = parser.parse_args().part
    print(f"{machine()}, accelerate {version('accelerate')}, deepspeed {version('deepspeed')}, seed 0")
    print(f"load average of the last 5 minutes at the start: {os.getloadavg()[1]:.1f}\n")
    parts[part]()


def wire_bytes() -> None:
    """Counted bytes of all stages, and what a rank sends per step over a cable."""
    config = settings()
    rows: list[list[Any]] = []
    payload = {}
    for stage in STAGES:
        task = build_task(stage, config)
        payload[stage] = gradient_bytes(task)
        state = sum(value.nbytes for value in task.state_dict().values())
        momentum = payload[stage] if getattr(config, stage).momentum else 0  # SGD keeps no buffer without it
        rows.append([stage, payload[stage] // 4, payload[stage], state + momentum])
    print(table(("stage", "learning parameters", "gradient bytes", "checkpoint bytes"), rows))
    if not _is_root("the bytes on the wire are not measured"):
        return
    partitioned = ("classify", "expand")  # of what ZeRO is measured on: gradients of the whole network, or of a part
    cases = (("accelerate", 0, STAGES), *(("deepspeed", zero, partitioned) for zero in (1, 2, 3)))
    sent: dict[str, list[str]] = {stage: [] for stage in STAGES}
    with virtual_link() as link:
        for engine, zero, stages in cases:
            _say(f"{engine}, zero {zero}")
            found = run_ranks(2, "wire", link, engine=engine, zero=zero, stages=stages, steps=5)
            for stage in STAGES:
                ranks = [rank[stage] for rank in found if stage in rank]
                sent[stage].append(_sent(ranks, payload[stage]) if ranks else "not run")
    print("\nSent per step by rank 0 and by rank 1, MB (their mean over the gradients' bytes); 5 steps after 3\n")
    rows = [[stage, payload[stage] / 1e6, *sent[stage]] for stage in STAGES]
    print(table(("stage", "gradients, MB", "accelerate", "ZeRO 1", "ZeRO 2", "ZeRO 3"), rows))


def _sent(ranks: list[float], payload: int) -> str:
    return f"{ranks[0] / 1e6:.2f}, {ranks[1] / 1e6:.2f} ({statistics.mean(ranks) / payload:.3f})"


def steps() -> None:
    """Steps of one and two processes; then predicted and measured steps of two over links of known speed."""
    config = settings()
    cases = {
        "1 process": (IMAGES, 1, False),
        f"1 process, {2 * IMAGES} images": (2 * IMAGES, 1, False),
        "2 apart": (IMAGES, 2, True),
        "2 processes": (IMAGES, 2, False),
    }
    links = (0, *RATES) if _is_root("slower links are not tried") else (0,)
    speeds = {mbit: _bandwidth(mbit) for mbit in links}
    seconds: dict[str, dict[str, list[float]]] = {stage: {} for stage in TIMED}
    for _ in range(2):  # in turn, because other work on the machine comes and goes
        for name, (images, processes, alone) in cases.items():
            _time(seconds, name, images, processes, alone, 0)
        for mbit in links[1:]:
            _time(seconds, f"cable, {mbit} Mbit/s", IMAGES, 2, False, mbit)
    rows, checks = [], []
    for stage, found in seconds.items():
        middle = {name: statistics.median(values) for name, values in found.items()}
        one, doubled, apart, two = (middle[name] for name in cases)
        quarters = statistics.quantiles(found["2 processes"], n=4)
        spread = f"{quarters[0]:.3g} to {quarters[2]:.3g}"
        rows.append([stage, one, doubled, apart, two, spread, one / two, apart / two, doubled / two])
        work = count(stage, config, SIDE)
        share = work.forward / (work.forward + work.backward)
        for mbit in links:
            name = f"cable, {mbit} Mbit/s" if mbit else "2 processes"
            exchange = work.gradients / speeds[mbit]
            low, high = bounds(apart, share, exchange)
            row = [stage, name if mbit else "loopback", speeds[mbit] / 1e6, exchange, low, high, middle[name]]
            checks.append([*row, middle[name] / low, middle[name] / high])
    print(f"Crop {SIDE}, images per process: {IMAGES}. Medians over all processes, 2 rounds of {STEPS} steps after 3.")
    print('"2 apart" are two jobs of one process at the same time: they share memory, nothing else.\n')
    head = ("stage", *(f"{name}, s" for name in cases), "its quartiles")
    print(table((*head, "weak efficiency", "of 2 apart", "strong speed-up"), rows))
    print("\nPredicted for 2 processes: the step of 2 apart, and bytes over the bandwidth of an all-reduce of 25 MiB\n")
    head = ("stage", "link", "bandwidth, MB/s", "exchange, s", "full overlap, s", "no overlap, s", "measured, s")
    print(table((*head, "measured / full", "measured / none"), checks))


def _time(
    seconds: dict[str, dict[str, list[float]]], name: str, images: int, processes: int, alone: bool, mbit: int
) -> None:
    """Adds the step times of all stages and ranks of one case."""
    _say(name)
    with virtual_link(mbit) if mbit else nullcontext() as link:
        ranks = run_ranks(processes, "step_times", link, alone, stages=TIMED, images=images, side=SIDE, steps=STEPS)
    for stage in TIMED:
        seconds[stage].setdefault(name, []).extend(second for rank in ranks for second in rank[stage])


def _bandwidth(mbit: int) -> float:
    with virtual_link(mbit) if mbit else nullcontext() as link:
        found = run_ranks(2, "bandwidth", link, mebibytes=25, repeats=7)
    return statistics.mean(rank["bytes_per_second"] for rank in found)


def checkpoint() -> None:
    """Seconds of saves, for all of which training stands still."""
    rows = []
    for stage, side, images, processes in (
        ("classify", SIDE, IMAGES, 1),
        ("classify", SIDE, IMAGES, 2),
        ("expand", SIDE, IMAGES, 1),
        ("segment", 321, 1, 1),
    ):
        _say(f"{stage}, {processes} processes")
        with tempfile.TemporaryDirectory() as folder:
            arguments = {"stage": stage, "side": side, "images": images, "steps": 2, "repeats": 5, "folder": folder}
            found = run_ranks(processes, "saves", **arguments)
        main_rank, last = found[0], found[-1]
        step, save = (statistics.median(main_rank[name]) for name in ("step", "seconds"))
        hashing, stall = statistics.median(main_rank["hashing"]), statistics.median(last["seconds"])
        spread = f"{min(main_rank['seconds']):.3g} to {max(main_rank['seconds']):.3g}"
        per_step = save / EVERY
        megabytes = main_rank["bytes"] / 1e6
        row = [stage, processes, megabytes, save, spread, hashing, megabytes / save, stall, 1e3 * per_step]
        rows.append([*row, step, f"{per_step / step:.2%}", f"{per_step / GPU_STEP:.2%}"])
    print(
        f"5 saves each, medians; share: of a save every {EVERY} steps in a step, this CPU's and one of {GPU_STEP} s\n"
    )
    head = ("stage", "processes", "MB", "save, s", "spread", "of it hashing, s", "MB/s", "last rank stands, s")
    print(table((*head, "per step, ms", "this CPU's step, s", "share", f"share of {GPU_STEP} s"), rows))


def overhead() -> None:
    """What the loop, its guards and its logs add to a step of two processes."""
    cases = (
        ("ResNet-50, crop 64", [], 1, 64, 10, 20),
        ("small network, crop 32", ["model.backbone=small", "model.output_stride=8"], 1, 32, 10, 150),
    )
    rows = []
    for name, overrides, images, side, block, rounds in cases:
        _say(name)
        with tempfile.TemporaryDirectory() as folder:
            arguments = {"images": images, "side": side, "block": block, "rounds": rounds, "folder": folder}
            found = run_ranks(2, "overhead", overrides=overrides, **arguments)[0]
        wall, thread = found["wall"], found["thread"]
        for what, case, base in (
            ("agreement on losses and stop", "bare", "without"),
            ("loop, beats, watchdog, meter, metrics.jsonl", "whole", "bare"),
            ("all", "whole", "without"),
        ):
            low, middle, high = (1e3 * q for q in statistics.quantiles(wall[base], n=4))
            row = [name, what, middle, f"{low:.3g} to {high:.3g}", f"{ratio(wall, case, base) - 1:+.2%}"]
            own, of_base = (statistics.median(thread[key]) for key in (case, base))
            added = statistics.median(a - b for a, b in zip(thread[case], thread[base], strict=True))
            rows.append([*row, 1e3 * of_base, 1e6 * added, f"{own / of_base - 1:+.2%}", f"{added / GPU_STEP:.3%}"])
    print("2 processes over loopback, blocks of 10 steps in turn, 20 rounds (small: 150), values every 10 steps\n")
    head = ("task", "added by", "step without, ms", "its quartiles", "median ratio - 1")
    thread_head = ("CPU of its thread, ms", "added, us", "ratio - 1", f"added, of {GPU_STEP} s")
    print(table((*head, *thread_head), rows))


def _is_root(otherwise: str) -> bool:
    if os.geteuid() == 0:
        return True
    print(f"\nNot root, who alone may make network namespaces: {otherwise}.\n")
    return False


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
