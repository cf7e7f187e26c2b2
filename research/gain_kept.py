"""What is left of the seeds' gain after PSA, IRN and DeepLab: everything behind the maps, from ours and from the CAM's.

    ESOL_WEIGHTS=weights python -m research.gain_kept --config configs/voc-animals.yaml --seeds 0 1 2

Runs esol/train.py per seed and chain, all from the same classify (finished stages of an earlier call are kept). Maps
of different height want different thresholds: every chain gets its own, by one rule from one number, see `settings`.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from benchmarks.common import machine, table
from benchmarks.main_line import accelerate, arguments, folder_of, run, spread
from benchmarks.refine import ROWS, confusions, miou
from esol.data.index import Index
from esol.ops.metrics import Counts, score
from esol.ops.thresholds import background_power, power_threshold
from esol.pipeline import config_file

Results = dict[str, dict[str, Any]]
BEHIND = ("seed_masks", "psa_labels", "psa", "psa_masks", "irn_labels", "irn", "irn_masks", "segment", "evaluate")
# Each chain's stages before localize, and the threshold that is best for its seeds on voc-animals train (RESULTS.md)
CHAINS = {
    "CAM": ((), 0.21),
    "decide": (("decide",), 0.39),
    "decide, Expansion": (("decide", "expand"), 0.33),
    "decide, Expansion, Shrinkage": (("decide", "expand", "shrink"), 0.30),
}


def settings(threshold: float) -> list[str]:
    """A threshold t of class maps as the settings of the stages behind them.

    PSA's background (1 - best)^alpha meets the best map at t for alpha = ln t / ln (1 - t). That is the walk's alpha
    and the low one of the labels; the high one is 8 times as much, as in PSA. IRN's labels take the thresholds of .6
    and 5 times that alpha, which makes about its own .30 and .05 of the CAM's.
    """
    alpha = background_power(threshold)
    return [
        "localize.write=last",  # the chain's own maps, not those that the judge prefers
        f"seed_masks.threshold={threshold}",
        f"psa_labels.alpha_low={alpha:.2g}",
        f"psa_labels.alpha_high={8 * alpha:.2g}",
        f"psa_masks.alpha={alpha:.2g}",
        f"irn_labels.foreground={power_threshold(0.6 * alpha):.2g}",
        f"irn_labels.background={power_threshold(5 * alpha):.2g}",
    ]


def suffix(chain: str) -> str:
    """Of its run directories."""
    return f"-kept-{chain.lower().replace(', ', '-')}"


def over_photos(own: list[Counts], base: list[Counts]) -> list[float]:
    """The mean gain of own over base if other photos had been drawn: paired bootstrap over photos, all seeds alike."""
    generator = np.random.default_rng(0)
    photos = len(own[0])
    gains = []
    for _ in range(1000):
        weight = np.bincount(generator.integers(0, photos, photos), minlength=photos)
        pairs = zip(own, base, strict=True)
        gains.append(
            float(np.mean([miou(np.tensordot(weight, a, 1)) - miou(np.tensordot(weight, b, 1)) for a, b in pairs]))
        )
    return gains


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--chains", nargs="+", choices=list(CHAINS), default=["CAM", "decide, Expansion, Shrinkage"])
    parser.add_argument("--stages", nargs="+", choices=BEHIND, default=list(BEHIND), help="those behind the maps")
    args = parser.parse_args()
    launcher = accelerate(args.processes)
    found: dict[str, list[Results]] = {name: [] for name in args.chains}
    for seed in args.seeds:
        for name, own in found.items():
            before, threshold = CHAINS[name]
            stages = ("classify", *before, "localize", *args.stages)
            overrides = [*settings(threshold), *args.overrides, f"stages=[{', '.join(stages)}]"]
            own.append(run(args.config, seed, overrides, launcher, suffix(name), suffix(args.chains[0])))
    print(f"\n{machine()}\n{args.config} {' '.join(args.overrides)}, seeds {args.seeds}, {args.processes} processes\n")
    for name in args.chains:
        print(f"{name}: {' '.join(settings(CHAINS[name][1]))}\n")
    print(tables(found, args.stages))
    print("\n" + by_photos(args))


def by_photos(args: argparse.Namespace) -> str:
    """Final masks of photos by which settings were chosen, and of photos by which none was; then class by class."""
    first, labels = args.chains[0], ("background", *Index.load(config_file.load(args.config).data.root).classes)
    rows, classes = [], []
    for what, stage in ROWS:
        if stage not in args.stages:
            continue
        counts = {
            name: [confusions(folder_of(args.config, s, args.overrides, suffix(name)), stage) for s in args.seeds]
            for name in args.chains
        }
        for which in counts[first][0]:
            base = [c[which] for c in counts[first]]
            for name, found in counts.items():
                own = [c[which] for c in found]
                each = [miou(c.sum(0)) for c in own]
                gains = [a - miou(b.sum(0)) for a, b in zip(each, base, strict=True)]
                row = [f"{what} + CRF", f"{len(own[0])} of {which}", name]
                low, high = np.percentile(over_photos(own, base), (2.5, 97.5))
                rows.append([*row, spread(each), spread(gains), "" if name == first else f"{low:.2f} to {high:.2f}"])
                ious = 100 * np.array([score(c.sum(0)).iou for c in own])
                less = 0 if name == first else 100 * np.array([score(c.sum(0)).iou for c in base])
                said = name if name == first else f"{name}, over {first}"
                classes.append([*row[:2], said, *(spread(values.tolist()) for values in (ious - less).T)])
    heads = ("masks", "photos", "from the maps of")
    scores = table((*heads, "mIoU", f"over {first}", "95 % over photos"), rows)
    return f"{scores}\n\nIoU of each class\n\n{table((*heads, *labels), classes)}"


def tables(found: dict[str, list[Results]], stages: list[str]) -> str:
    """One row a chain and kind of mask; gains are over the first chain, seed by seed."""
    base = next(iter(found.values()))
    rows: list[list[object]] = []
    for what, stage in ROWS:
        if stage not in stages:
            continue
        for kind, how in (("plain", ""), ("crf", " + CRF")):
            for name, own in found.items():
                each = [r[stage][f"{kind}_miou"] for r in own]
                gains = [a - r[stage][f"{kind}_miou"] for a, r in zip(each, base, strict=True)]
                measures = [spread([r[stage][f"{kind}_{m}"] for r in own]) for m in ("precision", "recall")]
                best = spread([r[stage]["best_miou"] for r in own]) if kind == "plain" and stage != "evaluate" else ""
                rows.append([what + how, name, spread(each), spread(gains), *measures, best])
    columns = ("", "from the maps of", "mIoU", f"over {next(iter(found))}", "precision", "recall")
    parts = [table((*columns, "mIoU at the best threshold"), rows)]
    if labels := [stage for stage in ("psa_labels", "irn_labels") if stage in stages]:
        rows = [
            [stage, name, *(spread([r[stage][k] for r in own]) for k in ("labelled", "accuracy"))]
            for stage in labels
            for name, own in found.items()
        ]
        parts.append(table(("labels", "from the maps of", "labelled, % of pixels", "right, % of those"), rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
