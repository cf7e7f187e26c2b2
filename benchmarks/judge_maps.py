"""What the judge says of every head's class maps, and what drawn masks say of the same photos: does it take the best?

    python -m benchmarks.judge_maps RUN...

RUN: runs whose photos have drawn masks and whose heads are trained, such as those that benchmarks.transfer leaves. The
judge never sees the drawn masks; mIoU with background is that of the seeds with the CRF, at each photo's own threshold.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import machine, table
from esol.config import MapsConfig, MaskConfig
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.samples import decode_mask
from esol.data.transforms import decode
from esol.engines.ranks import precision_of
from esol.ops.class_maps import class_maps
from esol.ops.metrics import confusion_matrix, score
from esol.ops.pseudo_labels import pseudo_masks
from esol.pipeline.cam import ran_with_maps, trained_heads
from esol.pipeline.likeness import likeness, parted
from esol.report.judge import Evidence, rank_maps
from esol.stages.localize import SAMPLED

HEADINGS = ("run", "maps", "judge", "contrast", "normalised cut", "mIoU")


@torch.no_grad()
def rows(run_dir: Path) -> list[list[object]]:
    """One line for each head's maps, by SAMPLED photos that have a label and a drawn mask."""
    config = ran_with_maps(run_dir)
    torch.set_num_threads(config.engine.threads or torch.get_num_threads())
    index = Index.load(config.data.root)
    reader, heads = ShardReader(index), trained_heads(config, len(index.classes)).eval()
    ordinals = np.union1d(index.split(config.data.mask_split), index.split(config.data.score_split))
    drawn = [o for o in ordinals.tolist() if reader.labels(o).any() and index.members["mask.png"][o, 0] >= 0]
    chosen = [drawn[i] for i in np.unique(np.linspace(0, len(drawn) - 1, SAMPLED).astype(int))]
    maps, kind = config.section(MapsConfig), precision_of(config.engine.precision, torch.device("cpu"))
    evidence = defaultdict(lambda: Evidence.empty(len(index.classes)))
    cut, against = defaultdict(float), defaultdict(int)
    for ordinal in chosen:
        image, labels = decode(reader.image(ordinal), reader.name(ordinal)), torch.from_numpy(reader.labels(ordinal))
        truth = decode_mask(reader.read(ordinal, "mask.png"), reader.name(ordinal))
        with torch.autocast("cpu", kind, enabled=kind is not None):
            alike = likeness(heads.net.backbone, image)
            made = class_maps(image[None], labels[None], heads, scales=maps.scales, flip=maps.flip)[0]
        for source, own in made.items():
            [(_, mask)] = pseudo_masks([image], [own.full], [own.classes], MaskConfig())
            evidence[source].add(image.numpy(), mask.numpy(), own.classes.tolist())
            cut[source] += parted(alike, mask) / len(chosen)
            against[source] += confusion_matrix(truth, mask.numpy(), len(index.classes) + 1)
    numbers = {source: own.numbers(index.classes) for source, own in evidence.items()}
    judged = rank_maps({source: own["judge"] for source, own in numbers.items()}, cut)
    name, found = f"{run_dir.parent.name}/{run_dir.name}", []
    for source, own in numbers.items():
        measured = (f"{value:.3f}" for value in (judged[source], own["contrast"], cut[source]))
        found.append([name, source, *measured, f"{100 * score(against[source]).miou:.1f}"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    lines = [line for run in parser.parse_args().runs for line in rows(run)]
    print(f"{machine()}\n\n{table(HEADINGS, lines)}")


if __name__ == "__main__":
    main()
