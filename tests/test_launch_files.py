"""The files of launch/: what the scripts do at every end of a job, and that the manifests fit what they are for."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
STUBS = {
    # hands its command on, and signals, as srun does for one task
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nSLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo node0; else echo "$@" >> requeued; fi',
    # a rank: writes that it is there, ends with $CODE, or with 75 at a signal
    "python": "trap 'sleep .3; exit 75' USR1 TERM\ntrap 'sleep .3; exit 130' INT\n"
    'echo $RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT "$@" > started\n'
    'if [ "$CODE" ]; then exit $CODE; fi\nfor i in $(seq 200); do sleep .05; done',
    # a launcher such as torchrun: dies of USR1, passes TERM and INT on, knows no exit code but 1; $WAITS: for others
    "launcher": "trap 'kill -TERM $rank' TERM\ntrap 'kill -INT $rank' INT\n"
    '(trap - INT; exec "$@") & rank=$!\nwait $rank; wait $rank; code=$?\n'
    'if [ $code -eq 138 ]; then exit 138; fi\necho $code > "$ESOL_EXIT_FILE"\n'
    'if [ "$WAITS" ]; then trap "" TERM; mkfifo waiting; exec 3<>waiting; read -u 3; fi\n[ $code -eq 0 ] || exit 1',
}


@pytest.fixture
def start(tmp_path: Path):
    """Starts a script of launch/ among stubs of what it calls, and waits until its rank has started."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def started(*command: str, code: str = "", **env: str) -> subprocess.Popen[str]:
        given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": code, **env}
        process = subprocess.Popen(["bash", *command], cwd=tmp_path, env=os.environ | given, text=True)
        deadline = time.monotonic() + 20
        while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return process

    return started


@pytest.mark.parametrize(
    ("sent", "code", "restarts", "ends", "requeued"),
    [
        ("USR1", "", "0", 75, True),  # preempted, or the time is nearly up
        ("", "75", "0", 75, False),  # scancel: TERM goes to the ranks, and no USR1 comes here
        ("", "0", "0", 0, False),
        ("", "2", "0", 2, False),
        ("", "70", "0", 70, True),
        ("", "70", "10", 70, False),
        ("", "1", "0", 1, False),
    ],
)
def test_slurm_requeues_what_can_go_on(
    tmp_path: Path, start, sent: str, code: str, restarts: str, ends: int, requeued: bool
) -> None:
    process = start(
        str(LAUNCH / "slurm.sbatch"), "--config", "a b.yaml", code=code, SLURM_JOB_ID="7", SLURM_JOB_NODELIST="node0",
        SLURM_NTASKS="16", SLURM_NTASKS_PER_NODE="8", SLURM_RESTART_COUNT=restarts,
    )  # fmt: skip
    if sent:
        process.send_signal(getattr(signal, f"SIG{sent}"))
    assert process.wait(20) in ((75, 138) if sent else (ends,))
    assert (tmp_path / "started").read_text() == "0 16 node0:20007 esol/train.py --resume --config a b.yaml\n"
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_a_slurm_array_is_a_run_for_each_seed(tmp_path: Path, start) -> None:
    process = start(
        str(LAUNCH / "slurm.sbatch"), "--config", "c.yaml", code="0", SLURM_JOB_ID="8", SLURM_JOB_NODELIST="node0",
        SLURM_NTASKS="1", SLURM_ARRAY_TASK_ID="3",
    )  # fmt: skip
    assert process.wait(20) == 0
    assert (tmp_path / "started").read_text() == "0 1 node0:20008 esol/train.py --resume --config c.yaml --set seed=3\n"


@pytest.mark.parametrize(
    ("sent", "code", "ends"), [("USR1", "", 75), ("TERM", "", 75), ("INT", "", 130), ("", "2", 2), ("", "0", 0)]
)
def test_entrypoint_ends_with_the_ranks_code(start, sent: str, code: str, ends: int) -> None:
    process = start(str(LAUNCH / "entrypoint.sh"), "launcher", "python", code=code)
    if sent:
        process.send_signal(getattr(signal, f"SIG{sent}"))
    assert process.wait(20) == ends


def test_entrypoint_ends_a_launcher_that_waits_for_other_machines_alone(start) -> None:
    """As torchrun does in its exit barrier, for 300 s, where another machine's was killed; TERM does not end that."""
    process = start(str(LAUNCH / "entrypoint.sh"), "launcher", "python", code="0", WAITS="1", ESOL_LAUNCHER_SECONDS="1")
    assert process.wait(20) == 0


def test_entrypoint_lets_a_second_command_run(tmp_path: Path, start) -> None:
    command = "launcher python; launcher sleep 4; touch second"
    process = start(str(LAUNCH / "entrypoint.sh"), "bash", "-c", command, code="0", ESOL_LAUNCHER_SECONDS="1")
    assert process.wait(20) == 0
    assert (tmp_path / "second").exists()


def test_kubernetes_manifest() -> None:
    """Against the API's own schemas; and that its command is one that this repository understands."""
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    (container,) = pod["containers"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert {rule["onExitCodes"]["containerName"] for rule in job["spec"]["podFailurePolicy"]["rules"][::2]} == {"esol"}
    options = dict(part.split("=", 1) for part in container["command"] if part.startswith("--") and "=" in part)
    assert int(options["--nnodes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert (ROOT / options["--config"]).exists()
    assert os.access(ROOT / container["command"][0], os.X_OK)
    validator = pytest.importorskip("kubernetes_validate", reason="make test-cluster installs the validator (108 MB)")
    for document in (service, job):
        validator.validate(document, max(validator.VERSIONS) if hasattr(validator, "VERSIONS") else "1.34", strict=True)


def test_dockerfile_copies_what_is_there() -> None:
    text = (LAUNCH / "Dockerfile").read_text()
    instructions = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {name for name, _ in instructions} <= {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}
    for name, rest in instructions:
        if name == "COPY":
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources), rest
    (entry,) = re.findall(r'^ENTRYPOINT \["(.+)"\]$', text, re.MULTILINE)
    assert os.access(ROOT / entry, os.X_OK)


def test_the_page_names_every_file_and_no_other() -> None:
    page = (LAUNCH / "README.md").read_text()
    files = {path.name for path in LAUNCH.iterdir()} - {"README.md"}
    assert files <= set(re.findall(r"launch/([\w.-]+\w)", page))
    for mentioned in re.findall(r"launch/([\w.-]+\w)", page):
        assert (LAUNCH / mentioned).exists(), mentioned
