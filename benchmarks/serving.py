"""What `mlflow models serve` holds with many clients at once: photos a second, how long they wait, memory.

python -m benchmarks.serving MODEL --photos FOLDER [--clients 50] [--seconds 30]

MODEL: a folder that esol export wrote; it is served as docs/segment.md says, on 127.0.0.1, by a server of its own for
each setting. Clients are threads of another process, on the same cores; each sends one photo, made no larger than SIDE
pixels, waits for its mask, and sends the next. Memory is the resident memory of the command and all its children.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from benchmarks.common import machine, table

SIDE, PHOTOS = 320, 100  # pixels of the long side; different photos that are sent in turn
LIMIT = "64"  # requests at once, as docs/segment.md has it
WAIT = 120  # seconds until the server has to answer
SETTINGS = {"full quality": {}, "fast": {"params": {"fast": True}}}


@contextmanager
def served(model: Path) -> Iterator[tuple[int, int]]:
    """The documented command as a process of its own, once it answers: its process id and port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "mlflow"), "models", "serve", "-m", str(model / "mlflow")]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # the model's own code, no other
    own |= {"UVICORN_LIMIT_CONCURRENCY": LIMIT, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"}
    with open(os.devnull, "wb") as nothing:
        server = subprocess.Popen(command, cwd=model, env=own, stdout=nothing, stderr=nothing, start_new_session=True)
    try:
        deadline = time.monotonic() + WAIT
        while not answers(port):
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{' '.join(command)}: no answer in {WAIT} s, or it ended; call it yourself to see why")
            time.sleep(0.2)
        yield server.pid, port
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
        with suppress(ProcessLookupError):  # requests that nobody waits for any more
            os.killpg(server.pid, signal.SIGKILL)


def answers(port: int) -> bool:
    """Whether the server is there."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ping")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def clients(port: int, bodies: list[bytes], count: int, seconds: float) -> list[tuple[float, float, int]]:
    """Of every request of `count` threads: when it ended, how long it took, in seconds, and its status, 0 for none."""
    began = time.monotonic()

    def one(number: int) -> list[tuple[float, float, int]]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
        found = []
        for body in islice(cycle(bodies), number, None):
            sent = time.monotonic()
            if sent - began >= seconds:
                connection.close()
                return found
            try:
                connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                response.read()
                status = response.status
            except (OSError, http.client.HTTPException):
                connection.close()
                status = 0
            found.append((time.monotonic() - began, time.monotonic() - sent, status))
        return found

    with ThreadPoolExecutor(count) as pool:
        return [request for own in pool.map(one, range(count)) for request in own]


def used(server: int) -> tuple[float, float]:
    """Resident memory in MiB and processor seconds of a process and all that it started."""
    pages, ticks, waiting = 0, 0, [server]
    while waiting:
        place = Path("/proc", str(waiting.pop()))
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split()  # from the third on
            waiting += [int(pid) for task in place.glob("task/*/children") for pid in task.read_text().split()]
        except OSError:  # it has just ended
            continue
        ticks, pages = ticks + int(fields[11]) + int(fields[12]), pages + int(fields[21])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def watched(server: int) -> Iterator[list[float]]:
    """Resident memory in MiB, ten times a second as long as it is entered."""
    seen, over = [used(server)[0]], threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            seen.append(used(server)[0])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def measured(model: Path, bodies: list[bytes], count: int, seconds: float) -> list[object]:
    """A row of the table."""
    with served(model) as (server, port), ProcessPoolExecutor(1, get_context("spawn")) as other:
        other.submit(clients, port, bodies, 4, 5).result()
        before = used(server)
        with watched(server) as seen:
            requests = other.submit(clients, port, bodies, count, seconds).result()
        spent = used(server)[1] - before[1]
    good = sorted(took for _, took, status in requests if status == 200)
    if not good:
        sys.exit(f"no request was answered; statuses: {sorted({status for *_, status in requests})}")
    rate = sum(ended <= seconds and status == 200 for ended, _, status in requests) / seconds
    waited = [good[len(good) // 2], good[min(len(good) - 1, len(good) * 99 // 100)], good[-1]]
    return [rate, *waited, len(requests) - len(good), spent / len(good), round(before[0]), round(max(seen))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=30)
    args = parser.parse_args()
    photos = []
    for path in sorted(path for path in args.photos.iterdir() if path.is_file())[:PHOTOS]:
        with Image.open(path) as photo:
            photo.thumbnail((SIDE, SIDE))
            photo.convert("RGB").save(made := io.BytesIO(), "JPEG", quality=90)
        photos.append(base64.b64encode(made.getvalue()).decode())
    rows = []
    for name, own in SETTINGS.items():
        sent = [{"dataframe_split": {"columns": ["image"], "data": [[photo]]}} | own for photo in photos]
        bodies = [json.dumps(one).encode() for one in sent]
        rows.append([name, *measured(args.model.resolve(), bodies, args.clients, args.seconds)])
        print(rows[-1], file=sys.stderr, flush=True)
    print(f"\n{machine()}\n{args.clients} clients, {args.seconds:g} s, {len(photos)} photos of {SIDE} pixels\n")
    waits = ("median wait, s", "99 % within, s", "longest, s")
    memory = ("memory when warm, MiB", "highest, MiB")
    print(table(["", "photos/s", *waits, "errors", "server's processor s a photo", *memory], rows))


if __name__ == "__main__":
    main()
