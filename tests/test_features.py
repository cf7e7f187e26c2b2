"""Features of crops on disk: what was kept is found again, bit by bit, and nothing else is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from esol.data.features import FeatureStore, clear, used

SHAPE = (4, 2, 3)
CROPS = np.array([7, 3, 12])


def features(count: int, kind: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0)).to(kind)


def store(folder: Path, kind: torch.dtype = torch.bfloat16, room: int = 10**6) -> FeatureStore:
    return FeatureStore(folder, SHAPE, kind, room)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_what_two_ranks_have_kept_is_found_by_all_that_come_later(tmp_path: Path, kind: torch.dtype) -> None:
    x = features(5, kind).contiguous(memory_format=torch.channels_last)
    with store(tmp_path, kind) as one, store(tmp_path, kind) as two:
        one.add(CROPS, x[:3])
        two.add(np.array([5]), x[3:4])
        two.add(np.array([0]), x[4:])
        assert one.known.tolist() == two.known.tolist() == []
    later = store(tmp_path, kind)
    assert later.known.tolist() == [0, 3, 5, 7, 12]
    found = later.get(np.array([5, 12, 7]))
    assert torch.equal(found, x[[3, 2, 0]])
    assert found.dtype == kind
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_there_is_no_more_than_the_room_and_a_batch_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    with store(tmp_path, room=3 * 24 * 2 + 24) as own:
        own.add(CROPS, features(3))
        own.add(CROPS + 20, features(3))
    assert store(tmp_path).known.tolist() == sorted(CROPS)
    assert 3 * 24 * 2 <= used(tmp_path) < 3 * 24 * 2 + 200


def test_a_part_that_a_killed_process_left_is_not_read_and_goes(tmp_path: Path) -> None:
    folder = tmp_path / "now"
    (folder).mkdir()
    with store(folder) as whole:
        whole.add(CROPS, features(3))
    killed = store(folder)
    killed.add(CROPS + 20, features(3))
    (tmp_path / "of another backbone").mkdir()
    assert store(folder).known.tolist() == sorted(CROPS)
    clear(tmp_path, "now")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["00000.bin", "00000.npy", "now"]
    (folder / "00000.bin").write_bytes(b"cut short")
    assert not len(store(folder).known)


def test_a_full_disk_ends_the_keeping_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("esol.data.features.SPARE", 2**60)
    with store(tmp_path) as own:
        own.add(CROPS, features(3))
        own.add(CROPS + 20, features(3))
    assert [record.message.split(": ")[1][:26] for record in caplog.records] == ["no more features are kept "]
    assert not len(store(tmp_path).known)
