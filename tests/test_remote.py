"""What is fetched of shards behind a URL, how often it is tried, and what must never be written: over real servers."""

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.stores import Between, folder_server
from esol.base.errors import ConfigError, DataError
from esol.base.urls import secret_in
from esol.data import remote, storage
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.pipeline.config_file import from_tree
from esol.pipeline.job import run_job
from shards import cli
from shards.verify import verify


@pytest.fixture
def between(shard_set: Path) -> Iterator[Between]:
    """The fixture shard_set over HTTP, and what stands between."""
    with folder_server(shard_set) as upstream, Between(upstream) as between:
        yield between


def once(fault: str) -> Callable[[str, str], str]:
    """That fault for the first request of a shard, and none later."""
    seen = threading.Event()

    def of(method: str, path: str) -> str:
        if seen.is_set() or not path.endswith(".tar"):
            return ""
        seen.set()
        return fault

    return of


@pytest.mark.parametrize(("wanted", "requests"), [((1, 2, 3), 1), ((0, 1, 5), 2), ((0, 2, 4, 6), 1), (range(7), 1)])
def test_of_a_shard_the_wanted_samples_are_fetched_or_all_of_it(
    between: Between,
    shard_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: tuple[int, ...],
    requests: int,
) -> None:
    """Runs of neighbours are one request each; where they would not save half of the shard, it comes whole."""
    monkeypatch.setattr(remote, "NEAR", 1100)  # of these small photos; the padding and header between two are less
    plain, index = ShardReader(Index.load(shard_set)), Index.load(between.url)
    between.take()
    readers = [ShardReader(index, str(tmp_path), np.array(wanted)) for _ in range(2)]
    for ordinal in wanted:
        assert readers[0].image_and_labels(ordinal)[0] == plain.image(ordinal)
        assert readers[0].read(ordinal, "mask.png") == plain.read(ordinal, "mask.png")
    spec, fetched = index.shards[0], between.take()
    assert len(fetched) == requests
    received = sum(request.received for request in fetched)
    assert received == spec.bytes if len(wanted) > 3 else received < spec.bytes / 2
    assert [readers[1].image(o) for o in wanted] == [plain.image(o) for o in wanted]
    assert between.take() == []  # another process of the node finds them in the cache
    assert readers[0].image(20) == plain.image(20)  # wanted by nobody: read, and not kept
    assert readers[0].image(20) == plain.image(20)
    assert [request.received for request in between.take()] == 2 * [len(plain.image(20))]
    assert len(list(tmp_path.rglob("*.tar"))) == 1
    (kept,) = tmp_path.rglob("*.tar")
    damaged = bytearray(kept.read_bytes())
    damaged[index.members["jpg"][wanted[1], 0]] ^= 1
    kept.write_bytes(damaged)
    assert readers[1].image(wanted[1]) == plain.image(wanted[1])  # noticed, and fetched anew
    assert len(between.take()) == requests


def test_one_shard_is_fetched_ahead_of_its_reader_and_no_more(
    between: Between, shard_set: Path, tmp_path: Path
) -> None:
    reader = ShardReader(Index.load(between.url), str(tmp_path))

    def fetched(count: int) -> None:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.rglob("*.tar"))) < count and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)  # for one too many
        assert len(list(tmp_path.rglob("*.tar"))) == count

    between.take()
    reader.ahead([3, 0, 3, 1, 2, 4, 5, 6, 7])
    fetched(1)
    assert [request.path for request in between.requests] == ["/shard-000003.tar"]
    plain = ShardReader(Index.load(shard_set))
    for ordinal, count in ((21, 2), (0, 3), (22, 3), (55, 4), (7, 5)):
        assert reader.image(ordinal) == plain.image(ordinal)
        fetched(count)
    reader.ahead([])
    assert reader.image(14) == plain.image(14)
    fetched(5)  # the first one has ended
    assert max(Counter(request.path for request in between.take()).values()) == 1


