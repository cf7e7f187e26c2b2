"""The small job that faults happen to, and the two machines with their disks and their store that it runs on."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # accelerate brings it

from benchmarks.nodes import Nodes, kill_tree
from benchmarks.stores import AWS, Between, s3_server
from esol.base import exits

ROOT = Path(__file__).parents[1]
EVERY = 5  # steps between checkpoints
STEPS = 60  # of classify, in all
TIMEOUT, STALL = 20, 20  # seconds: engine.timeout and engine.stall
BOUND = TIMEOUT + STALL + 35  # seconds: the watchdog's last words, and the 30 s that torchrun gives its processes
SMALL = (
    "data.score_split=val", "data.long_side=[64,96]", "data.crop=64", "data.workers=1", "model.kernel_channels=32",
    f"classify.duration={STEPS} steps", f"checkpoint.every={EVERY}", "engine.threads=1", "tracking.pictures=2",
    "tracking.every=1", f"engine.timeout={TIMEOUT / 60}", f"engine.stall={STALL / 60}",
)  # fmt: skip
SETTINGS = {
    "accelerate": {"ddp": ()},
    "deepspeed": {
        "zero1": ("engine.deepspeed.zero=1",),
        "zero2": ("engine.deepspeed.zero=2",),
        "zero3": ("engine.deepspeed.zero=3",),
        "offload": ("engine.deepspeed.zero=2", "engine.deepspeed.offload=true"),
    },
}
WEIGHTS = "classify/model.safetensors"
CGROUPS = Path("/sys/fs/cgroup")
ENTRYPOINT = ROOT / "launch/entrypoint.sh"
_SAID = re.compile(r"^(?:error: .*|.*go on with --resume)$", re.MULTILINE)


def awaited(found: Callable[[], Any], seconds: float = 20, what: str = "the drill found no victim") -> Any:
    """The first true value of `found`; TimeoutError after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.2)
    raise TimeoutError(what)


class Disk:
    """A file system of its own that can break (ext4 in a file) or fill (memory), mounted at `place`."""

    def __init__(self, place: Path, image: bool) -> None:
        self.place, self._image = place, place.with_suffix(".img") if image else None

    def make(self) -> None:
        """An empty one, mounted."""
        self.remove()
        self.place.mkdir(exist_ok=True)
        if self._image is None:
            _call("mount", "-t", "tmpfs", "-o", "size=24m", "esol-drill", self.place)
            return
        self._image.unlink(missing_ok=True)
        with open(self._image, "wb") as file:
            file.truncate(64 << 20)
        _call("mkfs.ext4", "-q", "-E", "nodiscard", self._image)
        self._mount()

    def _mount(self) -> None:
        _call("mount", "-o", "loop,errors=remount-ro", self._image, self.place)

    @property
    def device(self) -> str:
        """Of an ext4, as the kernel calls it: loop0."""
        return subprocess.run(
            ["findmnt", "-no", "SOURCE", self.place], check=True, capture_output=True, text=True
        ).stdout.strip().removeprefix("/dev/")  # fmt: skip

    def fail(self) -> None:
        """As after a bad sector: the kernel lets nobody write any more, nor keeps what it had not written yet."""
        Path(f"/sys/fs/ext4/{self.device}/trigger_fs_error").write_text("1")

    def repair(self) -> None:
        """As an administrator would: taken off, checked, mounted again."""
        awaited(lambda: not subprocess.run(["umount", self.place], stderr=subprocess.DEVNULL).returncode, 10, "busy")
        subprocess.run(["e2fsck", "-fy", str(self._image)], check=False, capture_output=True)  # 1: it mended something
        self._mount()

    def rate(self, limit: int) -> None:
        """Bytes a second that may be read, and as many written; 0 = as many as it can."""
        for what in ("read", "write"):
            device = Path(f"/sys/class/block/{self.device}/dev").read_text().strip()
            (CGROUPS / f"blkio/blkio.throttle.{what}_bps_device").write_text(f"{device} {limit}")

    def remove(self) -> None:
        """Taken off, whoever still has it open."""
        while os.path.ismount(self.place):
            _call("umount", "-l", self.place)


class Group:
    """A cgroup (version 1) of one controller; entered as a context, at whose end its processes must be gone."""

    def __init__(self, controller: str) -> None:
        self.folder = CGROUPS / controller / f"esol-drill-{os.getpid()}"

    def __enter__(self) -> Group:
        if not self.folder.parent.is_dir():
            raise SystemExit(f"this drill needs cgroups of version 1: there is no {self.folder.parent}")
        self.folder.mkdir()
        return self

    def __exit__(self, *exception: object) -> None:
        awaited(lambda: not self.read("cgroup.procs").split(), 10, f"{self.folder} is not empty")
        self.folder.rmdir()

    def add(self, pid: int) -> None:
        """A process, and what it starts from now on."""
        with contextlib.suppress(ProcessLookupError):
            self.write("cgroup.procs", pid)

    def write(self, name: str, value: object) -> None:
        (self.folder / name).write_text(str(value))

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()


