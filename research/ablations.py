"""Do Expansion and Shrinkage do what the paper says? The tables of benchmarks/ABLATIONS.md.

    ESOL_WEIGHTS=weights python -m research.ablations --config configs/voc-animals.yaml --seeds 0 1 2

classify runs once per seed, in the pipeline; then every chain below is trained and scored on remembered features
(research/frozen_line.py). What is there already, in run_dir/ablations, is not done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import machine, table
from benchmarks.main_line import arguments, spread
from esol.ops.metrics import ThresholdCurve
from research.chains import (
    Chain,
    Lab,
    classify,
    decide,
    expand,
    expand_each,
    further,
    longer,
    readout,
    shrink,
    together,
)
from research.frozen_line import REACH, Evidence

CAM, LONGER, CLIP, EXPAND = "CAM", "CAM, as many steps more", "clipping alone", "Expansion"
SHRINK, ALONE = "Expansion, Shrinkage of the mean", "Shrinkage of the mean alone"
READ = "CAM, trained on with that loss"
DECIDED, WHOLE, ALL = "decide", "decide, Expansion", "decide, Expansion, Shrinkage"
SHRUNK = "decide, Shrinkage, no Expansion"
ALL_DECIDES, SHRUNK_DECIDES = f"{ALL} that decides", "decide, Shrinkage that decides, no Expansion"
STILL = expand(duration="0 steps", clip=0.0)  # an Expansion that moves and clips nothing
# Shrinkage's own settings without decide before it; the area is the mean, which is all that the paper says of it
MEAN = {"area_term": "mean", "area": 0.1, "clip": 0.2, "lr": 0.02, "duration": "250 steps"}
CONTROLS: dict[str, Chain] = {
    CAM: (),
    LONGER: (longer,),
    READ: (readout(**MEAN),),
    CLIP: (expand(duration="0 steps"),),
    EXPAND: (expand(),),
    SHRINK: (expand(), shrink(**MEAN)),
    ALONE: (STILL, shrink(**MEAN)),
    DECIDED: (decide(),),
    WHOLE: (decide(), expand()),
    ALL: (decide(), expand(), shrink()),
    SHRUNK: (decide(), STILL, shrink()),
    ALL_DECIDES: (decide(), expand(), shrink(area_term="decide")),
    SHRUNK_DECIDES: (decide(), STILL, shrink(area_term="decide")),
}
LATE = {"area_term": "decide", "area": 2.0, "clip": 0.3, "lr": 0.005, "duration": "390 steps"}
ONLY_V = {"area_term": "decide", "area": 2.0, "clip": 0.3, "lr": 0.05, "duration": "390 steps", "learn_kernel": False}
STEPS = "steps of Expansion (alpha x steps x lr is one budget)"
# Each point stands beside the configured chain: up to Shrinkage where the point's name has it, else up to Expansion
POINTS: dict[str, dict[str, Chain]] = {
    "deciding in Shrinkage instead of before": {
        "Expansion, Shrinkage": (expand(), shrink(**LATE)),
        "Shrinkage, no Expansion": (STILL, shrink(**LATE)),
        "Expansion, Shrinkage, the mean instead": (expand(), shrink(**LATE | {"area_term": "mean"})),
    },
    "deciding after Expansion without a second sampler": {
        "Expansion, V learns": (expand(), readout(**ONLY_V)),
        "V learns, no Expansion": (STILL, readout(**ONLY_V)),
        "two rounds: Expansion, V learns": (expand(), readout(**ONLY_V), expand(), readout(**ONLY_V)),
    },
    "Shrinkage that decides once more as strongly": {
        "Shrinkage, lambda 2, clip 0.3, 390 steps": (decide(), expand(), shrink(**LATE)),
        "V learns, no sampler": (decide(), expand(), readout(**ONLY_V)),
    },
    "decide": {
        "lambda 2": (decide(area=2.0), expand()),
        "no clip": (decide(clip=0.0), expand()),
        "clip 0.2": (decide(clip=0.2), expand()),
    },
    "bound r of Expansion": {f"r {r:g}": (decide(), expand(bound=r)) for r in (0.5, 2.0, 4.0)},
    "classes whose loss is maximised": {"present": (decide(), expand(classes="present"))},
    STEPS: {f"{n} steps": (decide(), expand(duration=f"{n} steps")) for n in (25, 50, 200, 400)},
    "clipping beta of Expansion": {f"beta {b:g}": (decide(), expand(clip=b)) for b in (0.0, 0.1, 0.3, 0.5)},
    "where Expansion clips": {
        "in the maps alone": (decide(), expand(clip=0.0, maps_clip=0.2)),
        "in the loss alone": (decide(), expand(maps_clip=0.0)),
    },
    "W1 and V during Expansion": {
        "learn, alpha 0.3 (game)": (decide(), expand(game=True, alpha=0.3, lr=0.02, momentum=0.9)),
        "learn, offsets stay (alpha 0)": (decide(), expand(game=True, alpha=0.0, lr=0.02, momentum=0.9)),
    },
    "where Expansion's loss is taken": {
        "positions": (decide(), expand(regions=0)),
        "3 x 3 regions": (decide(), expand(regions=3)),
    },
    "offset fields of Expansion": {
        "one per class": (decide(), expand_each()),
        "one per class, which sees photos of its class alone": (decide(), expand_each(classes="present")),
    },
    "kernel W1": {
        "none (no stage behind it is possible)": (classify(0),),
        **{
            f"{n} channels, {what}": (classify(n), *steps)
            for n in (64, 256, 512)
            for what, steps in ((CAM, ()), (WHOLE, (decide(), expand())))
        },
    },
    "Shrinkage after decide and Expansion": {
        "no area term": (decide(), expand(), shrink(area=0.0)),
        **{f"lambda {a:g}": (decide(), expand(), shrink(area=a)) for a in (0.3, 3.0)},
        "Expansion at beta 0.1": (decide(), expand(clip=0.1), shrink()),
        "clip 0.2": (decide(), expand(), shrink(clip=0.2)),
        "no clip": (decide(), expand(), shrink(clip=0.0)),
        "W2 fixed": (decide(), expand(), shrink(learn_kernel=False)),
        "W2 starts as identity": (decide(), expand(), shrink(kernel="identity")),
        "V fixed": (decide(), expand(), shrink(learn_classifier=False)),
        "in the same steps as Expansion": (decide(), together),
    },
    "rounds of Expansion and Shrinkage": {
        "two": (decide(), expand(), shrink(), further, shrink()),
        "one, its Expansion as long as both": (decide(), expand(duration="200 steps"), shrink()),
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
    unseen: float = float("nan")  # mIoU at the same threshold on the photos by which nothing was chosen
    losses: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))  # of Expansion's steps

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


def read(evidence: Evidence, unseen: ThresholdCurve | None = None) -> Found:
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
        100 * unseen.at(best.threshold).miou if unseen else float("nan"),
        evidence.losses,
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
    found = []
    for seed in args.seeds:
        lab = Lab(args.config, seed, args.overrides, chains)
        found.append(
            {name: read(lab.evidence(name), lab.others(name) if name in CONTROLS else None) for name in chains}
        )
        lab.close()
    print(f"\n{machine()}\n{args.config} {' '.join(args.overrides)}, seeds {args.seeds}\n")
    print(tables(found, args.points))


# Columns: heading -> what is read of a chain, given all chains of the same seed
Columns = dict[str, Callable[[Found, dict[str, Found]], float]]
MIOU: Columns = {"mIoU": lambda own, of: own.miou, "over the CAM": lambda own, of: own.miou - of[CAM].miou}
UNSEEN: Columns = {
    "mIoU of unseen photos": lambda own, of: own.unseen,
    "over the CAM there": lambda own, of: own.unseen - of[CAM].unseen,
}
AT_CAM: Columns = {
    "threshold": lambda own, of: own.threshold,
    "recall at the CAM's threshold": lambda own, of: own.recall_at(of[CAM].threshold),
    "precision there": lambda own, of: own.precision_at(of[CAM].threshold),
}
BESIDE_THE_CAM: Columns = AT_CAM | {
    "recall at the CAM's precision": lambda own, of: own.recall_at_precision(of[CAM].precision_at(of[CAM].threshold)),
}
AREA: Columns = {"area under the curve": lambda own, of: own.area}
AT_EXPANSION: Columns = {
    "precision at the recall of Expansion's best": lambda own, of: own.precision_at_recall(
        of[EXPAND].recall_at(of[EXPAND].threshold)
    )
}
AT_RECALL: Columns = {f"at recall {r}": lambda own, of, r=r: own.precision_at_recall(r) for r in (50, 70, 80, 90)}


def tables(found: list[dict[str, Found]], points: list[str]) -> str:
    """All of ABLATIONS.md's tables; found: the chains of each seed."""
    known: Columns = {} if np.isnan(found[0][CAM].unseen) else UNSEEN
    first, last = MIOU | known, AREA | AT_EXPANSION
    parts = [
        "### RQ1: does Expansion recover the whole object?\n",
        compared(found, (CAM, LONGER, CLIP, EXPAND, DECIDED, WHOLE), first | BESIDE_THE_CAM | AREA),
        "\nClaimed share of objects / of background by distance from the CAM's peak (1 = root of the area)\n",
        reached(found),
        "\n### RQ2: does Shrinkage prune background?\n",
        compared(
            found,
            (CAM, LONGER, READ, EXPAND, SHRINK, ALONE, DECIDED, WHOLE, ALL, SHRUNK, ALL_DECIDES, SHRUNK_DECIDES),
            first | last | AT_RECALL,
        ),
        "\nWhat each sampler adds, seed by seed\n",
        added(found, {name: first[name] for name in ("mIoU", *known) if name.startswith("mIoU")} | AT_EXPANSION),
    ]
    if points:
        parts.append("\n### Open points, one changed at a time but where a row names more\n")
        parts.append(opened(found, points))
    if STEPS in points:
        parts.append("\nWhen to stop Expansion: the loss that it maximises, which needs no mask, and the maps\n")
        parts.append(stopping(found))
    return "\n".join(parts)


