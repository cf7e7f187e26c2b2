"""What can befall a job: twenty kinds of faults, when each happens, and what is right then."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil  # accelerate brings it

from benchmarks.fault_job import BOUND, ROOT, STEPS, Disk, Group, Job, World, awaited
from benchmarks.nodes import kill_tree

PERIOD = 100_000  # microseconds in which a cgroup's processes get their share of the cores
RATE = 256 << 10  # bytes a second of a slow disk
REQUESTS = 12  # of those that the job makes of its store, at least, one is drawn
PATIENCE = 60  # seconds that a second job waits for the first (esol.pipeline.job)
ANSWER = 150  # seconds that a store may fail to answer where the watchdog does not watch yet (esol.data.storage)
HOG = "kept = []\nwhile True: kept.append(b'1' * (1 << 22))"


class Wrong(Exception):  # noqa: N818  it is the job's error, not the drill's
    """What the job did not do as it ought to, beside how it ends."""


Mend = Callable[[], None]
Moment = Callable[[], None]


def nothing() -> None:
    """What needs no mending."""


@dataclass(frozen=True)
class Whole:
    """The unbroken run: seconds from both ranks' start to the first step's end, and to its own; its weights' hash."""

    start: float
    length: float
    weights: str


def any_moment(job: Job, rng: random.Random, whole: Whole) -> Moment:
    """Of four drills one while the ranks start, and three in the steps."""
    if rng.random() < 0.25:
        seconds = rng.uniform(0, whole.start)
        return lambda: time.sleep(seconds)
    return _after(job, rng.randrange(1, STEPS), rng)


