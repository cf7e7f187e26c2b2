"""Stage irn_mean: the mean displacement of IRNet, taken out of what it predicts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from esol.base.files import atomic_write
from esol.deploy.segmenter import WEIGHTS
from esol.models.irn_net import STRIDE
from esol.models.regrid import on_grid
from esol.networks import trained_irn_net
from esol.pipeline.context import Context, Results
from esol.pipeline.inference import Members, Tally, over_shards, photo


@torch.no_grad()
def irn_mean(context: Context, folder: Path) -> Results:
    """Mean displacement over the photos that IRNet learned from, whatever masks are made for; hands over the network.

    results: dy, dx in grid pixels (stride 4), the mean over the photos of each photo's mean.
    """
    net = trained_irn_net(context.config).to(context.engine.device).eval()

    def work(ordinals: NDArray[np.int64], tally: Tally) -> Iterator[tuple[int, Members]]:
        total = np.zeros(3)  # dy, dx, photos
        for ordinal in map(int, ordinals):
            image = photo(context, ordinal)
            with context.engine.autocast():
                displacement = net(on_grid(image.to(context.engine.device), STRIDE))[1]
            total += (*displacement[0].double().mean((1, 2)).tolist(), 1)
            yield ordinal, {}
        tally["sum"] = total

    split = context.config.data.mask_split
    dy, dx, photos = over_shards(context, "irn_mean", folder, (split,), work, writes=False)["sum"].tolist()
    net.displacement_mean.copy_(torch.tensor((dy, dx)) / photos)
    if context.engine.is_main:
        state = {key: value.cpu().contiguous() for key, value in net.state_dict().items()}
        atomic_write(folder / WEIGHTS, save(state))
    return {"dy": dy / photos, "dx": dx / photos}
