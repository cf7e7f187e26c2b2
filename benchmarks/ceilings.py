"""What a head on the frozen backbone could reach: trained on true masks of half the photos, scored on the other half.

    ESOL_WEIGHTS=weights python -m benchmarks.ceilings --config configs/voc-animals.yaml --seeds 0 1 2

For diagnosis: the pipeline never sees a mask. Scale 1 with flip, image labels known, the best threshold, as in
benchmarks/ablations.py at scale 1. A seed is of the head's start and of the photos' order; the backbone has none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.ablations import Found, read
from benchmarks.common import machine, table
from benchmarks.frozen_line import Evidence, FrozenLine, Photo
from benchmarks.main_line import arguments, spread
from esol import config as configuration
from esol.localize.seeds import best_class
from esol.networks import build_net
from esol.progress import progress

EPOCHS = 30  # over the photos of a fold


def main() -> None:
    args = arguments(__doc__).parse_args()
    config = configuration.load(args.config, [*args.overrides, "localize.scales=[1.0]"])
    if config.model.freeze != "all":
        raise SystemExit(f"model.freeze = {config.model.freeze}: heads are trained on features that do not change")
    net = build_net(config, 1, pretrained=True)
    with tempfile.TemporaryDirectory() as folder:
        line = FrozenLine(config, net, Path(folder), epochs=0)
    classes, width, stride = len(line.index.classes), line.backbone.channels, line.backbone.stride
    on_grid = _grid_of_truth(line.photos, classes, stride)
    found: dict[str, list[Found]] = {f"truth on the grid of stride {stride}": [on_grid]}
    hidden = config.model.kernel_channels
    for seed in args.seeds:
        for name, channels in (("V on X", 0), (f"W1 ({hidden}) and V", hidden)):
            torch.manual_seed(seed)
            found.setdefault(f"{name}, learned from true masks", []).append(
                _trained(line.photos, classes, width, channels, seed, name)
            )
    print(f"\n{machine()}\n{args.config} {' '.join(args.overrides)}, {len(line.photos)} photos, seeds {args.seeds}\n")
    rows = []
    for name, each in found.items():
        at = [(f.precision_at(f.threshold), f.recall_at(f.threshold)) for f in each]
        columns = [[f.miou for f in each], [p for p, _ in at], [r for _, r in at], [f.area for f in each]]
        rows.append([name, *map(spread, columns)])
    print(table(("", "mIoU", "precision", "recall", "area under the curve"), rows))


def _on_grid(truth: NDArray[np.uint8], classes: int, size: Sequence[int]) -> Tensor:
    """Each label's share of every cell of a grid, (1, 1 + classes, *size), background first; the void has none."""
    layers = np.stack([truth == label for label in range(classes + 1)]).astype(np.float32)
    return F.interpolate(torch.from_numpy(layers)[None], size, mode="bilinear", antialias=True, align_corners=False)


def _score(evidence: Evidence, photo: Photo, maps: Tensor) -> None:
    """Maps (classes, h, w) of any scale; those of the classes that the photo has are judged."""
    chosen = photo.labels.nonzero()[:, 0]
    full = F.interpolate(maps[None, chosen], photo.truth.shape, mode="bilinear", align_corners=True)[0]
    full = full / (full.amax((1, 2), keepdim=True) + 1e-5)
    winner, score = (t.numpy() for t in best_class(full, chosen))
    evidence.curve.update(photo.truth, winner, score)


def _grid_of_truth(photos: list[Photo], classes: int, stride: int) -> Found:
    evidence = Evidence.empty(classes)
    for photo in photos:
        size = [(side - 1) // stride + 1 for side in photo.truth.shape]
        _score(evidence, photo, _on_grid(photo.truth, classes, size)[0, 1:])
    return read(evidence)


def _trained(photos: list[Photo], classes: int, width: int, hidden: int, seed: int, name: str) -> Found:
    """Two folds; a photo a step, cross entropy over the grid against the shares of the labels in each cell."""
    order = np.random.default_rng(seed)
    evidence = Evidence.empty(classes)
    features = [next(iter(photo.features.values())) for photo in photos]
    targets = [_on_grid(p.truth, classes, x.shape[2:]) for p, x in zip(photos, features, strict=True)]
    for fold in (0, 1):
        last = nn.Conv2d(hidden or width, classes + 1, 1)
        head = nn.Sequential(nn.Conv2d(width, hidden, 3, padding=1), nn.ReLU(), last) if hidden else last
        optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=1e-2)
        own = np.arange(1 - fold, len(photos), 2)
        with progress(f"{name}, seed {seed}, fold {fold}", EPOCHS, "epochs", True) as advance:
            for epoch in range(EPOCHS):
                for i in order.permutation(own).tolist():
                    with torch.autocast("cpu", torch.bfloat16):
                        logits = head(features[i][:1])
                    loss = -(targets[i] * logits.float().log_softmax(1)).sum(1).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                advance(epoch + 1, "")
        with torch.no_grad():
            for i in range(fold, len(photos), 2):
                with torch.autocast("cpu", torch.bfloat16):
                    straight, mirrored = head(features[i]).float().chunk(2)
                logits = (straight + mirrored.flip(3))[0] / 2
                chosen = photos[i].labels.nonzero()[:, 0]
                known = torch.cat((logits[:1], logits[1:][chosen])).softmax(0)
                maps = torch.zeros_like(logits[1:])
                maps[chosen] = known[1:]
                _score(evidence, photos[i], maps)
    return read(evidence)


if __name__ == "__main__":
    main()
