"""Locks between processes, and file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esol.base.errors import ConfigError, DataError
from esol.base.files import hold, holder, writable
from esol.data.index import Index
from esol.data.reader import ShardReader

HOLDER = "import sys; from pathlib import Path; from esol.base.files import hold\nlock = hold(Path(sys.argv[1]), 0)\n"


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
    with hold(tmp_path / "another", 0) as lock:
        assert not lock.unlocked
    process.kill()
    hold(path, 5).close()
    assert holder(path) == holder(tmp_path / "nowhere") == ""
    assert subprocess.run([sys.executable, "-c", HOLDER, str(path)], check=False).returncode == 0


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_not_a_lock_of_somebody_else(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with hold(tmp_path / "lock", patience=0) as lock, hold(tmp_path / "lock", patience=0):
        assert lock.unlocked == os.strerror(code)


def test_the_cache_of_shards_without_locks_or_room(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several processes may fetch at once there: each keeps to its own temporary file."""

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    index = Index.load(f"file://{shard_set}")
    here = ShardReader(Index.load(str(shard_set)))
    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert ShardReader(index, str(tmp_path / "cache")).image(0) == here.image(0)
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache: cannot write .*/file/.*: Not a directory; give a folder"):
        ShardReader(index, str(tmp_path / "file")).image(0)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(DataError, match=r"no home folder; set data\.cache"):
        ShardReader(index).image(0)

    def taken(*arguments: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(fcntl, "lockf", taken)
    monkeypatch.setattr("esol.data.remote.DOWNLOAD_MINUTES", 0)
    with pytest.raises(DataError, match="waited 0 minutes for a process that has not said its name to fetch file://"):
        ShardReader(index, str(tmp_path / "other")).image(0)


def test_a_run_directory_that_cannot_be_one(tmp_path: Path) -> None:
    writable(tmp_path / "new" / "run")
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    refused = {
        tmp_path / "file": "file is a file",
        tmp_path / "file" / "run": "file is a file",
        tmp_path / "dangling": "dangling is a link to nowhere, no folder",
        tmp_path / ("x" * 300): "File name too long",
        tmp_path / "a\0b": "null",
    }
    for path, reason in refused.items():
        with pytest.raises(ConfigError, match=f"run_dir = .*{reason}.*; set it to a folder"):
            writable(path)
