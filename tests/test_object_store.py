"""Shard sets behind URLs, over the real protocols on loopback: S3 as moto's server speaks it, and plain HTTP."""

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from benchmarks.stores import AWS, s3_server
from esol.base.errors import DataError
from esol.config import DataConfig
from esol.data import storage
from esol.data.index import Index
from esol.data.plan import Plan, share_of
from esol.data.reader import ShardReader
from esol.data.stream import training_stream
from esol.data.transforms import Crop
from shards import cli
from shards.verify import verify

s3fs = pytest.importorskip("s3fs", reason="pip install s3fs, or the dev extra")
pytest.importorskip("moto.server", reason="pip install moto[s3], or the dev extra")

CREATE = ["create", "synthetic", "--train", "48", "--val", "8", "--size", "64", "--samples-per-shard", "7", "--out"]
TINY = """
model: {backbone: small, weights: none, output_stride: 8, freeze: none, kernel_channels: 16}
data: {score_split: val, long_side: [48, 72], crop: 48, workers: 1}
stages: [classify, localize]
classify: {duration: 2 steps, global_batch: 8, lr_batch: 8, optimizer: adamw, lr: 1e-4}
localize: {scales: [1.0], batch: 4}
engine: {threads: 1}
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An empty bucket, found and opened by environment variables alone."""
    with s3_server() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in (AWS | {"AWS_ENDPOINT_URL": url}).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def stored(bucket: str) -> str:
    """The set of the fixture shard_set, under a prefix that was new."""
    assert cli.main([*CREATE, f"{bucket}/new/prefix"]) == 0
    return f"{bucket}/new/prefix"


def test_a_new_prefix_gets_the_same_set_as_a_folder_and_keeps_it(
    stored: str, bucket: str, shard_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, place = s3fs.S3FileSystem(), stored.removeprefix("s3://")

    def files(where: str) -> dict[str, bytes]:
        return {name.rpartition("/")[2]: store.cat_file(name) for name in store.find(where, refresh=True)}

    whole = {path.name: path.read_bytes() for path in shard_set.iterdir()}
    assert files(place) == whole
    assert cli.main([*CREATE, stored]) == 2
    assert "already holds a shard set; choose another folder, or replace it with --overwrite" in capsys.readouterr().err
    assert cli.main([*CREATE, stored, "--samples-per-shard", "56", "--overwrite"]) == 0
    assert files(place).keys() == {"index.json", "shard-000000.tar"}
    assert cli.main([*CREATE, stored, "--overwrite"]) == 0
    assert files(place) == whole
    assert verify(stored) == []
    other = s3fs.S3FileSystem(skip_instance_cache=True)  # as another process
    other.pipe_file(f"{place}/shard-999999.tar", b"late")
    assert verify(stored) == ["shard-999999.tar is not in index.json"]  # listings are not remembered
    other.rm_file(f"{place}/shard-999999.tar")
    assert verify(stored) == []
    other.pipe_file("bucket/busy/creation-unfinished", b"process 7 on elsewhere since yesterday\n")
    assert cli.main([*CREATE, f"{bucket}/busy"]) == 2
    busy = "is being written by process 7 on elsewhere since yesterday: wait until it is done; if that process is dead"
    assert busy in capsys.readouterr().err
    assert cli.main([*CREATE, bucket]) == 0  # no prefix at all


def micro_batches(root: str, cache: Path, workers: int, start: int) -> list[torch.Tensor]:
    index = Index.load(root)
    ordinals = index.split("train")
    plan, share = Plan(ordinals, index.shard_of[ordinals], seed=5, global_batch=8), share_of(0, 1, 8, micro_batch=8)
    config, reader = DataConfig(root=root, workers=workers), ShardReader(index, str(cache))
    steps = training_stream(reader, plan, share, start, 6, Crop(32, (48, 80)), config, (0, 0, 0))
    return [batch["image"] for step in steps for batch in step]


def test_training_resumes_anywhere_and_fetches_each_shard_once(stored: str, shard_set: Path, tmp_path: Path) -> None:
    local = micro_batches(str(shard_set), tmp_path, 0, 0)
    for workers, start in ((1, 0), (0, 4)):
        found = micro_batches(stored, tmp_path / "cache", workers, start)
        assert all(torch.equal(a, b) for a, b in zip(found, local[start:], strict=True))
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 8


SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAISTHEKEY",
    "AWS_SECRET_ACCESS_KEY": "this/is+the+secret",
    "AWS_SESSION_TOKEN": "this/is+the+token",
}


