"""Do Expansion and Shrinkage do what the paper says? The tables of benchmarks/ABLATIONS.md.

    ESOL_WEIGHTS=weights python -m benchmarks.ablations --config configs/voc-animals.yaml --seeds 0 1 2

classify runs once per seed, in the pipeline; then every chain below is trained and scored on remembered features
(benchmarks/frozen_line.py). What is there already, in run_dir/ablations, is not done again.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import machine, table
from benchmarks.frozen_line import REACH, Evidence, FrozenLine
from benchmarks.main_line import of_seed, run, spread
from esol import config as configuration
from esol.config import TrainConfig
from esol.data.index import Index
from esol.networks import trained_net
from esol.schema import fingerprint
from esol.tasks.classify import Classify
from esol.tasks.expand import Expand
from esol.tasks.shrink import Shrink


@dataclass(frozen=True)
class Chain:
    """What is trained behind the CAM network; fields that differ from the config's.

    longer: W1 and V are trained on for as many steps as expand and shrink have, with classify's settings;
    expand, shrink: None = not there.
    """

    longer: bool = False
    expand: dict[str, Any] | None = None
    shrink: dict[str, Any] | None = None


NONE = {"duration": "0 steps", "clip": 0.0}  # an Expansion that is the CAM network
DECIDE = {"area_term": "decide", "area": 2.0, "clip": 0.3, "lr": 0.005, "duration": "390 steps"}
FAST = DECIDE | {"lr": 0.02, "duration": "150 steps"}
CAM, LONGER, CLIP, EXPAND = "CAM", "CAM, as many steps more", "clipping alone", "Expansion"
SHRINK, ALONE = "Expansion, Shrinkage", "Shrinkage alone"
CONTROLS = {
    CAM: Chain(),
    LONGER: Chain(longer=True),
    CLIP: Chain(expand={"duration": "0 steps"}),
    EXPAND: Chain(expand={}),
    SHRINK: Chain(expand={}, shrink={}),
    ALONE: Chain(expand=NONE, shrink={}),
}
POINTS: dict[str, dict[str, Chain]] = {
    "bound r of Expansion": {f"r {r:g}": Chain(expand={"bound": r}) for r in (0.5, 2.0, 4.0)},
    "classes whose loss is maximised": {"present": Chain(expand={"classes": "present"})},
    "steps of Expansion (alpha x steps x lr is one budget)": {
        f"{n} steps": Chain(expand={"duration": f"{n} steps"}) for n in (25, 50, 200)
    },
    "clipping beta": {f"beta {b:g}": Chain(expand={"clip": b}) for b in (0.0, 0.1, 0.3, 0.5)},
    "W1 and V meanwhile": {
        "learn, alpha 0.3 (game)": Chain(expand={"game": True, "alpha": 0.3, "lr": 0.02, "momentum": 0.9}),
        "learn, offsets stay (alpha 0)": Chain(expand={"game": True, "alpha": 0.0, "lr": 0.02, "momentum": 0.9}),
    },
    "Shrinkage after Expansion": {
        "area 0": Chain(expand={}, shrink={"area": 0.0}),
        "area 0.3": Chain(expand={}, shrink={"area": 0.3}),
        "no clip": Chain(expand={}, shrink={"clip": 0.0}),
        "W2 fixed": Chain(expand={}, shrink={"learn_kernel": False}),
        "W2 starts as identity": Chain(expand={}, shrink={"kernel": "identity"}),
        "V fixed": Chain(expand={}, shrink={"learn_classifier": False}),
    },
    "area term of Shrinkage": {
        "decide, lambda 2, clip 0.3, 390 steps at lr 0.005": Chain(expand={}, shrink=DECIDE),
        "the same, no Expansion": Chain(expand=NONE, shrink=DECIDE),
        "decide, lambda 2, clip 0.3, 150 steps at lr 0.02": Chain(expand={}, shrink=FAST),
        "the same 150 steps, no Expansion": Chain(expand=NONE, shrink=FAST),
        "mean, lambda 2, clip 0.3, 390 steps at lr 0.005": Chain(expand={}, shrink=DECIDE | {"area_term": "mean"}),
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


def _steps(config: TrainConfig) -> int:
    """Of a duration in steps; also none, which the pipeline has no use for."""
    if not config.duration.endswith("steps"):
        raise SystemExit(f"duration = {config.duration}: give steps, chains are compared by them")
    return int(config.duration.split()[0])


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the classes that have a value; 1 without any: where nothing is claimed nothing is wrong."""
    known = ~np.isnan(values)
    return np.where(known.any(1), np.nansum(values, 1) / np.maximum(known.sum(1), 1), 1.0)


