"""Shards made by several processes: the same bytes as by one, the same answers, and an end whatever happens to them."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fsspec
import pytest

from esol.base import machine
from esol.base.errors import DataError
from shards import writer
from shards.samples import Reads, Source
from shards.synthetic import synthetic_source
from shards.writer import create

KEYS = [f"k{number}" for number in range(20)]
BEFORE = "7598c297fe511dfe2cad25706092c17ce5a1e3c6ba2143a05ce54223bd93b1b4"  # by 3d33a13, when threads made them


def sample(key: str, number: int) -> dict[str, bytes]:
    about = json.dumps({"labels": ["a"] if number % 2 else ["b"], "height": 1, "width": number}).encode()
    return {"__key__": key, "jpg": key.encode() * number, "json": about}  # type: ignore[dict-item]


def damaged(bad: tuple[int, ...], key: str, number: int) -> dict[str, bytes]:
    if number in bad:
        raise DataError(f"{key}.jpg: unreadable image")
    return sample(key, number)


def killed(key: str, number: int) -> dict[str, bytes]:
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return sample(key, number)


def full(key: str, number: int) -> dict[str, bytes]:
    raise OSError(28, "No space left on device", "scratch")


def source(work: Callable[[str, int], dict[str, bytes]] = sample) -> Source:
    items = {key: number for number, key in enumerate(KEYS)}
    return Source(("a", "b"), {"train": KEYS[:15], "val": KEYS[10:]}, Reads(work, items))


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of any size are made by processes."""
    monkeypatch.setattr(writer, "WORTH", 0)


def digest(files: dict[str, bytes]) -> str:
    return hashlib.sha256(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_bytes_and_the_census_do_not_depend_on_how_many_make_them(
    tmp_path: Path, spread: None, workers: int
) -> None:
    census, dropped = create(source(), str(tmp_path), 6, seed=3, workers=workers)
    assert digest(contents(tmp_path)) == BEFORE
    assert (dict(census.labelled), dropped) == ({"a": 10, "b": 10}, [])


def test_masks_are_counted_across_processes(tmp_path: Path, spread: None) -> None:
    scenes = synthetic_source(30, 6, 32)
    alone, _ = create(scenes, str(tmp_path / "one"), 5, workers=1)
    several, _ = create(scenes, str(tmp_path / "two"), 5, workers=2)
    assert several.lines() == alone.lines()
    assert several.masks == 36
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_store_gets_what_processes_make(spread: None) -> None:
    create(source(), "memory://spread", 6, seed=3, workers=2)
    memory = fsspec.filesystem("memory")
    files = {Path(name).name: memory.cat_file(name) for name in memory.ls("/spread", detail=False)}
    memory.rm("/spread", recursive=True)
    assert digest(files) == BEFORE


def test_all_problems_are_listed_and_dropped_on_demand(tmp_path: Path, spread: None) -> None:
    faulty = source(partial(damaged, (2, 7, 17)))
    with pytest.raises(DataError, match=r"3 images cannot be used(.|\n)*k17(.|\n)*k2(.|\n)*k7.*unreadable image$"):
        create(faulty, str(tmp_path / "out"), 4, workers=2)
    assert not (tmp_path / "out/index.json").exists()
    for workers in (1, 2):
        _, dropped = create(faulty, str(tmp_path / str(workers)), 4, workers=workers, drop_damaged=True)
        assert dropped == [f"{key}.jpg: unreadable image" for key in ("k17", "k2", "k7")]
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_killed_process_and_a_full_disk_are_errors_that_say_so(tmp_path: Path, spread: None) -> None:
    with pytest.raises(DataError, match=r"one of the 2 processes that make shards was killed, perhaps for want of mem"):
        create(source(killed), str(tmp_path / "killed"), 4, workers=2)
    with pytest.raises(DataError, match=r"cannot write to .*: No space left on device \(scratch\)"):
        create(source(full), str(tmp_path / "full"), 4, workers=2)
    assert not list(tmp_path.rglob("index.json"))
    assert not multiprocessing.active_children()


def test_ctrl_c_is_said_once_and_leaves_no_process_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shards", "create", "synthetic", "--train", "20000", "--size", "32"]
    command += ["--samples-per-shard", "10", "--out", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        while not list(tmp_path.glob("*.tar")):
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said = process.stderr.read()  # until the last one that could write there is gone
    assert process.returncode == 130
    assert said.count("interrupted: nothing was finished") == 1
    assert "Traceback" not in said


def test_a_part_of_a_source_reads_the_same_wherever_it_is_taken_to() -> None:
    scenes = synthetic_source(6, 2, 32)
    assert isinstance(scenes.read, Reads)
    part = pickle.loads(pickle.dumps(scenes.read.part(["val_000001"])))
    assert part("val_000001") == scenes.read("val_000001")
    assert len(part.items) == 1


def test_a_source_of_a_plain_function_is_read_by_threads(tmp_path: Path, spread: None) -> None:
    create(dataclasses.replace(source(), read=lambda key: sample(key, int(key[1:]))), str(tmp_path), 6, 3, workers=2)
    assert digest(contents(tmp_path)) == BEFORE


def test_cores_are_those_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = len(os.sched_getaffinity(0))
    monkeypatch.setattr(machine, "_QUOTA", tmp_path / "cpu.max")
    for quota, cores in (("max", bound), ("100000", 1), ("10000", 1), ("9000000000", bound)):
        (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
        assert machine.cores() == cores
