"""Do Expansion and Shrinkage do what the paper says? The tables of benchmarks/ABLATIONS.md.

    ESOL_WEIGHTS=weights python -m benchmarks.ablations --config configs/voc-animals.yaml --seeds 0 1 2

classify runs once per seed, in the pipeline; then every chain below is trained and scored on remembered features
(benchmarks/frozen_line.py). What is there already, in run_dir/ablations, is not done again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.chains import Chain, Lab, classify, decide, expand, longer, readout, scales, shrink, together
from benchmarks.common import machine, table
from benchmarks.frozen_line import REACH, Evidence
from benchmarks.main_line import arguments, spread

CAM, LONGER, CLIP, EXPAND = "CAM", "CAM, as many steps more", "clipping alone", "Expansion"
SHRINK, ALONE, READ = "Expansion, Shrinkage", "Shrinkage alone", "CAM, trained on with Shrinkage's loss"
STILL = expand(duration="0 steps", clip=0.0)  # an Expansion that is the CAM network
CONTROLS: dict[str, Chain] = {
    CAM: (),
    LONGER: (longer,),
    READ: (readout(),),
    CLIP: (expand(duration="0 steps"),),
    EXPAND: (expand(),),
    SHRINK: (expand(), shrink()),
    ALONE: (STILL, shrink()),
}
DECIDE = {"area_term": "decide", "area": 2.0, "clip": 0.3, "lr": 0.005, "duration": "390 steps"}
ONLY_V = {"area_term": "decide", "area": 2.0, "clip": 0.3, "lr": 0.05, "duration": "390 steps", "learn_kernel": False}
POINTS: dict[str, dict[str, Chain]] = {
    "bound r of Expansion": {f"r {r:g}": (expand(bound=r),) for r in (0.5, 2.0, 4.0)},
    "classes whose loss is maximised": {"present": (expand(classes="present"),)},
    "steps of Expansion (alpha x steps x lr is one budget)": {
        f"{n} steps": (expand(duration=f"{n} steps"),) for n in (25, 50, 200)
    },
    "clipping beta": {f"beta {b:g}": (expand(clip=b),) for b in (0.0, 0.1, 0.3, 0.5)},
    "where clipping sits": {
        "in the maps alone": (expand(clip=0.0, maps_clip=0.2),),
        "in the loss alone": (expand(maps_clip=0.0),),
    },
    "W1 and V meanwhile": {
        "learn, alpha 0.3 (game)": (expand(game=True, alpha=0.3, lr=0.02, momentum=0.9),),
        "learn, offsets stay (alpha 0)": (expand(game=True, alpha=0.0, lr=0.02, momentum=0.9),),
    },
    "what is maximised": {
        "positions": (expand(regions=0),),
        "3 x 3 regions": (expand(regions=3),),
    },
    "kernel W1": {
        "none (no Expansion is possible)": (classify(0),),
        **{
            f"{n} channels, {what}": (classify(n), *steps)
            for n in (64, 256, 512)
            for what, steps in (("CAM", ()), (EXPAND, (expand(),)))
        },
    },
    "area term of Shrinkage": {
        "decide, lambda 2, clip 0.3, 390 steps at lr 0.005": (expand(), shrink(**DECIDE)),
        "the same, no Expansion": (STILL, shrink(**DECIDE)),
        "the same, mean": (expand(), shrink(**DECIDE | {"area_term": "mean"})),
    },
    "Shrinkage's loss without its sampler": {
        "Expansion, V learns": (expand(), readout(**ONLY_V)),
        "V learns, no Expansion": (STILL, readout(**ONLY_V)),
        "two rounds: Expansion, V learns": (expand(), readout(**ONLY_V), expand(), readout(**ONLY_V)),
    },
    "stage decide: W1 and V learn before Expansion": {
        "decide": (decide(),),
        "decide, Expansion": (decide(), expand()),
        "decide, Expansion, Shrinkage": (decide(), expand(), shrink(**DECIDE)),
        "decide, Expansion, V learns": (decide(), expand(), readout(**ONLY_V)),
    },
    "Shrinkage after Expansion": {
        "area 0": (expand(), shrink(area=0.0)),
        "area 0.3": (expand(), shrink(area=0.3)),
        "no clip": (expand(), shrink(clip=0.0)),
        "W2 fixed": (expand(), shrink(learn_kernel=False)),
        "W2 starts as identity": (expand(), shrink(kernel="identity")),
        "V fixed": (expand(), shrink(learn_classifier=False)),
        "in the same steps as Expansion": (together,),
    },
    "scales of inference": {
        f"{name}, scales {', '.join(map(str, chosen))}": (*steps, scales(*chosen))
        for chosen in ((1.0,), (0.5, 1.0, 1.5, 2.0))
        for name, steps in ((CAM, ()), (EXPAND, (expand(),)), (SHRINK, (expand(), shrink())))
    },
}


@dataclass
class Found:
    """What is read from a chain's Evidence; all in percent, classes' mean over the foreground but for mIoU."""

    miou: float
    threshold: float
    precision: NDArray[np.float64]  # (T,), by rising threshold
    recall: NDArray[np.float64]
    area: float  # under precision over recall
    reach: NDArray[np.float64]  # (T, bins, 2): claimed share of objects and of background, by distance
    thresholds: NDArray[np.float32]

    def recall_at(self, threshold: float) -> float:
        return float(self.recall[self._at(threshold)])

    def precision_at(self, threshold: float) -> float:
        return float(self.precision[self._at(threshold)])

    def recall_at_precision(self, precision: float) -> float:
        """The highest recall among thresholds of at least this precision, linear between them."""
        rising = np.maximum.accumulate(self.precision)
        return float(np.interp(precision, rising, self.recall))

    def precision_at_recall(self, recall: float) -> float:
        return float(np.interp(recall, self.recall[::-1], self.precision[::-1]))

    def reached(self, threshold: float) -> NDArray[np.float64]:
        return self.reach[self._at(threshold)]

    def _at(self, threshold: float) -> int:
        return int(np.abs(self.thresholds - threshold).argmin())


def read(evidence: Evidence) -> Found:
    curve = evidence.curve
    scores = curve.scores()
    best = curve.best()
    precision = np.array([s.precision[1:] for s in scores])
    recall = np.array([s.recall[1:] for s in scores])
    areas = []
    for p, r in zip(precision.T, recall.T, strict=True):
        p = np.maximum.accumulate(np.nan_to_num(np.append(p, np.nan), nan=0.0))  # of thresholds up to each
        r = np.append(r, 0.0)
        areas.append(np.sum((r[:-1] - r[1:]) * (p[:-1] + p[1:]) / 2))
    above = evidence.reach[..., ::-1].cumsum(2)[..., ::-1][..., 1:]
    share = above / np.maximum(evidence.reach.sum(2, keepdims=True), 1)
    return Found(
        100 * best.miou,
        best.threshold,
        100 * _mean(precision),
        100 * _mean(recall),
        100 * float(np.mean(areas)),
        100 * share.transpose(2, 0, 1),
        curve.thresholds,
    )


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the classes that have a value; 1 without any: where nothing is claimed nothing is wrong."""
    known = ~np.isnan(values)
    return np.where(known.any(1), np.nansum(values, 1) / np.maximum(known.sum(1), 1), 1.0)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--points",
        nargs="*",
        default=list(POINTS),
        choices=list(POINTS),
        metavar="POINT",
        help="open points beside the controls, all unless said: " + ", ".join(f"'{p}'" for p in POINTS),
    )
    args = parser.parse_args()
    chains = dict(CONTROLS)
    chains |= {f"{point}: {name}": chain for point in args.points for name, chain in POINTS[point].items()}
    found: dict[str, list[Found]] = {name: [] for name in chains}
    for seed in args.seeds:
        lab = Lab(args.config, seed, args.overrides, chains)
        for name in chains:
            found[name].append(read(lab.evidence(name)))
        lab.close()
    print(f"\n{machine()}\n{args.config} {' '.join(args.overrides)}, seeds {args.seeds}\n")
    print(tables(found, args.points))


