"""Shard sets that several test files read."""

import shutil
from pathlib import Path

import pytest

from shards.synthetic import synthetic_source
from shards.writer import create


@pytest.fixture(scope="session")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 + 8 synthetic scenes of 64 pixels in 8 shards, not to be changed."""
    root = tmp_path_factory.mktemp("shards")
    create(synthetic_source(48, 8, 64, seed=0), str(root), samples_per_shard=7)
    return root


@pytest.fixture
def own_shard_set(shard_set: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(shard_set, tmp_path / "shards"))
