"""`esol doctor` on two ranks: what it measures, and what it says of folders and shards that the ranks do not share."""

from __future__ import annotations

import shutil
from pathlib import Path

import toy
from ranks import run_ranks


def report(outcomes: list) -> tuple[str, list[int]]:
    """What rank 0 printed, and every rank's exit code."""
    assert not outcomes[1].output.strip()  # one report a job
    return outcomes[0].output, [outcome.result for outcome in outcomes]


def test_a_healthy_job(tmp_path: Path, shard_set: Path) -> None:
    text, codes = report(run_ranks(2, toy.examine, str(shard_set), [str(tmp_path)] * 2))
    for part in (
        "processes     2 on 1 machine(s)",
        "2 of 2 ranks write there",
        "all-reduce    64 MiB in",
        "photos/s decoded, the slowest rank",
    ):
        assert part in text
    assert "clocks" in text
    assert "to change" not in text
    assert codes == [0, 0]
    assert not list(tmp_path.iterdir())  # it leaves nothing behind


def test_what_is_not_shared_or_not_there_is_named_by_rank(tmp_path: Path, own_shard_set: Path) -> None:
    shutil.move(own_shard_set / "shard-000002.tar", tmp_path / "gone")
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    text, codes = report(run_ranks(2, toy.examine, str(own_shard_set), folders, "/nope.pth"))
    assert "rank 1" in text
    assert f"does not share run_dir {folders[0]}" in text
    assert "cannot read the shards" in text
    assert "shard-000002.tar is missing" in text
    assert "- segment.model.weights = /nope.pth: no such file; put torchvision's resnet50" in text
    assert codes == [1, 1]