def tables(found: dict[str, list[Found]], points: list[str]) -> str:
    cams = found[CAM]

    def row(name: str, *columns: Callable[[Found, Found], float]) -> list[str]:
        pairs = list(zip(found[name], cams, strict=True))
        return [name, *(spread([column(own, cam) for own, cam in pairs]) for column in columns)]

    def miou(own: Found, cam: Found) -> float:
        return own.miou

    def gain(own: Found, cam: Found) -> float:
        return own.miou - cam.miou

    def area(own: Found, cam: Found) -> float:
        return own.area

    parts = ["### RQ1: does Expansion recover the whole object?\n"]
    columns = (
        miou,
        gain,
        lambda own, cam: own.threshold,
        lambda own, cam: own.recall_at(cam.threshold),
        lambda own, cam: own.precision_at(cam.threshold),
        lambda own, cam: own.recall_at_precision(cam.precision_at(cam.threshold)),
        area,
    )
    heads = ("", "mIoU", "over the CAM", "threshold", "recall at the CAM's threshold", "precision there")
    rows = [row(name, *columns) for name in (CAM, LONGER, CLIP, EXPAND)]
    parts.append(table((*heads, "recall at the CAM's precision", "area under the curve"), rows))
    parts.append("\nClaimed share of objects / of background by distance from the CAM's peak (1 = root of the area)\n")
    heads = tuple(f"{low:g}-{high:g}" for low, high in zip((0.0, *REACH), (*REACH, float("inf")), strict=True))
    rows = []
    for name, threshold in ((CAM, "the CAM's"), (EXPAND, "the CAM's"), (CLIP, "its own"), (EXPAND, "its own")):
        shares = [
            own.reached(cam.threshold if threshold == "the CAM's" else own.threshold)
            for own, cam in zip(found[name], cams, strict=True)
        ]
        mean = np.mean(shares, 0)
        rows.append([f"{name}, at {threshold} threshold", *(f"{a:.1f} / {b:.1f}" for a, b in mean)])
    parts.append(table(("", *heads), rows))

    parts.append("\n### RQ2: does Shrinkage prune background?\n")
    own_recall = [f.recall_at(f.threshold) for f in found[EXPAND]]

    def precision_at_expansions(name: str) -> str:
        return spread([f.precision_at_recall(r) for f, r in zip(found[name], own_recall, strict=True)])

    rows = []
    for name in (CAM, LONGER, READ, EXPAND, SHRINK, ALONE):
        fixed = [spread([f.precision_at_recall(r) for f in found[name]]) for r in (50.0, 70.0, 80.0, 90.0)]
        rows.append([*row(name, miou, gain, area), precision_at_expansions(name), *fixed])
    heads = ("", "mIoU", "over the CAM", "area under the curve", "precision at the recall of Expansion's best")
    parts.append(table((*heads, *(f"at recall {r}" for r in (50, 70, 80, 90))), rows))

    if points:
        parts.append("\n### Open points, one changed at a time but where a row names more\n")
        rows = []
        for point in points:
            base = SHRINK if "Shrinkage" in point else EXPAND
            named = {f"**{point}**: as configured ({base})": base}
            named |= {name: f"{point}: {name}" for name in POINTS[point]}
            for said, name in named.items():
                rows.append([said, *row(name, miou, gain, area)[1:], precision_at_expansions(name)])
        heads = ("", "mIoU", "over the CAM", "area under the curve", "precision at the recall of Expansion's best")
        parts.append(table(heads, rows))
    return "\n".join(parts)


if __name__ == "__main__":
    main()
