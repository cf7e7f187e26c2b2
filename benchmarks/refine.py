"""Seeds to pseudo masks and DeepLab over several seeds: mIoU of each, without and with the dense CRF.

    ESOL_WEIGHTS=weights python -m benchmarks.refine --config configs/voc-animals.yaml --seeds 0 1 2

Runs esol/train.py once per seed in as many processes as --processes says (finished stages of an earlier call are
kept), then prints the table. Each row states its threshold; the last column is mIoU at the best one, without CRF.
--set data.root=data/animals-{seed} gives every seed shards in an order of its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import machine, table
from benchmarks.main_line import accelerate, arguments, folder_of, run, spread
from esol.base.palette import VOID
from esol.config import Config
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.samples import decode_mask
from esol.ops.metrics import Counts, confusion_matrix, score
from esol.pipeline import config_file

MEASURES = ("miou", "precision", "recall")

ROWS = (
    ("seeds", "seed_masks"),
    ("PSA", "psa_masks"),
    ("IRN", "irn_masks"),
    ("vote", "vote_masks"),
    ("DeepLab", "evaluate"),
)


def unseen(config: Config, index: Index) -> NDArray[np.int64]:
    """Ordinals of data.mask_split outside data.score_split that have a true mask.

    Settings are chosen by score_split's numbers; by these photos nothing was.
    """
    others = np.setdiff1d(index.split(config.data.mask_split), index.split(config.data.score_split))
    return others[index.members["mask.png"][others, 0] >= 0] if "mask.png" in index.members else others[:0]


def confusions(run_dir: Path, stage: str) -> dict[str, Counts]:
    """Of a stage's final masks, a matrix for each photo (N, C+1, C+1), by the set that the photos belong to."""
    config = config_file.load(str(run_dir / "resolved.yaml"))
    data, masks = ShardReader(Index.load(config.data.root)), ShardReader(Index.load(run_dir / stage))
    place = {str(key): i for i, key in enumerate(masks.index.keys)}
    labels, names = len(data.index.classes) + 1, config.data

    def of(ordinal: int) -> Counts:
        own = place[str(data.index.keys[ordinal])]
        said = decode_mask(masks.read(own, "mask.png"), masks.name(own))
        truth = decode_mask(data.read(ordinal, "mask.png"), data.name(ordinal))
        return confusion_matrix(truth, np.where(said == VOID, 0, said), labels)  # void is background, as in the stages

    if stage == "evaluate":
        parts = {names.eval_split: data.index.split(names.eval_split)}
    else:
        parts = {names.score_split: data.index.split(names.score_split)}
        parts[f"{names.mask_split}, unseen"] = unseen(config, data.index)
    return {name: np.array([of(i) for i in part.tolist()]) for name, part in parts.items() if len(part)}


def miou(confusion: Counts) -> float:
    return 100 * score(confusion).miou


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    results = {seed: run(args.config, seed, args.overrides, accelerate(args.processes)) for seed in args.seeds}

    print(f"\n{machine()}\n{args.config} {' '.join(args.overrides)}, {args.processes} processes\n")
    runs = list(results.values())
    seeds = [r["seed_masks"]["plain_miou"] for r in runs]
    rows: list[list[object]] = []
    made = [(name, stage) for name, stage in ROWS if all(stage in r for r in runs)]
    for name, stage in made:
        for kind, suffix in (("plain", ""), ("crf", " + CRF")):
            if f"{kind}_miou" not in runs[0][stage]:
                continue
            each = [r[stage][f"{kind}_miou"] for r in runs]
            gain = spread([a - b for a, b in zip(each, seeds, strict=True)])
            measures = [spread([r[stage][f"{kind}_{m}"] for r in runs]) for m in MEASURES]
            best = (
                spread([r[stage]["best_miou"] for r in runs])
                if kind == "plain" and "best_miou" in runs[0][stage]
                else ""
            )
            at, each_seed = runs[0][stage].get("threshold", ""), " ".join(f"{m:.2f}" for m in each)
            rows.append([name + suffix, at, runs[0][stage]["split"], *measures, gain, each_seed, best])
    heads = ("masks", "threshold", "photos of", *MEASURES, "over the seeds", "mIoU of each seed")
    print(table((*heads, "at the best threshold"), rows))
    folders = [folder_of(args.config, seed, args.overrides) for seed in args.seeds]
    final = []
    for name, stage in made:
        counts = [confusions(folder, stage) for folder in folders]
        for which in counts[0]:
            final.append([name, f"{len(counts[0][which])} of {which}", spread([miou(c[which].sum(0)) for c in counts])])
    print("\n" + table(("final masks", "photos", "mIoU"), final))
    labels = [
        [stage, *(spread([r[stage][k] for r in runs]) for k in ("labelled", "accuracy"))]
        for stage in ("psa_labels", "irn_labels")
    ]
    print("\n" + table(("labels", "labelled, % of pixels", "right, % of those"), labels))
    stages = list(runs[0])
    times = [[seed, *(own[s]["seconds"] for s in stages)] for seed, own in results.items()]
    print("\n" + table(("seed", *(f"{s}, s" for s in stages), "all, min"), [[*t, sum(t[1:]) / 60] for t in times]))
    print(f"\nall seeds: {sum(sum(t[1:]) for t in times) / 60:.1f} min")


if __name__ == "__main__":
    main()