def compared(found: list[dict[str, Found]], chains: Iterable[str | tuple[str, str]], columns: Columns) -> str:
    """A row for each chain, mean and spread over the seeds; a pair says how the row is called as well."""
    rows = []
    for chain in chains:
        said, name = (chain, chain) if isinstance(chain, str) else chain
        rows.append([said, *(spread([column(of[name], of) for of in found]) for column in columns.values())])
    return table(("", *columns), rows)


def opened(found: list[dict[str, Found]], points: list[str]) -> str:
    """The rows of each point below the configured chain that they stand beside."""
    lines: list[str] = []
    for point in points:
        base = ALL if "Shrinkage" in point else WHOLE
        chains = [(f"**{point}**: as configured ({base})", base)]
        chains += [(name, f"{point}: {name}") for name in POINTS[point]]
        beside: Columns = {"over the configured": lambda own, of, base=base: own.miou - of[base].miou}
        rows = compared(found, chains, MIOU | beside | AT_CAM | AREA | AT_EXPANSION).splitlines()
        lines += rows[2:] if lines else rows  # headings once
    return "\n".join(lines)


def added(found: list[dict[str, Found]], columns: Columns) -> str:
    """Differences of chains with and without one sampler."""
    pairs = (
        (EXPAND, CLIP),
        (WHOLE, DECIDED),
        (ALL, SHRUNK),
        (ALL_DECIDES, SHRUNK_DECIDES),
        (ALL, ALL_DECIDES),
        (SHRINK, ALONE),
        (SHRINK, EXPAND),
        (ALL, EXPAND),
        (ALL, WHOLE),
        (ALL, CAM),
    )
    rows = [
        [
            f"{after} - {before}",
            *(spread([column(of[after], of) - column(of[before], of) for of in found]) for column in columns.values()),
        ]
        for after, before in pairs
    ]
    return table(("", *columns), rows)


