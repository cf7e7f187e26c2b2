"""Two machines (network namespaces) train the demo on both engines, as one process does: make test-cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from benchmarks.nodes import Nodes

pytestmark = [
    pytest.mark.skipif(os.environ.get("ESOL_CLUSTER") != "1", reason="needs root and minutes: make test-cluster"),
    pytest.mark.timeout(1500),
]
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STAGES = "classify,expand,shrink,localize"
SHORT = (
    "classify.duration=10 steps",
    "classify.optimizer=sgd",
    "classify.lr=0.05",
    "expand.duration=5 steps",
    "shrink.duration=5 steps",
    "engine.timeout=2",
)
TORCHRUN = [
    str(BIN / "torchrun"), "--nnodes=2", "--nproc-per-node=1", "--node-rank={node}", "--master-addr=node0",
    "--master-port=29500",
]  # fmt: skip
ACCELERATE = [
    str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / "launch/gpu-nodes.yaml"), "--num_machines=2",
    "--num_processes=2", "--machine_rank={node}", "--main_process_ip=node0", "--main_process_port=29500",
]  # fmt: skip
DEEPSPEED = [
    str(BIN / "deepspeed"), "--hostfile", str(ROOT / "launch/hostfile"), "--no_ssh", "--node_rank={node}",
    "--master_addr=node0", "--master_port=29500", "--num_gpus=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's shards."""
    root = tmp_path_factory.mktemp("demo") / "data"
    subprocess.run([str(BIN / "esol-shards"), "create", "synthetic", "--out", str(root)], check=True)
    return root


@pytest.fixture(scope="module")
def one(demo: Path) -> Path:
    """The run directory of one process."""
    run_dir = demo.parent / "one"
    subprocess.run([sys.executable, *train(demo, run_dir)], check=True, cwd=demo.parent)
    return run_dir


def train(data: Path, run_dir: Path, *more: str) -> list[str]:
    overrides = (*SHORT, f"data.root={data}", f"run_dir={run_dir}", "tracking.uri=none", "engine.threads=1")
    options = [part for text in overrides for part in ("--set", text)]
    config = ["--config", str(ROOT / "configs/demo.yaml"), "--stages", STAGES]
    return [str(ROOT / "esol/train.py"), *config, *options, *more]


@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        (TORCHRUN, []),
        (ACCELERATE, []),
        (DEEPSPEED, ["--engine", "deepspeed", "--set", "engine.deepspeed.zero=2"]),
        (TORCHRUN, ["--engine", "deepspeed", "--set", "engine.deepspeed.zero=3"]),
    ],
    ids=["torchrun", "accelerate", "deepspeed", "torchrun-deepspeed"],
)
def test_two_nodes_agree_with_one_process(
    one: Path, demo: Path, tmp_path: Path, launcher: list[str], engine: list[str]
) -> None:
    env = os.environ | {"DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    command = [*launcher, *train(demo, tmp_path / "two", *engine)]
    with Nodes(tmp_path) as nodes:
        sent = nodes.sent(0)
        launchers = [
            nodes.start(
                node, [part.format(node=node) for part in command], env, cwd=tmp_path, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for node in (0, 1)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=600)[0] for process in launchers]
        sent = nodes.sent(0) - sent
    assert [process.returncode for process in launchers] == [0, 0], "\n".join(outputs)
    assert sent > 1e6  # gradients did cross the cable
    for stage in ("classify", "expand", "shrink"):
        ours, theirs = (load_file(folder / stage / "model.safetensors") for folder in (one, tmp_path / "two"))
        worst = max(float(abs(ours[key] - theirs[key]).max()) for key in ours)
        print(f"{stage}: weights differ by {worst:.1e} at most")
        assert worst < 1e-5, stage
    a, b = (json.loads((folder / "results.json").read_text()) for folder in (one, tmp_path / "two"))
    for key in ("cam_miou", "expand_miou", "shrink_miou"):
        assert a["localize"][key] == pytest.approx(b["localize"][key], abs=0.2)
