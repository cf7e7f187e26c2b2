"""What a head on the frozen backbone could reach: trained on true masks of half the photos, scored on the other half.

    ESOL_WEIGHTS=weights python -m research.ceilings --config configs/voc-animals.yaml --seeds 0 1 2

For diagnosis: the pipeline never sees a mask. Scale 1 with flip, image labels known, the best threshold, as in
research/ablations.py at scale 1. A seed is of the head's start and of the photos' order; the backbone has none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import machine, table
from benchmarks.main_line import arguments, spread
from esol.base.progress import progress
from esol.ops.seeds import best_class
from esol.pipeline import config_file
from esol.pipeline.cam import new_net
from research.ablations import Found, read
from research.frozen_line import Evidence, FrozenLine, Photo

EPOCHS = 30  # over the photos of a fold


def main() -> None:
    args = arguments(__doc__).parse_args()
    config = config_file.load(args.config, [*args.overrides, "localize.scales=[1.0]"])
    if config.model.freeze != "all":
        raise SystemExit(f"model.freeze = {config.model.freeze}: heads are trained on features that do not change")
    net = new_net(config, 1, pretrained=True)
    with tempfile.TemporaryDirectory() as folder:
        line = FrozenLine(config, net, Path(folder), steps=0)
        samples = [Sample.of(photo, line) for photo in line.photos]
    found = {f"truth on the grid of stride {line.backbone.stride}": [_scored((s, s.shares[0, 1:]) for s in samples)]}
    hidden = config.model.kernel_channels
    for seed in args.seeds:
        for name, channels in (("V on X", 0), (f"W1 ({hidden}) and V", hidden)):
            each = found.setdefault(f"{name}, learned from true masks", [])
            each.append(_scored(_trained(samples, channels, seed, name)))
    print(f"\n{machine()}\n{args.config} {' '.join(args.overrides)}, {len(line.photos)} photos, seeds {args.seeds}\n")
    rows = []
    for name, each in found.items():
        at = [(f.precision_at(f.threshold), f.recall_at(f.threshold)) for f in each]
        columns = [[f.miou for f in each], [p for p, _ in at], [r for _, r in at], [f.area for f in each]]
        rows.append([name, *map(spread, columns)])
    print(table(("", "mIoU", "precision", "recall", "area under the curve"), rows))


@dataclass
class Sample:
    """A photo, its features X at scale 1 with flip (2, Cf, h, w), and each label's share of every cell of their grid.

    shares: (1, 1 + classes, h, w), background first; the void has none.
    """

    photo: Photo
    features: Tensor
    shares: Tensor

    @classmethod
    def of(cls, photo: Photo, line: FrozenLine) -> Sample:
        features = next(iter(photo.features.values())).to(line.device, memory_format=torch.channels_last, copy=True)
        layers = np.stack([photo.truth == label for label in range(len(line.index.classes) + 1)]).astype(np.float32)
        size = features.shape[2:]
        shares = F.interpolate(torch.from_numpy(layers)[None], size, mode="bilinear", antialias=True)
        return cls(photo, features, shares.to(line.device))


def _scored(maps: Iterable[tuple[Sample, Tensor]]) -> Found:
    """Maps (classes, h, w) of any scale, each with its photo; those of the classes that the photo has are judged."""
    evidence: Evidence | None = None
    for sample, own in maps:
        evidence = evidence or Evidence.empty(len(own))
        photo, chosen = sample.photo, sample.photo.labels.nonzero()[:, 0]
        full = F.interpolate(own[None].cpu()[:, chosen], photo.truth.shape, mode="bilinear", align_corners=True)[0]
        full = full / (full.amax((1, 2), keepdim=True) + 1e-5)
        winner, score = (t.numpy() for t in best_class(full, chosen))
        evidence.curve.update(photo.truth, winner, score)
    assert evidence is not None
    return read(evidence)


def _trained(samples: list[Sample], hidden: int, seed: int, name: str) -> Iterator[tuple[Sample, Tensor]]:
    """Two folds; a photo a step, cross entropy over the grid against the shares; probabilities of the other fold."""
    torch.manual_seed(seed)
    order = np.random.default_rng(seed)
    width, labels, device = samples[0].features.shape[1], samples[0].shares.shape[1], samples[0].features.device
    for fold in (0, 1):
        last = nn.Conv2d(hidden or width, labels, 1)
        head = nn.Sequential(nn.Conv2d(width, hidden, 3, padding=1), nn.ReLU(), last) if hidden else last
        head.to(device)
        optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=1e-2)
        learning, judged = samples[1 - fold :: 2], samples[fold::2]
        with progress(f"{name}, seed {seed}, fold {fold}", EPOCHS, "epochs", True) as advance:
            for epoch in range(EPOCHS):
                for i in order.permutation(len(learning)).tolist():
                    with torch.autocast(device.type, torch.bfloat16):
                        logits = head(learning[i].features[:1])
                    loss = -(learning[i].shares * logits.float().log_softmax(1)).sum(1).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                advance(epoch + 1, "")
        with torch.no_grad():
            for sample in judged:
                with torch.autocast(device.type, torch.bfloat16):
                    straight, mirrored = head(sample.features).float().chunk(2)
                logits = (straight + mirrored.flip(3))[0] / 2
                known = torch.cat((torch.tensor([True]), sample.photo.labels > 0)).to(device)
                yield sample, logits.masked_fill(~known[:, None, None], -torch.inf).softmax(0)[1:]


if __name__ == "__main__":
    main()
