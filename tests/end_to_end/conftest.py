"""One whole tiny run that the tests of this folder look at."""

from pathlib import Path

import pytest
from tiny import PLAIN, TINY, launch


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, shard_set: Path) -> Path:
    path = tmp_path_factory.mktemp("main_line") / "tiny.yaml"
    path.write_text(f"run_dir: runs/one\n{TINY}".replace("data: {", f"data: {{root: {shard_set}, "))
    return path


@pytest.fixture(scope="session")
def one(config: Path) -> Path:
    """The run directory of one process."""
    done = launch(PLAIN, config)
    assert done.returncode == 0, done.stderr
    return config.parent / "runs/one"
