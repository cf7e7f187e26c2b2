"""Seeds to pseudo masks over several seeds: mIoU of seeds, PSA and IRN, each without and with the dense CRF.

    ESOL_WEIGHTS=weights python -m benchmarks.refine --config configs/voc-animals.yaml --seeds 0 1 2

Runs esol/train.py once per seed in as many processes as --processes says (finished stages of an earlier call are
kept), then prints the table. Each row states its threshold; the last column is mIoU at the best one, without CRF.
"""

from __future__ import annotations

from benchmarks.common import machine, table
from benchmarks.main_line import accelerate, arguments, run, spread

ROWS = (("seeds", "seed_masks"), ("PSA", "psa_masks"), ("IRN", "irn_masks"))
MEASURES = ("miou", "precision", "recall")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    results = {seed: run(args.config, seed, args.overrides, accelerate(args.processes)) for seed in args.seeds}

    print(f"\n{machine()}\n{args.config} {' '.join(args.overrides)}, {args.processes} processes\n")
    runs = list(results.values())
    seeds = [r["seed_masks"]["plain_miou"] for r in runs]
    rows: list[list[object]] = []
    for name, stage in ROWS:
        for kind, suffix in (("plain", ""), ("crf", " + CRF")):
            each = [r[stage][f"{kind}_miou"] for r in runs]
            gain = spread([a - b for a, b in zip(each, seeds, strict=True)])
            measures = [spread([r[stage][f"{kind}_{m}"] for r in runs]) for m in MEASURES]
            best = spread([r[stage]["best_miou"] for r in runs]) if kind == "plain" else ""
            rows.append(
                [name + suffix, runs[0][stage]["threshold"], *measures, gain, " ".join(f"{m:.2f}" for m in each), best]
            )
    print(
        table(("masks", "threshold", *MEASURES, "over the seeds", "mIoU of each seed", "at the best threshold"), rows)
    )
    labels = [
        [stage, *(spread([r[stage][k] for r in runs]) for k in ("labelled", "right"))]
        for stage in ("psa_labels", "irn_labels")
    ]
    print("\n" + table(("labels", "labelled, % of pixels", "right, % of those"), labels))
    stages = list(runs[0])
    times = [[seed, *(own[s]["seconds"] for s in stages)] for seed, own in results.items()]
    print("\n" + table(("seed", *(f"{s}, s" for s in stages), "all, min"), [[*t, sum(t[1:]) / 60] for t in times]))
    print(f"\nall seeds: {sum(sum(t[1:]) for t in times) / 60:.1f} min")


if __name__ == "__main__":
    main()