def test_a_run_trains_and_localizes_from_a_bucket_and_gives_no_secret_away(stored: str, tmp_path: Path) -> None:
    """Logs, manifests, MLflow, the cache: no file of it holds what the environment told it."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = [Path(sys.executable).parent / "esol", "run", "--config", tmp_path / "tiny.yaml"]
    for override in (f"run_dir={tmp_path / 'run'}", f"data.root={stored}", f"data.cache={tmp_path / 'cache'}"):
        command += ["--set", override]
    done = subprocess.run(command, capture_output=True, timeout=200, env=os.environ | SECRETS)
    assert done.returncode == 0, done.stderr
    assert len(Index.load(tmp_path / "run/localize")) == 56
    written = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any(name.endswith("mlflow.db") and b"bucket" in data for name, data in written.items())
    for name, data in {**written, "stdout": done.stdout, "stderr": done.stderr}.items():
        assert not [secret for secret in SECRETS.values() if secret.encode() in data], name


class _Answer(http.server.BaseHTTPRequestHandler):
    """Always the same."""

    def __init__(self, code: int, *rest: object) -> None:
        self.code = code
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.send_response(self.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class _Folder(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def served(handler: partial) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def one_line_each(root: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """create, verify, and what training begins with."""
    if root.startswith("s3:"):
        assert cli.main([*CREATE, root]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"error: cannot write to {root}: ")
        assert words in error
        assert "\n" not in error
    (problem,) = verify(root)
    assert problem.startswith(("cannot read", f"{root}/index.json is missing"))
    with pytest.raises(DataError) as caught:
        Index.load(root)
    assert str(caught.value) == problem


def test_what_a_store_refuses_is_one_line(
    bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(storage, "TRIES", 1)
    one_line_each("s3://no-such-bucket/set", "The specified bucket does not exist", capsys)
    for code, words in ((403, "Forbidden"), (503, "Service Unavailable")):
        with served(partial(_Answer, code)) as url:
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
            s3fs.S3FileSystem.clear_instance_cache()
            one_line_each(f"{bucket}/set", words, capsys)
            one_line_each(f"{url}/set", "", capsys)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    s3fs.S3FileSystem.clear_instance_cache()
    one_line_each(f"{bucket}/set", "Unable to locate credentials", capsys)
    s3fs.S3FileSystem.clear_instance_cache()


def test_shards_are_read_over_http_without_ranges_too(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(partial(_Folder, directory=str(shard_set))) as url:
        reader = ShardReader(Index.load(url), str(tmp_path / "cache"))
        assert reader.index.hash == Index.load(shard_set).hash
        assert reader.image(3) == ShardReader(Index.load(shard_set)).image(3)
        assert verify(url) == []
        with pytest.raises(DataError, match=r"/nowhere/index\.json is missing; there is no such folder or bucket"):
            Index.load(f"{url}/nowhere")
    reader = ShardReader(reader.index, str(tmp_path / "other"))
    monkeypatch.setattr(storage, "TRIES", 1)
    with pytest.raises(DataError, match=r"shard-00000\d\.tar cannot be fetched: "):
        reader.image(3)


def test_a_set_in_a_bucket_of_google_s(shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks over gRPC, which the emulator lacks
    pytest.importorskip("gcsfs", reason="pip install 'esol[gcs]'").GCSFileSystem.clear_instance_cache()
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="pip install 'esol[gcs]'")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    with emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket"):
        assert cli.main([*CREATE, "gs://bucket/set"]) == 0
        assert verify("gs://bucket/set") == []
        assert cli.main([*CREATE, "gs://bucket/set"]) == 2
        index, plain = Index.load("gs://bucket/set"), ShardReader(Index.load(shard_set))
        index.check_files()
        assert index.hash == plain.index.hash
        for wanted in (None, np.array([1, 2])):
            reader = ShardReader(index, str(tmp_path), wanted)
            assert [reader.image(o) for o in (1, 2, 30)] == [plain.image(o) for o in (1, 2, 30)]