def while_training(job: Job, rng: random.Random, whole: Whole) -> Moment:
    """In the first half of the steps: what is slowed down has still to be running."""
    return _after(job, rng.randrange(1, STEPS // 2), rng)


def after_the_last_step(job: Job, rng: random.Random, whole: Whole) -> Moment:
    """Within a second of it, in a job that launch/entrypoint.sh has started."""
    job.entered = True
    return _after(job, STEPS, rng, within=1)


def _after(job: Job, step: int, rng: random.Random, within: float = 0.2) -> Moment:
    """Within so many seconds after a step was logged."""
    seconds = rng.uniform(0, within)

    def wait() -> None:
        while job.logged() < step and job.running():
            time.sleep(0.1)
        time.sleep(seconds)

    return wait


def kill_worker(job: Job, rng: random.Random) -> Mend:
    victim = awaited(lambda: job.rank(rng.randrange(2)))
    victim.kill()
    return nothing


def kill_data_worker(job: Job, rng: random.Random) -> Mend:
    victim = awaited(lambda: job.data_worker(rng.randrange(2)) or job.done())
    if isinstance(victim, psutil.Process):
        victim.kill()
    return nothing


def kill_launcher(job: Job, rng: random.Random) -> Mend:
    if launcher := job.launcher(rng.randrange(2)):
        launcher.kill()
    return nothing


def lose_node(job: Job, rng: random.Random) -> Mend:
    job.world.nodes.pull()  # first: a machine without power sends no farewell
    kill_tree(job.launchers[rng.randrange(2)])
    return job.world.nodes.plug


def cut_for_good(job: Job, rng: random.Random) -> Mend:
    job.world.nodes.pull()
    return job.world.nodes.plug


def cut_5_seconds(job: Job, rng: random.Random) -> Mend:
    job.world.nodes.pull()
    time.sleep(5)
    job.world.nodes.plug()
    return nothing


def lose_shard(job: Job, rng: random.Random) -> Mend:
    shard = rng.choice(sorted(job.world.data.glob("shard-*.tar")))
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


def tracked(job: Job, rng: random.Random, whole: Whole) -> Moment:
    """At any moment of a job whose numbers go to an MLflow server on node0."""
    serve(job)
    job.settings = (*job.settings, "tracking.uri=http://127.0.0.1:5510")
    return any_moment(job, rng, whole)


def serve(job: Job) -> None:
    folder, log = job.world.folder, job.world.folder / "server.log"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", "5510", "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with open(log, "wb") as file:
        job.world.nodes.start(0, command, dict(os.environ), stdout=file, stderr=file)
    job.stack.callback(_upset_server, job, "kill")
    awaited(lambda: "startup complete" in log.read_text(), 90, f"the tracking server has not started: {log}")


def dead_server(job: Job, rng: random.Random) -> Mend:
    return _upset_server(job, "kill")


def hung_server(job: Job, rng: random.Random) -> Mend:
    return _upset_server(job, "suspend")


def _upset_server(job: Job, how: str) -> Mend:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if str(job.world.folder / "mlflow.db") in " ".join(process.cmdline()):
                getattr(process, how)()
    return nothing


def limited(job: Job, rng: random.Random, whole: Whole) -> Moment:
    """At any moment of a job whose memory can be limited."""
    job.group = job.stack.enter_context(Group("memory"))
    return any_moment(job, rng, whole)


def out_of_memory(job: Job, rng: random.Random) -> Mend:
    """Another process eats what is left of the memory, until the kernel kills: the rank, by what the drill sets."""
    group, victim = job.group, awaited(lambda: job.rank(rng.randrange(2)))
    assert group is not None
    Path(f"/proc/{victim.pid}/oom_score_adj").write_text("1000")
    used = int(group.read("memory.usage_in_bytes"))
    group.write("memory.limit_in_bytes", used + (64 << 20))
    hog = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(1)\n{HOG}"])
    group.add(hog.pid)
    try:
        awaited(lambda: "oom_kill 0" not in group.read("memory.oom_control"), 20, "the kernel has killed nobody")
    finally:
        hog.kill()
        hog.wait()
        group.write("memory.limit_in_bytes", -1)
    return nothing


def slow_rank(job: Job, rng: random.Random) -> Mend:
    slow_down(job, [awaited(lambda: job.rank(rng.randrange(2)))])
    return nothing


def slow_down(job: Job, ranks: list[psutil.Process], times: float = 10) -> Group:
    """Ranks and their data workers together get so much less time on the cores than they took in the last second."""
    processes = [process for rank in ranks for process in (rank, *rank.children(recursive=True))]
    before = _used(processes)
    time.sleep(1)
    used = _used(processes) - before
    group = job.stack.enter_context(Group("cpu"))
    group.write("cpu.cfs_quota_us", max(1000, round(used / times * PERIOD)))
    for process in processes:
        group.add(process.pid)
    return group


def _used(processes: list[psutil.Process]) -> float:
    """Seconds on the cores that they have taken so far."""
    found = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += sum(process.cpu_times()[:2])
    return found


def jumping(job: Job, rng: random.Random, whole: Whole) -> Moment:
    """At any moment of a job each of whose machines has a clock of its own."""
    for node in (0, 1):
        (job.world.folder / f"clock-{node}").write_text("0")
    path = os.pathsep.join(filter(None, (str(ROOT / "benchmarks/jumping_clock"), os.environ.get("PYTHONPATH"))))
    job.env |= {"PYTHONPATH": path, "ESOL_DRILL_CLOCK": f"{job.world.folder}/clock-{{node}}"}
    return any_moment(job, rng, whole)


def clock_jumps(job: Job, rng: random.Random) -> Mend:
    seconds = rng.choice((-86400, -3600, 3600, 86400))
    (job.world.folder / f"clock-{rng.randrange(2)}").write_text(str(seconds))
    return nothing


def read_only(job: Job, rng: random.Random) -> Mend:
    job.world.disk.fail()
    return job.world.disk.repair


def slow_disk(job: Job, rng: random.Random) -> Mend:
    job.world.disk.rate(RATE)
    return lambda: job.world.disk.rate(0)


def _remote(job: Job) -> None:
    job.env |= {"AWS_ENDPOINT_URL": job.world.store.url}
    job.settings = (*job.settings, "data.root=s3://bucket/set", f"data.cache={job.world.folder / 'cache'}")


def _from_request(how: str, seconds: float) -> Callable[[Job, random.Random, Whole], Moment]:
    """From one of the requests on that the job makes of its store, for so many seconds."""

    def arrange(job: Job, rng: random.Random, whole: Whole) -> Moment:
        _remote(job)
        first, made, begun = rng.randrange(REQUESTS), [0], threading.Event()
        until = [float("inf")]

        def fault(method: str, path: str) -> str:
            made[0] += 1
            if made[0] > first and not begun.is_set():
                until[0] = time.monotonic() + seconds
                begun.set()
            return how if begun.is_set() and time.monotonic() < until[0] else ""

        job.world.store.fault = fault

        def wait() -> None:
            while not begun.wait(0.1) and job.running():
                pass

        return wait

    return arrange


def answer_again(job: Job, rng: random.Random) -> Mend:
    """It has happened already; the store that stalls is well again when the job has ended."""
    store = job.world.store
    return lambda: setattr(store, "fault", lambda method, path: "")


def cached(job: Job, rng: random.Random, whole: Whole) -> Moment:
    """At any moment of a job that has its shards from a store."""
    _remote(job)
    return any_moment(job, rng, whole)


def damage_cache(job: Job, rng: random.Random) -> Mend:
    """A shard in the cache gets other bytes, one in every 512, or loses its end."""
    found = awaited(lambda: sorted((job.world.folder / "cache").rglob("*.tar")) or job.done(), 60)
    if not isinstance(found, list):
        return nothing
    victim = rng.choice(found)
    size = victim.stat().st_size
    if rng.random() < 0.5:
        os.truncate(victim, rng.randrange(size))
        return nothing
    with open(victim, "r+b") as file:
        for place in range(0, size, 512):
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
    return nothing


def second_job(job: Job, rng: random.Random) -> Mend:
    """The same command a second time; the first is slowed down until that has been refused, or it would be done."""
    other = replace(job, port=job.port + 1, launchers=[])
    begun = job.logged()
    time.sleep(2)
    pace = max(0.5, (job.logged() - begun) / 2)  # steps a second; now a step is to take 3 s, which is no stall
    slow = slow_down(job, job.ranks(5), times=3 * pace)
    try:
        other.start()
        awaited(lambda: all(launcher.poll() is not None for launcher in other.launchers), PATIENCE + BOUND)
        if "is in use by process" not in other.said():
            raise Wrong("the second job was not refused")
    except TimeoutError:
        raise Wrong("the second job did not end") from None
    finally:
        for launcher in other.launchers:
            kill_tree(launcher)
        slow.write("cpu.cfs_quota_us", -1)
    return nothing


def stop_rank(job: Job, rng: random.Random) -> Mend:
    victim = awaited(lambda: job.rank(rng.randrange(2)))
    victim.suspend()
    return nothing


@dataclass(frozen=True)
class Kind:
    """A fault: what happens, in words and as a function, which returns how it is mended when the job has ended.

    goes_on: the job has to finish by itself; else it may end, says why in one line where any of it is left (says), and
    goes on with --resume. arrange: prepares the job for it and returns what waits for its moment. where: of World, the
    disk of the run directory. spare, factor: seconds, and lengths of the unbroken run, that the fault may take beside
    the bound.
    """

    words: str
    inject: Callable[[Job, random.Random], Mend]
    goes_on: bool = False
    arrange: Callable[[Job, random.Random, Whole], Moment] = any_moment
    where: str = ""
    spare: float = 0.0
    factor: float = 1.0
    says: bool = True

    def disk(self, world: World) -> Disk | None:
        """Of the run directory, where the fault is one of its disk."""
        return getattr(world, self.where) if self.where else None


KINDS = {
    "worker": Kind("kill -9 of a rank", kill_worker),
    "data-worker": Kind("kill -9 of a rank's data worker", kill_data_worker),
    "launcher": Kind("kill -9 of a launcher", kill_launcher),
    "node": Kind("a machine lost: no link, all its processes gone", lose_node),
    "cut": Kind("link cut for good", cut_for_good),
    "cut-5": Kind("link cut for 5 s", cut_5_seconds, goes_on=True),
    "dead-server": Kind("tracking server killed", dead_server, goes_on=True, arrange=tracked),
    "hung-server": Kind("tracking server hangs", hung_server, goes_on=True, arrange=tracked),
    "shard": Kind("a shard vanishes", lose_shard),
    "disk": Kind("disk full", fill_disk, where="small"),
    "half": Kind("all killed, newest checkpoint cut short", halve_checkpoint, says=False),
    "oom": Kind("a rank killed for its memory by the kernel", out_of_memory, arrange=limited),
    "slow-rank": Kind("a rank slowed ten times", slow_rank, goes_on=True, arrange=while_training, factor=10),
    "clock": Kind("a machine's clock jumps, by an hour or a day", clock_jumps, goes_on=True, arrange=jumping),
    "read-only": Kind("file system of the run turns read-only", read_only, where="disk"),
    "slow-disk": Kind("file system of the run slows to 256 KiB/s", slow_disk, goes_on=True, where="disk", factor=10),
    "store-503": Kind("S3 answers 503 for 5 s", answer_again, goes_on=True, arrange=_from_request("503", 5)),
    "store-stalls": Kind(
        "S3 does not answer any more", answer_again, arrange=_from_request("stall", float("inf")), spare=ANSWER
    ),
    "cache": Kind("a cached shard is damaged", damage_cache, goes_on=True, arrange=cached),
    "two-jobs": Kind(
        "a second job in the run directory", second_job, goes_on=True, arrange=while_training, spare=PATIENCE, factor=3
    ),
    "stopped": Kind("SIGSTOP of a rank", stop_rank),
    "launcher-late": Kind(
        "kill -9 of a launcher after the last step", kill_launcher, goes_on=True, arrange=after_the_last_step
    ),
}
