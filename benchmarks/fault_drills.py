"""Faults at random moments of a small job on two machines: does it end in time, and go on without a loss?

    python -m benchmarks.fault_drills --data data/demo [--engine deepspeed] [--kinds oom,cut] [--count 3]
                                                                  (Linux, root: network namespaces are the machines)

A torchrun on each of two machines, one rank each with a data worker, trains classify of the demo. A drill starts the
job, lets the fault happen at its moment (of most kinds one of four drills while the ranks start, the others after a
step that is drawn), waits for the job's end (with the fault still there), mends it, starts again with --resume where
the job has not finished, and compares the weights with the unbroken run's. `end` is the time from the fault to the last
process's end; more than the bound of its kind would be a hang.

Each drill that is done is a line of ROWS/<engine>.jsonl, and is not run again, nor is an unbroken run; the table is
made of the lines. --count 0 only prints it. A drill's moment and victim follow from seed, engine, kind and its number.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import machine, table
from benchmarks.fault_job import BOUND, EVERY, SETTINGS, STALL, TIMEOUT, WEIGHTS, Job, World, awaited
from benchmarks.fault_kinds import KINDS, Whole, Wrong, nothing
from esol.base.files import sha256

HEADINGS = (
    "fault", "drills", "finished by itself", "end after the fault, s, at most", "bound, s, at least",
    "steps done again, at most", "weights bit-identical", "failed",
)  # fmt: skip


@dataclass(frozen=True)
class Drill:
    """What came of one drill.

    ended: seconds from the fault to the last process's end, None where it had to be killed; alone: finished without a
    second start; codes: of the ranks; said: the line that says why; saved, resumed: the steps of the newest checkpoint,
    and where the second start went on; again: the steps that it did a second time; equal: the weights, bit by bit;
    amiss: what else was not as it ought to be.
    """

    kind: str
    engine: str
    setting: str
    seed: int
    number: int
    moment: float
    bound: float
    ended: float | None
    alone: bool
    codes: list[str]
    said: str
    saved: int
    resumed: int | None
    again: int
    equal: bool
    amiss: str
    machine: str

    def failed(self) -> str:
        """What was not right about it, "" where nothing was."""
        kind, wrong = KINDS[self.kind], [self.amiss] if self.amiss else []
        if self.ended is None or self.ended > self.bound:
            wrong.append("longer than its bound")
        if not self.equal:
            wrong.append("other weights")
        if kind.goes_on and not self.alone:
            wrong.append("did not finish by itself")
        if not self.alone and kind.says and not self.said:
            wrong.append("did not say why it ended")
        passed_over = EVERY if self.kind == "half" else 0
        if not self.alone and (self.resumed is None or self.resumed < self.saved - passed_over):
            wrong.append("did not go on at its last checkpoint")
        return ", ".join(wrong)


def read(rows: Path, engine: str) -> list[Drill]:
    """The drills of an engine that are done."""
    path = rows / f"{engine}.jsonl"
    return [Drill(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def add(rows: Path, drill: Drill) -> None:
    rows.mkdir(parents=True, exist_ok=True)
    with open(rows / f"{drill.engine}.jsonl", "a") as file:
        file.write(json.dumps(asdict(drill)) + "\n")


def missing(done: list[Drill], engine: str, kinds: list[str], count: int, seed: int) -> Iterator[tuple[int, str, str]]:
    """(number, kind, setting) of what is still to be run: every kind once, then every kind a second time.

    Settings take turns, so that three drills of a kind have three, and each kind begins with another.
    """
    settings = list(SETTINGS[engine])
    there = {(drill.kind, drill.number) for drill in done if drill.seed == seed}
    for number in range(count):
        for kind in kinds:
            if (kind, number) not in there:
                yield number, kind, settings[(list(KINDS).index(kind) + number) % len(settings)]


def summary(done: list[Drill]) -> str:
    """The table of some drills, and below it how many failed, each with what was wrong."""
    rows = []
    for name, kind in KINDS.items():
        if not (of_kind := [drill for drill in done if drill.kind == name]):
            continue
        ends = [float("inf") if drill.ended is None else drill.ended for drill in of_kind]
        rows.append(
            [
                kind.words, len(of_kind), sum(drill.alone for drill in of_kind), round(max(ends), 1),
                round(min(drill.bound for drill in of_kind)), max(drill.again for drill in of_kind),
                f"{sum(drill.equal for drill in of_kind)} of {len(of_kind)}",
                sum(bool(drill.failed()) for drill in of_kind),
            ]
        )  # fmt: skip
    wrong = [f"- {drill.kind} {drill.number} ({drill.setting}): {drill.failed()}" for drill in done if drill.failed()]
    within = sum(drill.ended is not None and drill.ended <= drill.bound for drill in done)
    equal = sum(drill.equal for drill in done)
    settings = ", ".join(f"{setting} {count}" for setting, count in Counter(drill.setting for drill in done).items())
    total = f"{len(done)} drills ({settings}): {within} within their bounds, {equal} with equal weights, "
    total += f"{len(wrong)} failed"
    return "\n".join((table(HEADINGS, rows), "", total, *wrong))


def run(number: int, kind: str, setting: str, world: World, args: argparse.Namespace, whole: Whole) -> Drill:
    """One drill, beside the unbroken run of its setting; it is added to what is done."""
    fault = KINDS[kind]
    rng = random.Random(f"{args.seed} {args.engine} {kind} {number}")
    bound = BOUND + fault.spare + fault.factor * whole.length
    disk = fault.disk(world)
    run_dir = (disk.place if disk else world.folder) / kind
    while True:
        world.clean()
        if disk is not None:
            disk.make()
        shutil.rmtree(run_dir, ignore_errors=True)
        with Job(world, run_dir, args.engine, SETTINGS[args.engine][setting]) as job:
            job.log.unlink(missing_ok=True)
            wait = fault.arrange(job, rng, whole)
            job.start()
            job.ranks()
            begun = time.monotonic()
            wait()
            if not job.running() or (job.done() and kind != "launcher-late"):
                continue
            moment = time.monotonic()
            mend, amiss = nothing, ""
            try:
                mend = fault.inject(job, rng)
            except Wrong as wrong:
                amiss = str(wrong)
            ended = None if job.wait(bound) == float("inf") else time.monotonic() - moment
            mend()
            break
    alone, saved, reached, codes = job.done(), job.newest(), job.logged(), job.codes()
    said, resumed, again = job.said(), None, 0
    if not alone:
        bound -= fault.factor * whole.length  # it had nothing to finish
        mark, job.group = job.log.stat().st_size, None
        job.start()
        job.wait(BOUND + fault.spare + whole.length)
        found = re.findall(r"resumed after step (\d+)", job.log.read_bytes()[mark:].decode(errors="replace"))
        resumed = int(found[0]) if found else 0
        again = max(0, reached - resumed)
    equal = job.done() and sha256(job.run_dir / WEIGHTS) == whole.weights
    drill = Drill(
        kind, args.engine, setting, args.seed, number, round(moment - begun, 2), round(bound, 1),
        None if ended is None else round(ended, 2), alone, codes, said, saved, resumed, again, equal, amiss, machine(),
    )  # fmt: skip
    kept = job.log.with_name(f"{args.engine}-{kind}-{number}.log")
    job.log.rename(kept)
    verdict = f"{wrong}, see {kept}" if (wrong := drill.failed()) else "right"
    text = f"fault after {drill.moment} s, end {drill.ended} s later, {again} steps again; {said}; {verdict}"
    print(f"{time.strftime('%H:%M:%S')} {kind} {number} ({setting}): {text}", file=sys.stderr, flush=True)
    if not drill.failed():
        kept.unlink()
    if disk is not None:
        disk.remove()
    shutil.rmtree(job.run_dir, ignore_errors=True)
    add(args.rows, drill)
    return drill


def unbroken(setting: str, world: World, args: argparse.Namespace) -> Whole:
    """The run that nothing befalls, which is run once for each setting."""
    path = args.rows / f"unbroken-{setting}.json"
    if path.exists():
        return Whole(**json.loads(path.read_text()))
    job = Job(world, world.folder / f"unbroken-{setting}", args.engine, SETTINGS[args.engine][setting])
    job.start()
    job.ranks()
    begun = time.monotonic()
    awaited(job.logged, 300, f"the unbroken run has not begun: {job.log}")
    first = time.monotonic() - begun
    job.wait(600)
    if not job.done():
        raise SystemExit(f"the unbroken run failed: {job.log}")
    whole = Whole(first, time.monotonic() - begun, sha256(job.run_dir / WEIGHTS))
    print(f"unbroken run of {setting}: {whole}", file=sys.stderr, flush=True)
    args.rows.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(whole)))
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="a synthetic shard set (a copy is worked on)")
    parser.add_argument("--engine", choices=SETTINGS, default="accelerate")
    parser.add_argument("--count", type=int, default=10, help="of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--rows", type=Path, default=Path("fault_rows"), help="folder of what is done (%(default)s)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that namespaces, mounts and jobs go
    kinds = args.kinds.split(",")
    todo = list(missing(read(args.rows, args.engine), args.engine, kinds, args.count, args.seed))
    if todo:
        folder = Path(tempfile.mkdtemp(prefix="fault-drills-"))
        shutil.copytree(args.data, folder / "data")
        with World(folder, folder / "data") as world:
            found = [run(*which, world, args, unbroken(which[-1], world, args)) for which in todo]
        if not any(drill.failed() for drill in found):
            shutil.rmtree(folder)
    done = [d for d in read(args.rows, args.engine) if d.kind in kinds and d.seed == args.seed]
    print("\n".join(dict.fromkeys(drill.machine for drill in done)))
    print(f"2 machines, 1 rank each; a checkpoint every {EVERY} steps; engine.timeout {TIMEOUT} s, ", end="")
    print(f"engine.stall {STALL} s; seed {args.seed}\n\n{summary(done)}")
    return 1 if any(drill.failed() for drill in done) else 0


if __name__ == "__main__":
    sys.exit(main())
