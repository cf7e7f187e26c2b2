"""Judging masks without any truth: by the photo's labels, by its edges, and by what other stages say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from esol.base.palette import VOID
from esol.ops.metrics import Counts, confusion_matrix, score

FILLED = 0.995  # share of a photo that a class has to cover to count as filling it
# What masks of equal contrast are worth against the seeds': edges say nothing of whether the object is whole, and a
# grid of stride 8 follows fewer of them (benchmarks/RESULTS.md)
WORTH = {"vote_masks": 1.05, "psa_masks": 1.3}
FINE = 10**6  # contrasts and cuts are counted in millionths: whole numbers add up alike in any order
_LEAST = 1e-12  # of a sum of cuts: masks may part nothing at all

Label = NDArray[np.uint8]


def boundary_contrast(image: Label, mask: Label) -> float:
    """How much colours change where the mask changes, over how much they change anywhere: image (3, H, W), mask (H, W).

    Steps are sums over the channels of |differences| between neighbours. 1 is what a mask that knows nothing of the
    photo has, and what a mask without any boundary counts as.
    """
    wide = image.astype(np.int16)
    across, down = np.abs(np.diff(wide, axis=2)).sum(0), np.abs(np.diff(wide, axis=1)).sum(0)
    edge_across, edge_down = np.diff(mask.astype(np.int16), axis=1) != 0, np.diff(mask.astype(np.int16), axis=0) != 0
    edges, steps = int(edge_across.sum() + edge_down.sum()), across.size + down.size
    everywhere = (float(across.sum()) + float(down.sum())) / max(steps, 1)
    if not edges or not everywhere:
        return 1.0
    return (float(across[edge_across].sum()) + float(down[edge_down].sum())) / edges / everywhere


def rank_maps(judged: Mapping[str, float], cuts: Mapping[str, float]) -> dict[str, float]:
    """The number by which the maps of several sources are ranked, given what Evidence.numbers says of their masks.

    cuts: source -> what its masks part of what is alike (normalised cuts, summed over photos); it counts as a share of
    the first source's, so that the numbers stay on the scale of contrast.
    """
    first = next(iter(cuts.values()), 0)
    return {source: number * max(first, _LEAST) / max(cuts[source], _LEAST) for source, number in judged.items()}


@dataclass
class Evidence:
    """What the masks of a stage show of photos with a label, in whole numbers that add up over photos and processes.

    lost and filled: photos by class (C,) that the class has no pixel of, or all of; labelled: photos by class; photos,
    contrast (sum, in millionths), void and pixels: of all photos; agreement: pixels by the label of the seeds and by
    that of the mask, void as background.
    """

    labelled: Counts
    lost: Counts
    filled: Counts
    totals: Counts
    agreement: Counts

    @classmethod
    def empty(cls, classes: int) -> Evidence:
        """Of no photo."""
        labelled, lost, filled, totals = (np.zeros(size, np.int64) for size in (classes, classes, classes, 4))
        return cls(labelled, lost, filled, totals, np.zeros((classes + 1, classes + 1), np.int64))

    @classmethod
    def of(cls, tally: Mapping[str, Counts]) -> Evidence:
        """What `tally` made, summed over shards."""
        return cls(**{f.name: tally[f"judge_{f.name}"] for f in fields(cls)})

    def tally(self) -> dict[str, Counts]:
        """The counts, as an inference stage keeps them of every shard."""
        return {f"judge_{f.name}": getattr(self, f.name) for f in fields(self)}

    def add(
        self, image: Label, mask: Label, classes: Sequence[int], lost: Sequence[int] = (), seeds: Label | None = None
    ) -> None:
        """One photo: its mask (H, W) of labels, the classes that it is labelled with, the seeds (H, W).

        lost: classes that the stage had lost before others' pixels stood in for it.
        """
        if not len(classes):
            return  # a photo without any object has no mask to be judged
        area = np.bincount(mask.ravel(), minlength=256)
        for c in classes:
            self.labelled[c] += 1
            self.lost[c] += c in lost or not area[c + 1]
            self.filled[c] += area[c + 1] > FILLED * mask.size
        self.totals += (1, round(FINE * boundary_contrast(image, mask)), int(area[VOID]), mask.size)
        if seeds is not None:
            said = np.where(mask == VOID, np.uint8(0), mask)
            self.agreement += confusion_matrix(seeds, said, len(self.agreement))

    def numbers(self, names: Sequence[str], stage: str = "") -> dict[str, float]:
        """judge, contrast, and lost, filled, void and agreement in percent; lost and filled by class where there are.

        judge, by which stages are ranked: contrast * (1 - x^2) * WORTH[stage], x the share of labels that are lost or
        fill their photo: a few are small objects, many are a stage astray. Nothing where no photo has a label.
        """
        photos, contrast, void, pixels = self.totals.tolist()
        if not photos:
            return {}
        labelled, lost, filled = (int(x.sum()) for x in (self.labelled, self.lost, self.filled))
        mean = contrast / FINE / photos
        found = {
            "judge": mean * (1 - ((lost + filled) / labelled) ** 2) * WORTH.get(stage, 1),
            "contrast": mean,
            "lost": 100 * lost / labelled,
            "filled": 100 * filled / labelled,
            "void": 100 * void / pixels,
        }
        if self.agreement.any():
            found["agreement"] = 100 * score(self.agreement).miou
        for what, counts in (("lost", self.lost), ("filled", self.filled)):
            some = np.flatnonzero(counts)
            found |= {f"{what}_{names[c]}": 100 * int(counts[c]) / int(self.labelled[c]) for c in some.tolist()}
        return found