class Lab:
    """One seed: its classify, its remembered features, the chains that are done."""

    def __init__(self, path: str, seed: int, overrides: list[str]) -> None:
        overrides = [*overrides, "stages=[classify]", "tracking.uri=none"]
        run(path, seed, overrides, suffix="-ablations")
        self.config = configuration.load(path, of_seed(path, seed, overrides, "-ablations"))
        run_dir = Path(self.config.run_dir)
        self.folder = run_dir / "ablations"
        manifest = json.loads((run_dir / "classify/manifest.json").read_text())
        self.stamp = [manifest["fingerprint"], list(self.config.localize.scales), self.config.data.score_split]
        self._line: FrozenLine | None = None

    @property
    def line(self) -> FrozenLine:
        if self._line is None:
            net = trained_net(self.config, len(Index.load(self.config.data.root).classes))
            self._line = FrozenLine(self.config, net, self.folder / f"features-{fingerprint(self.stamp)}", epochs=2)
        return self._line

    def close(self) -> None:
        """Gives the disk back: 3 GB a seed."""
        self._line = None
        for folder in self.folder.glob("features-*"):
            shutil.rmtree(folder)

    def evidence(self, name: str, chain: Chain) -> Evidence:
        expand = None if chain.expand is None else replace(self.config.expand, **chain.expand)
        shrink = None if chain.shrink is None else replace(self.config.shrink, **chain.shrink)
        longer = _steps(self.config.expand) + _steps(self.config.shrink) if chain.longer else 0
        path = self.folder / f"{fingerprint(self.stamp, longer, expand, shrink)}.npz"
        if path.exists():
            with np.load(path) as found:
                return Evidence.of(found["counts"], found["reach"])
        begun = time.monotonic()
        line = self.line
        net, expansion, shrinkage = copy.deepcopy(line.net), None, None
        if longer:
            for p in (net.kernel, net.classifier):
                if p is not None:
                    p.requires_grad_(True)
            line.train(Classify(net, self.config.classify), self.config.classify, longer)
        net.requires_grad_(False)
        if expand is not None:
            task = Expand(net, expand)
            line.train(task, expand, _steps(expand))
            expansion = task.handover
            if shrink is not None:
                second = Shrink(net, expansion, shrink)
                line.train(second, shrink, _steps(shrink))
                shrinkage = second.handover
        found = line.score(net, expansion, shrinkage)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, counts=found.curve.counts, reach=found.reach)
        print(f"{name}: mIoU {100 * found.curve.best().miou:.2f}, {time.monotonic() - begun:.0f} s", flush=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=VALUE")
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
        lab = Lab(args.config, seed, args.overrides)
        for name, chain in chains.items():
            found[name].append(read(lab.evidence(f"seed {seed}, {name}", chain)))
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
    for name in (CAM, LONGER, EXPAND, SHRINK, ALONE):
        fixed = [spread([f.precision_at_recall(r) for f in found[name]]) for r in (50.0, 70.0, 80.0, 90.0)]
        rows.append([*row(name, miou, gain, area), precision_at_expansions(name), *fixed])
    heads = ("", "mIoU", "over the CAM", "area under the curve", "precision at the recall of Expansion's best")
    parts.append(table((*heads, *(f"at recall {r}" for r in (50, 70, 80, 90))), rows))

    if points:
        parts.append("\n### Open points, one changed at a time but where a row names more\n")
        rows = []
        for point in points:
            base = SHRINK if "Shrinkage" in point else EXPAND
            rows.append([f"**{point}**: as configured ({base})", *row(base, miou, gain, area)[1:]])
            rows += [[name, *row(f"{point}: {name}", miou, gain, area)[1:]] for name in POINTS[point]]
        parts.append(table(("", "mIoU", "over the CAM", "area under the curve"), rows))
    return "\n".join(parts)


if __name__ == "__main__":
    main()
