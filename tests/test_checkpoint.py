"""What a checkpoint folder holds after saves, damage and other configurations; several ranks: distributed/."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from esol.base.errors import CheckpointError
from esol.training.checkpoint import Checkpointer, Resumed


class Counter:
    """Of an Engine what a Checkpointer uses; its state is one number."""

    rank, world_size, is_main = 0, 1, True
    value = 0

    def snapshot(self) -> Callable[[Path], list[Path]]:
        contents = {"state.pt": f"{self.value:09}", "more.pt": "more"}

        def write(folder: Path) -> list[Path]:
            for name, text in contents.items():
                self.write(folder / name, text)
            return [folder / name for name in contents]

        return write

    def write(self, file: Path, text: str) -> None:
        file.write_text(text)

    def beat(self, doing: str) -> None:
        self.doing = doing

    def load(self, folder: Path, step: int) -> None:
        self.value = int((folder / "state.pt").read_text())

    def reduce(self, values: torch.Tensor, op: str) -> torch.Tensor:
        return values

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        return [values]


CONFIG = {"train": {"lr": 0.1, "long_side": (320, 640)}, "model": {"backbone": "small"}}


def make(folder: Path, engine: Counter, fingerprint: str = "f", config: dict = CONFIG, keep: int = 2) -> Checkpointer:
    return Checkpointer(folder, engine, fingerprint=fingerprint, config=config, keep=keep, notes={"run": "abc"})  # type: ignore[arg-type]


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Path]:
    """A folder with the checkpoints of steps 20 and 30; 10 was pruned."""
    engine = Counter()
    checkpointer = make(tmp_path, engine)
    for engine.value in (10, 20, 30):
        checkpointer.save(engine.value)
    checkpointer.finish()
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_saves_prunes_and_resumes_the_newest(saved: Path) -> None:
    assert names(saved) == ["latest", "step-20", "step-30"]
    assert (saved / "latest").read_text() == "step-30\n"
    manifest = json.loads((saved / "step-30" / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"], manifest["fingerprint"]) == (30, 1, "f")
    assert manifest["files"]["state.pt"]["bytes"] == 9
    engine = Counter()
    assert make(saved, engine).resume() == Resumed(30, {"run": "abc"}, 1)
    assert engine.value == 30


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert make(tmp_path / "new", Counter()).resume() is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", ["state.pt", "more.pt", "manifest.json"])
def test_damaged_checkpoint_is_passed_over(
    saved: Path, caplog: pytest.LogCaptureFixture, damage: Callable, name: str
) -> None:
    damage(saved / "step-30" / name)
    engine = Counter()
    checkpointer = make(saved, engine, keep=1)
    with caplog.at_level(logging.WARNING):
        assert checkpointer.resume() == Resumed(20, {"run": "abc"}, 1)
    assert engine.value == 20
    assert "step-30" in caplog.text
    checkpointer.save(25)
    checkpointer.finish()  # the damaged one must not crowd it out
    assert names(saved) == ["latest", "step-25"]


def test_all_damaged_is_an_error(saved: Path) -> None:
    for step in (20, 30):
        cut(saved / f"step-{step}" / "state.pt")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged: delete that folder"):
        make(saved, Counter()).resume()


def test_other_configuration_is_named(saved: Path) -> None:
    other = {"train": {"lr": 0.2, "long_side": [320, 512]}, "model": {"backbone": "small"}, "new": 1}
    with pytest.raises(CheckpointError, match=r"new, train\.long_side, train\.lr differ"):
        make(saved, Counter(), "g", other).resume()
    with pytest.raises(CheckpointError, match="an input differ"):
        make(saved, Counter(), "g").resume()
    assert make(saved, Counter(), "f", other).resume() is not None  # runtime fields do not count


def test_half_written_folders_of_a_killed_process_are_cleared(saved: Path) -> None:
    (saved / "step-40.tmp").mkdir()
    (saved / "step-40.tmp" / "state.pt").write_text("4")
    engine = Counter()
    checkpointer = make(saved, engine)
    assert checkpointer.resume() == Resumed(30, {"run": "abc"}, 1)
    checkpointer.save(40)
    checkpointer.finish()
    assert names(saved) == ["latest", "step-30", "step-40"]


def test_failing_engine_leaves_the_last_good_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Counter, file: Path, text: str) -> None:
        file.write_text("half")
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(Counter, "write", full)
    checkpointer = make(saved, Counter())
    checkpointer.save(40)  # a thread finds out, and the next save says so
    with pytest.raises(
        CheckpointError, match=r"step-40\.tmp/state\.pt.*No space left.*last good checkpoint is step-30"
    ):
        checkpointer.save(50)
    assert names(saved) == ["latest", "step-20", "step-30"]
    checkpointer.finish()  # it was said


def test_engine_that_cannot_copy_fails_the_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: Counter) -> None:
        raise MemoryError("no room for a copy")

    monkeypatch.setattr(Counter, "snapshot", none)
    checkpointer = make(saved, Counter())
    checkpointer.save(40)
    with pytest.raises(CheckpointError, match=r"cannot write .*step-40\.tmp: no room for a copy"):
        checkpointer.finish()
    assert names(saved) == ["latest", "step-20", "step-30"]


class Slow(Counter):
    """Writes when it is allowed to."""

    def __init__(self) -> None:
        self.allowed = threading.Event()

    def write(self, file: Path, text: str) -> None:
        assert self.allowed.wait(30)
        super().write(file, text)


def test_training_goes_on_while_a_thread_writes_what_was_then(saved: Path) -> None:
    engine, notes = Slow(), {"loss": 0.5}
    engine.value = 40
    checkpointer = Checkpointer(saved, engine, fingerprint="f", config=CONFIG, notes=notes)  # type: ignore[arg-type]
    checkpointer.save(40)
    engine.value, notes["loss"] = 41, 0.4
    assert checkpointer.writing
    assert names(saved) == ["latest", "step-20", "step-30", "step-40.tmp"]
    assert (saved / "latest").read_text() == "step-30\n"  # where a process that is killed now goes on
    engine.allowed.set()
    checkpointer.finish()
    assert not checkpointer.writing
    assert engine.doing == "the files of the checkpoint after step 40"
    assert names(saved) == ["latest", "step-30", "step-40"]
    assert make(saved, engine).resume() == Resumed(40, {"loss": 0.5}, 1)
    assert engine.value == 40


def test_a_write_without_end_is_an_error(saved: Path) -> None:
    engine = Slow()
    checkpointer = Checkpointer(saved, engine, fingerprint="f", config=CONFIG, timeout=1e-4)  # type: ignore[arg-type]
    checkpointer.save(40)
    with pytest.raises(CheckpointError, match=r"step-40\.tmp: not done 0\.0001 minutes later \(engine\.timeout\)"):
        checkpointer.finish()
    engine.allowed.set()
    assert (saved / "latest").read_text() == "step-30\n"


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot prepare .*file/step-1\.tmp"):
        make(tmp_path / "file", Counter()).save(1)
