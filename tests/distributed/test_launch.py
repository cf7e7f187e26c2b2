"""The launchers themselves: each must form the job that its command line asks for, with nothing set by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ranks import _free_port

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys, torch
sys.path.insert(0, {root!r})
from esol.config import EngineConfig
from esol.engines import make_engine
from esol.errors import LaunchError
try:
    engine = make_engine(EngineConfig(name=sys.argv[-1], threads=1, timeout=1), seed=0)
except LaunchError as error:
    sys.exit(f"error: {{error}}")
total = int(engine.reduce(torch.tensor([engine.rank + 1]), "sum"))
open(f"{{sys.argv[-2]}}-{{engine.rank}}", "w").write(f"{{engine.world_size}} {{total}}")
engine.close()
"""


def test_launchers(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT)))
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    yaml = ["--config_file", str(ROOT / "launch" / "cpu.yaml"), "--main_process_port", str(_free_port())]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    zero = [*accelerate, "--use_deepspeed", "--num_processes", "2", "--main_process_port", str(_free_port())]
    commands = {  # name: launcher, engine
        "torchrun": (torchrun, "accelerate"),
        "accelerate": ([*accelerate, *yaml, "--num_processes", "2"], "accelerate"),
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
