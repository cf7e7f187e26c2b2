"""Ten of each fault at random moments of a small job on two machines: does it end in time, and go on without a loss?

    python -m benchmarks.fault_drills --data data/demo            (Linux, root: network namespaces are the machines)

A torchrun on each of two machines, one rank each with a data worker, trains classify of the demo. A drill starts the
job, lets the fault happen at a moment drawn uniformly between the start of both ranks and the unbroken run's end, waits
for the job's end (with the fault still there), mends it, starts again with --resume where the job has not finished, and
compares the weights with the unbroken run's. `end` is the time from the fault to the last process's end; more than
BOUND would be a hang.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # accelerate brings it

from benchmarks.common import machine, table
from benchmarks.nodes import Nodes, kill_tree
from esol.base.files import sha256

ROOT = Path(__file__).parents[1]
EVERY = 5  # steps between checkpoints
TIMEOUT, STALL = 12, 15  # seconds: engine.timeout and engine.stall
BOUND = TIMEOUT + STALL + 35  # the watchdog's last words, and the 30 s that torchrun gives its processes
SMALL = (
    "data.score_split=val", "data.long_side=[64,96]", "data.crop=64", "data.workers=1", "model.kernel_channels=32",
    "classify.duration=100 steps", f"checkpoint.every={EVERY}", "engine.threads=1", "tracking.pictures=2",
    "tracking.every=1", f"engine.timeout={TIMEOUT / 60}", f"engine.stall={STALL / 60}",
)  # fmt: skip
WEIGHTS = "classify/model.safetensors"


@dataclass
class Job:
    """Two launchers in a run directory, and what they print."""

    nodes: Nodes
    data: Path
    run_dir: Path
    uri: str = "none"
    launchers: list[subprocess.Popen[Any]] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.run_dir.with_suffix(".log")

    def start(self) -> None:
        overrides = (*SMALL, f"data.root={self.data}", f"run_dir={self.run_dir}", f"tracking.uri={self.uri}")
        options = [part for text in overrides for part in ("--set", text)]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "OMP_"))}
        self.launchers = []
        for node in (0, 1):
            command = [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                "--node-rank", str(node), "--master-addr", "node0", "--master-port", "29510",
                str(ROOT / "esol/train.py"), "--config", str(ROOT / "configs/demo.yaml"),
                "--stages", "classify", "--resume", *options,
            ]  # fmt: skip
            with open(self.log, "ab") as log:
                self.launchers.append(self.nodes.start(node, command, env, stdout=log, stderr=log))

    def rank(self, node: int) -> psutil.Process | None:
        """The training process of a node, None while there is none."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.launchers[node].pid).children():
                if str(ROOT / "esol/train.py") in child.cmdline():
                    return child
        return None

    def data_worker(self, node: int) -> psutil.Process | None:
        """A data worker of a node: a fork, with its parent's command line."""
        with contextlib.suppress(psutil.NoSuchProcess):
            rank = self.rank(node)
            for child in rank.children() if rank else ():
                if child.cmdline() == rank.cmdline():
                    return child
        return None

    def running(self) -> bool:
        return any(launcher.poll() is None for launcher in self.launchers) or any(self.alive())

    def alive(self) -> list[psutil.Process]:
        """Training processes in this run directory, also those whose launcher is gone."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess):
                if f"run_dir={self.run_dir}" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def wait(self, bound: float) -> float:
        """Seconds until every process has ended; those that last longer are killed, and it is infinite."""
        begun = time.monotonic()
        while self.running():
            if time.monotonic() - begun > bound:
                for launcher in self.launchers:
                    kill_tree(launcher)
                for process in self.alive():
                    process.kill()
                return float("inf")
            time.sleep(0.1)
        return time.monotonic() - begun

    def done(self) -> bool:
        return (self.run_dir / "classify/manifest.json").exists()

    def newest(self) -> int:
        """Steps of the newest checkpoint that is whole, 0 without any."""
        latest = self.run_dir / "classify/checkpoints/latest"
        return int(latest.read_text().split("-")[1]) if latest.exists() else 0

    def logged(self) -> int:
        """The last step that anything was logged of."""
        path = self.run_dir / "metrics.jsonl"
        return max((int(s) for s in re.findall(r'"step": (\d+)', path.read_text())), default=0) if path.exists() else 0


Mend = Callable[[], None]


def nothing() -> None:
    """What needs no mending."""


def kill_worker(job: Job, rng: random.Random) -> Mend:
    victim = _await(lambda: job.rank(rng.randrange(2)))
    victim.kill()
    return nothing


def kill_data_worker(job: Job, rng: random.Random) -> Mend:
    victim = _await(lambda: job.data_worker(rng.randrange(2)) or job.done())
    if isinstance(victim, psutil.Process):
        victim.kill()
    return nothing


def kill_launcher(job: Job, rng: random.Random) -> Mend:
    os.kill(job.launchers[rng.randrange(2)].pid, 9)
    return nothing


def lose_node(job: Job, rng: random.Random) -> Mend:
    job.nodes.pull()  # first: a machine without power sends no farewell
    kill_tree(job.launchers[rng.randrange(2)])
    return job.nodes.plug


def cut_for_good(job: Job, rng: random.Random) -> Mend:
    job.nodes.pull()
    return job.nodes.plug


def cut_5_seconds(job: Job, rng: random.Random) -> Mend:
    job.nodes.pull()
    time.sleep(5)
    job.nodes.plug()
    return nothing


def lose_shard(job: Job, rng: random.Random) -> Mend:
    shard = rng.choice(sorted(job.data.glob("shard-*.tar")))
    away = shard.with_suffix(".away")
    shard.rename(away)
    return lambda: away.rename(shard) and None


def fill_disk(job: Job, rng: random.Random) -> Mend:
    filler = job.run_dir.parent / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    return filler.unlink


def halve_checkpoint(job: Job, rng: random.Random) -> Mend:
    for launcher in job.launchers:
        kill_tree(launcher)
    job.wait(5)
    folder = job.run_dir / f"classify/checkpoints/step-{job.newest()}"
    if files := sorted(folder.glob("*")):
        victim = rng.choice(files)
        os.truncate(victim, rng.randrange(victim.stat().st_size))
    return nothing


def dead_server(job: Job, rng: random.Random) -> Mend:
    return _upset_server(job, "kill")


def hung_server(job: Job, rng: random.Random) -> Mend:
    return _upset_server(job, "suspend")


def _upset_server(job: Job, how: str) -> Mend:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if str(job.run_dir.parent / "mlflow.db") in " ".join(process.cmdline()):
                getattr(process, how)()
    return nothing


FAULTS: dict[str, tuple[str, Callable[[Job, random.Random], Mend]]] = {
    "worker": ("kill -9 of a rank", kill_worker),
    "data-worker": ("kill -9 of a rank's data worker", kill_data_worker),
    "launcher": ("kill -9 of a launcher", kill_launcher),
    "node": ("a machine lost: no link, all its processes gone", lose_node),
    "cut": ("link cut for good", cut_for_good),
    "cut-5": ("link cut for 5 s", cut_5_seconds),
    "dead-server": ("tracking server killed", dead_server),
    "hung-server": ("tracking server hangs", hung_server),
    "shard": ("a shard vanishes", lose_shard),
    "disk": ("disk full", fill_disk),
    "half": ("all killed, newest checkpoint cut short", halve_checkpoint),
}


def _await(found: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.02)
    raise TimeoutError("the drill found no victim")


def serve(nodes: Nodes, folder: Path) -> None:
    """An MLflow server on node0."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", "5510", "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with open(folder / "server.log", "ab") as log:
        nodes.start(0, command, dict(os.environ), stdout=log, stderr=log)
    _await(lambda: "startup complete" in (folder / "server.log").read_text(), 90)