def stopping(found: list[dict[str, Found]]) -> str:
    """By steps of Expansion behind decide: its loss, the mean over the last 20 of them, and what the maps are worth."""
    names = [WHOLE, *(f"{STEPS}: {name}" for name in POINTS[STEPS])]
    names.sort(key=lambda name: len(found[0][name].losses))
    last = [-float(of[names[-1]].losses[0]) for of in found]
    rows = [[0, spread(last), "", *(spread([column(of[DECIDED], of) for of in found]) for column in MIOU.values())]]
    for name in names:
        loss = [-float(of[name].losses[-20:].mean()) for of in found]
        growth = [100 * (new / old - 1) for new, old in zip(loss, last, strict=True)]
        scores = (spread([column(of[name], of) for of in found]) for column in MIOU.values())
        rows.append([len(found[0][name].losses), spread(loss), spread(growth), *scores])
        last = loss
    return table(("steps", "classification loss", "more than in the row above, %", *MIOU), rows)


def reached(found: list[dict[str, Found]]) -> str:
    """What maps claim by distance from the CAM's peak, at the CAM's threshold and at each chain's own."""
    rows = []
    for whose, names in (("the CAM's", (CAM, EXPAND, DECIDED, WHOLE)), ("its own", (CLIP, EXPAND, DECIDED, WHOLE))):
        for name in names:
            shares = [of[name].reached(of[CAM if whose == "the CAM's" else name].threshold) for of in found]
            row = [f"{a:.1f} / {b:.1f}" for a, b in np.mean(shares, 0)]
            rows.append([f"{name}, at {whose} threshold", *row])
    heads = [f"{low:g}-{high:g}" for low, high in zip((0.0, *REACH), (*REACH, float("inf")), strict=True)]
    return table(("", *heads), rows)


if __name__ == "__main__":
    main()
