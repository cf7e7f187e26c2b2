"""One whole tiny run that the tests of this folder look at."""

import os
import shutil
from pathlib import Path

import pytest
from tiny import PLAIN, TINY, launch

from esol.base.files import hold


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, shard_set: Path) -> Path:
    path = tmp_path_factory.mktemp("main_line") / "tiny.yaml"
    path.write_text(f"run_dir: runs/one\n{TINY}".replace("data: {", f"data: {{root: {shard_set}, "))
    return path


@pytest.fixture(scope="session")
def one(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one process. Of several workers of pytest-xdist one makes it, and the others copy it."""
    runs = config.parent / "runs"
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _make(config)
        return runs / "one"
    shared = tmp_path_factory.getbasetemp().parent / "runs"
    with hold(shared.with_suffix(".lock"), 300):
        if shared.exists():
            shutil.copytree(shared, runs)
        else:
            _make(config)
            shutil.copytree(runs, shared)
    return runs / "one"


def _make(config: Path) -> None:
    done = launch(PLAIN, config)
    assert done.returncode == 0, done.stderr