def drill(kind: str, job: Job, rng: random.Random, length: float) -> tuple[float, bool, int, float]:
    """(seconds from fault to end, finished without a second start, steps lost, moment)."""
    inject = FAULTS[kind][1]
    while True:
        moment = rng.uniform(0, length)
        shutil.rmtree(job.run_dir, ignore_errors=True)
        job.start()
        _await(lambda: job.rank(0) and job.rank(1), 60)
        time.sleep(moment)
        if job.running() and not job.done():
            break
        job.wait(BOUND)
    fault = time.monotonic()
    mend = inject(job, rng)
    ended = float("inf") if job.wait(BOUND + length) == float("inf") else time.monotonic() - fault
    mend()
    alone, saved, reached = job.done(), job.newest(), job.logged()
    lost = 0
    if not alone:
        mark = job.log.stat().st_size
        job.start()
        if job.wait(BOUND + length) == float("inf") or not job.done():
            raise RuntimeError(f"the resumed run failed: {job.log}")
        resumed = re.findall(r"resumed after step (\d+)", job.log.read_bytes()[mark:].decode(errors="replace"))
        went_on = int(resumed[0]) if resumed else 0
        assert kind == "half" or went_on == saved, f"went on at {went_on}, saved was {saved}: {job.log}"
        lost = max(0, reached - went_on)
    return ended, alone, lost, moment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="a synthetic shard set (a copy is worked on)")
    parser.add_argument("--count", type=int, default=10, help="of each fault")
    parser.add_argument("--faults", default=",".join(FAULTS), help="some of: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fault-drills-"))
    data = folder / "data"
    shutil.copytree(args.data, data)
    small = folder / "small"  # a disk to fill
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "esol-drill", str(small)], check=True)
    rows, wrong = [], 0
    try:
        with Nodes(folder) as nodes:
            whole = Job(nodes, data, folder / "unbroken")
            whole.start()
            _await(lambda: whole.rank(0) and whole.rank(1), 60)
            begun = time.monotonic()
            whole.wait(600)
            if not whole.done():
                print(f"the unbroken run failed: {whole.log}")
                return 1
            length, expected = time.monotonic() - begun, sha256(whole.run_dir / WEIGHTS)
            for kind in args.faults.split(","):
                rng = random.Random(f"{args.seed} {kind}")
                found, same = [], 0
                for count in range(args.count):
                    job = Job(nodes, data, (small if kind == "disk" else folder) / kind)
                    if kind.endswith("server"):
                        job.uri = "http://127.0.0.1:5510"
                        (folder / "server.log").write_text("")
                        serve(nodes, folder)
                    ended, alone, lost, moment = drill(kind, job, rng, length)
                    same += sha256(job.run_dir / WEIGHTS) == expected
                    found.append((ended, alone, lost))
                    text = f"{kind} {count}: fault after {moment:.1f} s, end {ended:.1f} s later, lost {lost} steps"
                    print(text, file=sys.stderr, flush=True)
                    if kind.endswith("server"):
                        _end_server(folder)
                    shutil.rmtree(job.run_dir)
                hangs = sum(ended > BOUND + (length if alone else 0) for ended, alone, _ in found)
                wrong += hangs + args.count - same
                alone_count = sum(alone for _, alone, _ in found)
                times = [ended for ended, alone, _ in found if not alone]
                rows.append(
                    [
                        FAULTS[kind][0], args.count, alone_count, max(times) if times else "-", hangs,
                        max(lost for *_, lost in found), f"{same} of {args.count}",
                    ]
                )  # fmt: skip
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)
    headings = (
        "fault", "drills", "finished by itself", "end after the fault, s, at most", "longer than the bound",
        "steps done again, at most", "weights bit-identical",
    )  # fmt: skip
    print(f"{machine()}; 2 machines, 1 rank each; unbroken run {length:.0f} s; a checkpoint every {EVERY} steps; ")
    print(f"engine.timeout {TIMEOUT} s, engine.stall {STALL} s, bound {BOUND} s; seed {args.seed}\n")
    print(table(headings, rows))
    if not wrong:
        shutil.rmtree(folder)
    return 1 if wrong else 0


def _end_server(folder: Path) -> None:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if str(folder / "mlflow.db") in " ".join(process.cmdline()):
                process.kill()


if __name__ == "__main__":
    sys.exit(main())