def test_a_shard_that_failed_ahead_is_not_tried_as_long_again_by_its_reader(
    between: Between, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "TRIES", 3)
    monkeypatch.setattr(storage, "PAUSE", 0.1)
    reader, asked = ShardReader(Index.load(between.url), str(tmp_path)), threading.Event()

    def fail(method: str, path: str) -> str:
        asked.set()
        return "503"

    between.fault = fail
    between.take()
    reader.ahead([0])
    asked.wait(30)
    with pytest.raises(DataError, match="tried 3 times"):
        reader.image(0)
    assert len(between.take()) == 3


@pytest.mark.parametrize("fault", ["503", "drop", "stall", "damage"])
def test_a_fault_that_passes_is_got_over(
    between: Between, shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(storage, "PAUSE", 0.01)
    monkeypatch.setattr(storage, "ANSWER", 0.5)
    monkeypatch.setattr(storage, "SLOWEST", 1 << 24)
    index = Index.load(between.url)
    between.fault = once(fault)
    reader = ShardReader(index, str(tmp_path))
    assert reader.image(0) == ShardReader(Index.load(shard_set)).image(0)
    between.fault = once(fault)
    index.check_files()
    between.fault = once(fault)
    if fault != "damage":  # which is what verify is there to say
        assert verify(between.url) == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("503", r"cannot be fetched: 503, .*; tried 2 times in \d+ s"),
        ("drop", r"cannot be fetched: .*; tried 2 times in \d+ s"),
        ("stall", r"cannot be fetched: no whole answer within \d+ s; tried 2 times in \d+ s"),
        (
            "damage",
            r": two fresh copies hold other bytes than were indexed: the object in the store is not the one that",
        ),
    ],
)
def test_a_fault_that_stays_is_an_error_that_says_how_often_it_was_tried(
    between: Between, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    monkeypatch.setattr(storage, "TRIES", 2)
    monkeypatch.setattr(storage, "PAUSE", 0.01)
    monkeypatch.setattr(storage, "ANSWER", 0.5)
    monkeypatch.setattr(storage, "SLOWEST", 1 << 24)
    index = Index.load(between.url)
    between.fault = lambda method, path: fault
    if fault == "503":  # of which fsspec says that the file is missing
        with pytest.raises(DataError, match=rf"^cannot reach {between.url}/shard-\d+\.tar: 503.*tried 2 times"):
            index.check_files()
    with pytest.raises(DataError, match=rf"^{between.url}/shard-000000\.tar{'' if fault == 'damage' else ' '}{words}"):
        ShardReader(index, str(tmp_path)).image(0)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tar", ".tmp")]


SECRETS = (
    "http://me:hunter2@127.0.0.1:1/set",
    "https://127.0.0.1:1/set?X-Amz-Signature=hunter2",
    "s3://key:hunter2@bucket/set",
    "https://127.0.0.1:1/set#hunter2",
    "sftp://me:hunter2@127.0.0.1/a@b",
)


@pytest.mark.parametrize("url", SECRETS)
def test_a_url_that_holds_a_secret_is_refused_and_not_repeated(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["create", "synthetic", "--out", url], ["verify", url], ["export", url, "--out", str(tmp_path)]):
        assert cli.main(command) == 2
        said = "".join(capsys.readouterr())
        assert "the credentials in the environment" in said
        assert "hunter2" not in said
    here = str(tmp_path / "run")
    for run_dir, root, words in ((url, here, "must be a local folder"), (here, url, "the credentials in the environ")):
        with pytest.raises((ConfigError, DataError), match=words) as caught:
            run_job(from_tree({"run_dir": run_dir, "data": {"root": root}}))
        assert "hunter2" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["abfs://box@account.dfs.core.windows.net/set", "s3://bucket/a:b@c", "data/a?b:c@d"])
def test_other_urls_hold_no_secret(url: str) -> None:
    assert secret_in(url) == ("", url)


def test_a_login_for_http_comes_from_the_environment(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [Path(sys.executable).parent / "esol-shards", "verify"]
    with folder_server(shard_set, "Basic bWU6aHVudGVyMg==") as url:
        assert "401" in subprocess.run([*command, url], capture_output=True, text=True).stdout
        monkeypatch.setenv("FSSPEC_HTTP", '{"client_kwargs": {"headers": {"Authorization": "Basic bWU6aHVudGVyMg=="}}}')
        assert "56 images" in subprocess.run([*command, url], capture_output=True, text=True).stdout
