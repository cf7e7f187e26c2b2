"""The launchers themselves: each must form the job that its command line asks for, with nothing set by hand."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil  # accelerate brings it
import pytest
from ranks import _free_port

from esol.base.errors import DataError, LaunchError
from esol.engines.environment import VARIABLES, allow_connections, check_environment
from esol.pipeline.config_file import from_tree
from esol.pipeline.job import run_job

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys, torch
sys.path.insert(0, {root!r})
from esol.config import EngineConfig
from esol.engines import make_engine
from esol.base.errors import LaunchError
try:
    engine = make_engine(EngineConfig(name=sys.argv[-1], threads=1, timeout=1), seed=0)
except LaunchError as error:
    sys.exit(f"error: {{error}}")
total = int(engine.reduce(torch.tensor([engine.rank + 1]), "sum"))
open(f"{{sys.argv[-2]}}-{{engine.rank}}", "w").write(f"{{engine.world_size}} {{total}}")
engine.close()
"""


def test_launchers(tmp_path: Path) -> None:
    """All but torchrun and accelerate launch with the engine accelerate, which start whole runs in other tests."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT)))
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    zero = [*accelerate, "--use_deepspeed", "--num_processes", "2", "--main_process_port", str(_free_port())]
    commands = {  # name: launcher, engine
        "wrong": ([*accelerate, "--cpu", "--num_processes", "2"], "accelerate"),
        "torchrun-zero": (torchrun, "deepspeed"),
        "accelerate-zero": (zero, "deepspeed"),
        "deepspeed": ([*deepspeed, "--master_port", str(_free_port())], "deepspeed"),
    }
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "OMP_", "MASTER_"))}
    env |= {"DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"}
    processes = {
        name: subprocess.Popen(
            [*command, str(program), str(tmp_path / name), engine],
            env=env | ({"ACCELERATE_USE_CPU": "true"} if name == "accelerate-zero" else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, (command, engine) in commands.items()
    }
    outputs = {name: process.communicate(timeout=240)[0] for name, process in processes.items()}
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if path != program}
    assert found == {f"{name}-{rank}": "2 3" for name in commands if name != "wrong" for rank in (0, 1)}, outputs
    assert "use accelerate launch --config_file launch/cpu.yaml" in outputs["wrong"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ("WORLD_SIZE=2", "WORLD_SIZE=2 without RANK, MASTER_ADDR, MASTER_PORT: something else left it"),
        ("WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=1", "without RANK: something"),
        ("RANK=1", "RANK=1 without WORLD_SIZE, MASTER_ADDR, MASTER_PORT: something"),
        ("LOCAL_RANK=1", "LOCAL_RANK=1 without RANK, WORLD_SIZE"),
        ("WORLD_SIZE=two", "must be whole numbers"),
        ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=1", "RANK=2 is no process of WORLD_SIZE=2"),
        ("SLURM_NTASKS=2 SLURM_PROCID=1", ""),  # inside salloc
        ("WORLD_SIZE=1 LOCAL_RANK=0", ""),
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=1", ""),  # what every launcher gives
        ("PMI_RANK=1 PMI_SIZE=2 WORLD_SIZE=2", ""),
    ],
)
def test_variables_that_no_launcher_has_set(variables: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for text in variables.split():
        monkeypatch.setenv(*text.split("=", 1))
    if said:
        with pytest.raises(LaunchError, match=f"{said}.*unset RANK WORLD_SIZE LOCAL_RANK"):
            check_environment()
    else:
        check_environment()
        assert ("WORLD_SIZE" in os.environ) == ("WORLD_SIZE=2" in variables)


def test_a_large_job_may_open_a_connection_for_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1100, before[1]))
        monkeypatch.setenv("WORLD_SIZE", "1")
        allow_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1100, before[1])
        monkeypatch.setenv("WORLD_SIZE", "100")
        allow_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1424, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_restarts_by_torchrun_need_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each would delete the checkpoints of the stage that it interrupted."""
    config = from_tree({"run_dir": str(tmp_path / "run"), "data": {"root": str(tmp_path / "nowhere")}})
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(LaunchError, match=r"told to start this job again .*--max-restarts.*add --resume"):
        run_job(config)
    with pytest.raises(DataError, match="nowhere"):
        run_job(config, resume=True)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    with pytest.raises(DataError, match="nowhere"):
        run_job(config)


TINY = """
model: {backbone: small, weights: none, output_stride: 8, freeze: none, kernel_channels: 16}
data: {crop: 48, workers: 1}
classify: {duration: 1000000 steps, global_batch: 8}
stages: [classify]
engine: {threads: 1, timeout: 1}
tracking: {every: 1, uri: none}
"""


def test_ctrl_c_at_the_terminal_of_torchrun(tmp_path: Path, shard_set: Path) -> None:
    """The terminal signals the launcher and its ranks, and the launcher its ranks again: all that is one press."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "esol/train.py"), "--config", str(tmp_path / "tiny.yaml")]
    command += ["--set", f"run_dir={tmp_path / 'run'}", "--set", f"data.root={shard_set}"]
    process = subprocess.Popen(
        command, env=os.environ | {"ESOL_EXIT_FILE": str(tmp_path / "code")}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while not log.exists() or '"step": 3' not in log.read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (tmp_path / "code").read_text() == "130\n", output
    assert output.count("SIGINT: stopped after step") == 1
    assert "KeyboardInterrupt" not in output
    assert 'train.py", line' not in output  # no traceback of ours; torchrun's own is torchrun's
    assert len(list((tmp_path / "run/classify/checkpoints").glob("step-*[0-9]"))) == 1
    assert not [child for child in started if child.is_running()]
