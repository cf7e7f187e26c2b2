"""Windows of large photos: what they cover, and that nobody notices them."""

from __future__ import annotations

import pytest
import torch
from test_localize import image
from test_segment import deeplab
from torch import Tensor

from esol.models.regrid import scale_to_grid
from esol.ops import tiles
from esol.ops.segmentation import blended, logits_by_scale


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SIDE", 128)
    monkeypatch.setattr(tiles, "MARGIN", 32)


@pytest.mark.parametrize("size", [(128, 90), (159, 1), (160, 300), (1000, 517), (2047, 127)])
def test_every_pixel_is_kept_once_a_margin_inside_its_window(size: tuple[int, int]) -> None:
    seen = torch.zeros(size, dtype=torch.int64)
    for part in tiles.tiles(*size):
        seen[part.kept] += 1
        for length, window, kept, inner in zip(size, part.window, part.kept, part.inner, strict=True):
            assert 0 <= window.start <= kept.start < kept.stop <= window.stop <= length
            assert kept.start - window.start >= (32 if window.start else 0)
            assert window.stop - kept.stop >= (32 if window.stop < length else 0)
            assert window.stop - window.start < 128 + tiles.STEP
            assert (inner.start, inner.stop) == (kept.start - window.start, kept.stop - window.start)
    assert bool((seen == 1).all())


@pytest.mark.parametrize(("stride", "patches"), [(8, 0), (16, 0), (16, 1)])
def test_windows_say_what_the_whole_says_where_the_network_looks_no_farther_than_the_margin(
    stride: int, patches: int
) -> None:
    torch.manual_seed(0)
    # padded as convolutions are, or a patch stem, whose grid has no last cell
    size, padding = (stride, 0) if patches else (31, 15)
    net = torch.nn.Conv2d(3, 5, size, stride, padding).requires_grad_(False)

    def network(x: Tensor) -> dict[str, Tensor]:
        return {"a": net(x / 255), "b": x[:, :, ::stride, ::stride][:, :, : len(x[0, 0]) // stride]}

    photo, heard = image(2, 330, 475), list[str]()
    for factor in (0.5, 1.0, 1.3):
        found = tiles.on_grids(network, photo, [factor] * 2, stride, heard.append)
        whole = network(scale_to_grid(photo, factor, stride))
        for i, own in enumerate(found):
            torch.testing.assert_close(own["a"], whole["a"][i], atol=1e-4, rtol=0)
            torch.testing.assert_close(own["b"], whole["b"][i], atol=2e-2, rtol=0)
    assert heard[:2] == ["scale 0.5, window 1 of 6", "scale 0.5, window 2 of 6"]


def test_a_part_of_the_enlarged_logits_is_that_part_of_the_whole() -> None:
    torch.manual_seed(0)
    net, photo = deeplab().eval(), image(1, 90, 70)
    for combine in ("mean", "max"):
        [found] = logits_by_scale(photo, net, scales=(0.75, 1.0), combine=combine)
        whole = blended(found, (90, 70), combine)
        part = blended(found, (90, 70), combine, (slice(13, 64), slice(0, 41)))
        torch.testing.assert_close(part, whole[:, 13:64, :41])
