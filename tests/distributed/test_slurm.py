"""A real SLURM on two machines (network namespaces) runs launch/slurm.sbatch: make test-cluster."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # accelerate brings it
import pytest

from benchmarks.nodes import Nodes

CLUSTER = os.environ.get("ESOL_CLUSTER") == "1"
pytestmark = [
    pytest.mark.skipif(not CLUSTER, reason="needs root, slurm-wlm, munge and minutes: make test-cluster"),
    pytest.mark.skipif(CLUSTER and not shutil.which("slurmctld"), reason="apt-get install slurm-wlm munge"),
    pytest.mark.timeout(900),
]
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CONFIG = """
ClusterName=esol
SlurmctldHost=node0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
JobRequeue=1
KillWait=10
ReturnToService=2
MpiDefault=none
NodeName=node[0-1] CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""
TINY = """
model: {backbone: small, weights: none, output_stride: 8, freeze: none, kernel_channels: 16}
classify: {duration: 150 steps, global_batch: 8}
stages: [classify]
engine: {threads: 1, timeout: 1}
checkpoint: {every: 20}
tracking: {every: 1, pictures: 2, uri: none}
"""


class Slurm:
    """Runs SLURM's commands on node0."""

    def __init__(self, nodes: Nodes, folder: Path) -> None:
        self._nodes, self.folder = nodes, folder
        self._env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{BIN}:{os.environ['PATH']}"}

    def start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder))
        files = [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        self._daemon(0, "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        self._daemon(0, "slurmctld", "-D", "-c")
        for node in (0, 1):
            self._daemon(node, "slurmd", "-D")
        self.until("two idle nodes", lambda: self("sinfo", "-h", "-o", "%D %t") == "2 idle", 60)

    def _daemon(self, node: int, *command: str) -> None:
        with open(self.folder / "daemons.log", "ab") as log:
            self._nodes.start(node, command, self._env, stdout=log, stderr=log)

    def __call__(self, *command: str) -> str:
        process = self._nodes.start(
            0, command, self._env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return process.communicate(timeout=60)[0].strip()

    def submit(self, name: str, *options: str, nodes: str = "2", array: tuple[str, ...] = ()) -> tuple[str, Path]:
        """A job of one task a node in the run directory `name`; its number, and what it will print."""
        log = self.folder / f"{name}.log"
        said = self(
            "sbatch", f"--nodes={nodes}", *array, "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1",
            f"--output={log}", str(ROOT / "launch/slurm.sbatch"), "--config", str(self.folder / "tiny.yaml"),
            "--set", f"run_dir={self.folder / name}", *options,
        )  # fmt: skip
        assert said.startswith("Submitted batch job"), said
        return said.split()[-1], log

    def field(self, job: str, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", self("scontrol", "show", "job", job))
        assert found
        return found[1]

    def until(self, what: str, reached: Callable[[], Any], bound: float) -> None:
        deadline = time.monotonic() + bound
        while not reached():
            assert time.monotonic() < deadline, f"waited {bound} s for {what}\n{self.logs()}"
            time.sleep(0.3)

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in self.folder.glob("*.log"))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory, shard_set: Path) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    data = f"data: {{root: {shard_set}, score_split: val, long_side: [48, 72], crop: 48, workers: 1}}\n"
    (folder / "tiny.yaml").write_text(f"run_dir: unset\n{data}{TINY}")
    with Nodes(folder) as nodes:
        cluster = Slurm(nodes, folder)
        cluster.start()
        yield cluster
        cluster("scancel", "--user=root")


def logged(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return max((int(s) for s in re.findall(r'"step": (\d+)', path.read_text())), default=0) if path.exists() else 0


@pytest.mark.parametrize("engine", ["accelerate", "deepspeed"])
def test_preempted_requeued_and_finished_with_the_weights_of_an_unbroken_run(slurm: Slurm, engine: str) -> None:
    whole, broken = f"whole-{engine}", f"broken-{engine}"
    job, log = slurm.submit(whole, "--engine", engine)
    slurm.until("the unbroken job", lambda: slurm.field(job, "JobState") == "COMPLETED", 120)
    job, log = slurm.submit(broken, "--engine", engine)
    slurm.until("step 30", lambda: logged(slurm.folder / broken) >= 30, 120)
    slurm("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1@180 does when the time is nearly up
    slurm.until("the requeue", lambda: slurm.field(job, "Restarts") == "1", 60)
    slurm.until("the resumed job", lambda: slurm.field(job, "JobState") == "COMPLETED", 180)
    text = log.read_text()
    assert "esol: ended with code 75 after USR1, restart 0" in text
    assert "SIGUSR1: stopped after step" in text
    assert "classify: resumed after step" in text
    assert "esol: ended with code 0, restart 1" in text
    a, b = ((slurm.folder / name / "classify/model.safetensors").read_bytes() for name in (whole, broken))
    assert a == b


def test_a_plain_scancel_saves_and_stays_dead(slurm: Slurm) -> None:
    job, log = slurm.submit("cancelled", "--set", "classify.duration=5000 steps")
    slurm.until("step 30", lambda: logged(slurm.folder / "cancelled") >= 30, 120)
    slurm("scancel", job)
    slurm.until("the end", lambda: slurm.field(job, "JobState") == "CANCELLED", 60)
    slurm.until("the checkpoint", lambda: "SIGTERM: stopped after step" in log.read_text(), 20)
    time.sleep(20)  # a requeued job is back after 6 s
    assert slurm.field(job, "JobState") == "CANCELLED"
    assert slurm.field(job, "Restarts") == "0"
    saved = (slurm.folder / "cancelled/classify/checkpoints/latest").read_text()
    assert int(saved.split("-")[1]) >= 30


def test_a_killed_rank_ends_the_job_which_goes_on_when_submitted_again(slurm: Slurm) -> None:
    """Not by itself: what kills a rank is mostly its memory, and that comes back."""
    job, log = slurm.submit("killed", "--set", "classify.duration=300 steps")
    slurm.until("step 50", lambda: logged(slurm.folder / "killed") >= 50, 120)
    next(p for p in psutil.process_iter() if is_rank(p, str(slurm.folder / "killed"))).kill()
    slurm.until("its end", lambda: slurm.field(job, "JobState") == "FAILED", 60)
    assert "esol: ended with code 137, restart 0" in log.read_text()
    again, log = slurm.submit("killed", "--set", "classify.duration=300 steps")
    slurm.until("the finished job", lambda: slurm.field(again, "JobState") == "COMPLETED", 180)
    assert "classify: resumed after step" in log.read_text()


def test_an_array_is_a_run_for_each_seed(slurm: Slurm) -> None:
    run_dir = "seed-${SLURM_ARRAY_TASK_ID}"
    job, _ = slurm.submit(run_dir, nodes="1", array=("--array=4-5",))
    weights = [slurm.folder / f"seed-{seed}/classify/model.safetensors" for seed in (4, 5)]
    slurm.until("both runs", lambda: all(path.exists() for path in weights), 240)
    assert "seed: 5" in (slurm.folder / "seed-5/resolved.yaml").read_text()
    assert weights[0].read_bytes() != weights[1].read_bytes()
    slurm.until("the end", lambda: slurm("squeue", "-h", "-j", job) == "", 60)


def is_rank(process: psutil.Process, run_dir: str) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        line = process.cmdline()
        return line[1:2] == ["esol/train.py"] and f"run_dir={run_dir}" in line
    return False