@dataclass
class World:
    """Where the jobs run: two machines, their data, a disk to fill, one to break, and a store, as they are asked for.

    Entered as a context; folder: for all of it. What a drill leaves behind is gone with the next call of `clean`.
    """

    folder: Path
    data: Path
    nodes: Nodes = field(init=False)
    stack: ExitStack = field(default_factory=ExitStack)
    _store: Between | None = None

    def __enter__(self) -> World:
        self.nodes = self.stack.enter_context(Nodes(self.folder))
        self.small, self.disk = Disk(self.folder / "small", image=False), Disk(self.folder / "disk", image=True)
        self.stack.callback(self.small.remove)
        self.stack.callback(self.disk.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    @property
    def store(self) -> Between:
        """What stands before a bucket that holds the data, on node0."""
        if self._store is None:
            import s3fs

            upstream = self.stack.enter_context(s3_server())
            listening = self.nodes.listening(0)
            self._store = self.stack.enter_context(Between(upstream, listening=listening))
            host, port = listening.getsockname()
            self._store.url = f"http://{host}:{port}"
            os.environ.update(AWS)
            files = s3fs.S3FileSystem(endpoint_url=upstream)
            files.mkdir("bucket")
            for path in self.data.iterdir():
                files.put_file(str(path), f"bucket/set/{path.name}")
        return self._store

    def clean(self) -> None:
        """As before the first drill."""
        self.nodes.plug()
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        if self._store is not None:
            self._store.fault = lambda method, path: ""


@dataclass
class Job:
    """Two launchers in a run directory, and what they print.

    settings: overrides; env: of both machines; entered: through launch/entrypoint.sh; group: that its processes run in;
    stack: what is to be undone when they have ended.
    """

    world: World
    run_dir: Path
    engine: str
    settings: Sequence[str] = ()
    env: dict[str, str] = field(default_factory=dict)
    entered: bool = False
    port: int = 29510
    group: Group | None = None
    launchers: list[subprocess.Popen[Any]] = field(default_factory=list)
    stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.running():
            self.kill()
        self.stack.close()

    @property
    def log(self) -> Path:
        return self.world.folder / f"{self.run_dir.name}-{self.port}.log"

    def start(self) -> None:
        overrides = (f"data.root={self.world.data}", "tracking.uri=none", *SMALL, *self.settings)
        options = [part for text in (*overrides, f"run_dir={self.run_dir}") for part in ("--set", text)]
        self.launchers = []
        for node in (0, 1):
            self.code(node).unlink(missing_ok=True)
            env = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "OMP_"))}
            env |= {exits.NOTED: str(self.code(node))}
            env |= {name: value.format(node=node) for name, value in self.env.items()}
            command = [
                *(["bash", str(ENTRYPOINT)] if self.entered else []),
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                "--node-rank", str(node), "--master-addr", "node0", "--master-port", str(self.port),
                str(ROOT / "esol/train.py"), "--config", str(ROOT / "configs/demo.yaml"), "--engine", self.engine,
                "--stages", "classify", "--resume", *options,
            ]  # fmt: skip
            with open(self.log, "ab") as log:
                self.launchers.append(self.world.nodes.start(node, command, env, stdout=log, stderr=log))
            if self.group is not None:
                self.group.add(self.launchers[node].pid)

    def code(self, node: int) -> Path:
        """Where a machine's rank leaves its exit code."""
        return self.world.folder / f"code-{self.port}-{node}"

    def codes(self) -> list[str]:
        """Exit codes of the ranks, "-" of one that could not leave any; behind launch/entrypoint.sh that script's."""
        if self.entered:
            return [str(launcher.returncode) for launcher in self.launchers]
        return [code.read_text().strip() if (code := self.code(node)).exists() else "-" for node in (0, 1)]

    def launcher(self, node: int) -> psutil.Process | None:
        """torchrun, which launch/entrypoint.sh may stand before."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.launchers[node].pid)
            for process in (own, *own.children(recursive=True)):
                if "torch.distributed.run" in process.cmdline()[:3]:
                    return process
        return None

    def rank(self, node: int) -> psutil.Process | None:
        """The training process of a node, None while there is none."""
        return _training_below(self.launcher(node))

    def data_worker(self, node: int) -> psutil.Process | None:
        """A data worker of a node: a fork, with its parent's command line."""
        return _training_below(self.rank(node))

    def ranks(self, seconds: float = 200) -> list[psutil.Process]:
        """Both training processes, once they are there."""
        found: list[psutil.Process] = awaited(
            lambda: all(both := [self.rank(0), self.rank(1)]) and both, seconds, f"the job has not started: {self.log}"
        )
        return found

    def running(self) -> bool:
        return any(launcher.poll() is None for launcher in self.launchers) or any(self.alive())

    def alive(self) -> list[psutil.Process]:
        """Processes in this run directory, also those whose launcher is gone."""
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
                self.kill()
                return float("inf")
            time.sleep(0.2)
        return time.monotonic() - begun

    def kill(self) -> None:
        for launcher in self.launchers:
            kill_tree(launcher)
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def done(self) -> bool:
        return (self.run_dir / "classify/manifest.json").exists()

    def newest(self) -> int:
        """Steps of the newest checkpoint that is whole, 0 without any."""
        latest = self.run_dir / "classify/checkpoints/latest"
        return int(latest.read_text().split("-")[1]) if latest.exists() else 0

    def logged(self) -> int:
        """The last step that anything was logged of."""
        path = self.run_dir / "metrics.jsonl"
        text = path.read_text(errors="replace") if path.exists() else ""
        return max((int(s) for s in re.findall(r'"step": (\d+)', text)), default=0)

    def said(self, since: int = 0) -> str:
        """The first line of its output, from a byte on, that says why it ended, or ""."""
        text = self.log.read_bytes()[since:].decode(errors="replace") if self.log.exists() else ""
        found = _SAID.search(text)
        return found[0][:300] if found else ""


def _training_below(process: psutil.Process | None) -> psutil.Process | None:
    """The first child of a process that is esol/train.py or a fork of it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in process.children() if process else ():
            if str(ROOT / "esol/train.py") in child.cmdline():
                return child
    return None


def _call(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)
