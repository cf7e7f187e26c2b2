"""The bookkeeping of the fault drills: what counts as failed, what is still to be run, and that the table says so."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import fault_drills
from benchmarks.fault_drills import Drill, add, missing, read, summary

ENDED = Drill(
    "worker", "deepspeed", "zero1", 0, 0, moment=3.0, bound=75.0, ended=20.5, alone=False, codes=["-", "70"],
    said="error: rank 0 lost its peers", saved=10, resumed=10, again=4, equal=True, amiss="", machine="2 cores",
)  # fmt: skip
ALONE = replace(ENDED, kind="cut-5", alone=True, said="", resumed=None, again=0)


@pytest.mark.parametrize(
    ("drill", "failed"),
    [
        (ENDED, ""),
        (ALONE, ""),
        (replace(ENDED, alone=True, resumed=None), ""),  # where it was done before the fault mattered
        (replace(ENDED, kind="half", resumed=5, said=""), ""),  # the newest checkpoint was cut short
        (replace(ENDED, ended=None), "longer than its bound"),
        (replace(ENDED, ended=75.1), "longer than its bound"),
        (replace(ALONE, ended=None), "longer than its bound"),
        (replace(ENDED, equal=False), "other weights"),
        (replace(ALONE, equal=False), "other weights"),
        (replace(ALONE, alone=False, said="error", resumed=10), "did not finish by itself"),
        (replace(ENDED, said=""), "did not say why it ended"),
        (replace(ENDED, resumed=5), "did not go on at its last checkpoint"),
        (replace(ENDED, resumed=None), "did not go on at its last checkpoint"),
        (replace(ENDED, kind="half", resumed=0), "did not go on at its last checkpoint"),
        (replace(ALONE, amiss="the second job was not refused"), "the second job was not refused"),
        (replace(ENDED, ended=None, equal=False), "longer than its bound, other weights"),
    ],
)
def test_what_counts_as_failed(drill: Drill, failed: str) -> None:
    assert drill.failed() == failed
    assert (f"- {drill.kind} 0 (zero1): {failed}" in summary([drill])) == bool(failed)
    assert summary([drill]).count(f", {int(bool(failed))} failed") == 1


def test_what_is_done_is_not_run_again_and_a_failure_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    for drill in (ENDED, replace(ENDED, number=1, ended=None, seed=1)):
        add(tmp_path / "rows", drill)
    done = read(tmp_path / "rows", "deepspeed")
    assert done == [ENDED, replace(ENDED, number=1, ended=None, seed=1)]
    assert read(tmp_path / "rows", "accelerate") == []
    todo = list(missing(done, "deepspeed", ["worker", "cut"], 4, seed=0))
    assert [(number, kind) for number, kind, _ in todo] == [
        (0, "cut"), (1, "worker"), (1, "cut"), (2, "worker"), (2, "cut"), (3, "worker"), (3, "cut"),
    ]  # fmt: skip
    assert {setting for _, kind, setting in todo if kind == "cut"} == {"zero1", "zero2", "zero3", "offload"}
    command = ["fault_drills", "--data", str(tmp_path / "data"), "--rows", str(tmp_path / "rows"), "--count", "0"]
    for seed, code in (("0", 0), ("1", 1)):
        monkeypatch.setattr(sys, "argv", [*command, "--engine", "deepspeed", "--seed", seed])
        assert fault_drills.main() == code
    assert "| kill -9 of a rank | 1 | 0 | inf | 75 | 4 | 1 of 1 | 1 |" in capsys.readouterr().out
