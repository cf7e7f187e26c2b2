"""Locks between processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from esol.files import hold, holder

HOLDER = "import sys; from pathlib import Path; from esol.files import hold\nlock = hold(Path(sys.argv[1]), 0)\n"


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    wait = HOLDER + "print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", wait, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(TimeoutError, match=f"process {process.pid} on {os.uname().nodename}"):
        hold(path, 0.3)
    assert holder(path).startswith(f"process {process.pid} on {os.uname().nodename} since 20")
    process.kill()
    hold(path, 5).close()
    assert holder(path) == holder(tmp_path / "nowhere") == ""
    assert subprocess.run([sys.executable, "-c", HOLDER, str(path)], check=False).returncode == 0
