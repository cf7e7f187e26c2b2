"""Several photos at a time: order, errors, room, and the number of threads that each computes with."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from esol.data import reader
from esol.data.index import Index
from esol.pipeline import crew
from esol.pipeline.crew import Crew


@pytest.fixture
def three() -> Iterator[Crew]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield Crew(torch.device("cpu"))
    torch.set_num_threads(before)


def test_what_is_found_comes_in_order_though_the_first_is_the_slowest(three: Crew) -> None:
    barrier = threading.Barrier(3, timeout=20)  # only three at a time get past it

    def work(item: int) -> tuple[int, int]:
        barrier.wait()
        time.sleep(0.02 * (2 - item % 3))
        return item, torch.get_num_threads()

    assert list(three.map(work, range(9))) == [(i, 1) for i in range(9)]
    assert torch.get_num_threads() == 3


def test_an_error_comes_in_its_place_and_nothing_new_begins(three: Crew) -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise ValueError("the third")
        return item

    found = []
    with pytest.raises(ValueError, match="the third"):
        found.extend(three.map(work, range(1000)))
    assert len(begun) < 50
    assert torch.get_num_threads() == 3
    assert list(three.map(int, range(4))) == [0, 1, 2, 3]  # it still works


def test_a_large_photo_computes_alone_and_with_all_threads(three: Crew) -> None:
    inside, seen, lock = [0], [], threading.Lock()

    def work(pixels: int) -> None:
        with three.room((pixels, 1)):
            with lock:
                inside[0] += pixels
                seen.append((pixels, inside[0], torch.get_num_threads()))
            time.sleep(0.01)
            with lock:
                inside[0] -= pixels

    large = crew.ROOM
    list(three.map(work, [10, 20, large, 30, 2 * large, 40]))
    for pixels, together, threads in seen:
        assert threads == (3 if pixels >= large else 1)
        assert together == pixels if pixels >= large else together < large


def test_threads_read_shards_of_which_few_stay_open(
    shard_set: Path, monkeypatch: pytest.MonkeyPatch, three: Crew
) -> None:
    monkeypatch.setattr(reader, "OPEN_FILES", 1)
    index = Index.load(str(shard_set))
    assert len(index.shards) > 2
    alone = reader.ShardReader(index)
    ordinals = [o for i in range(5) for o in range(i, len(index.keys), 5)] * 20  # from shard to shard
    together = reader.ShardReader(index)
    assert list(three.map(together.image, ordinals)) == [alone.image(o) for o in ordinals]
