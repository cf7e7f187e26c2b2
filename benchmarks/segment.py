"""DeepLab from pseudo masks against DeepLab from true masks, over several seeds: mIoU on data.eval_split and the ratio.

    ESOL_WEIGHTS=weights python -m benchmarks.segment --config configs/voc-animals.yaml --seeds 0 1 2

Runs esol/train.py twice per seed, all stages of the config and then segment and evaluate alone with
segment.masks = truth: same network, seed, photos, order, steps (finished stages of an earlier call are kept).
"""

from __future__ import annotations

from benchmarks.common import machine, table
from benchmarks.main_line import accelerate, arguments, run, spread

FULL = ("segment.masks=truth", "stages=[segment, evaluate]")
MEASURES = ("miou", "precision", "recall")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    launcher = accelerate(args.processes)
    weak, full = {}, {}
    for seed in args.seeds:
        weak[seed] = run(args.config, seed, args.overrides, launcher)
        full[seed] = run(args.config, seed, [*args.overrides, *FULL], launcher, "-truth")

    first = next(iter(weak.values()))["evaluate"]
    print(f"\n{machine()}\n{args.config} {' '.join(args.overrides)}, {args.processes} processes")
    print(f"{first['split']}, initial weights {first['initial_weights']}\n")
    rows: list[list[object]] = []
    for name, runs in ((first["masks"], weak), ("true masks", full)):
        for kind, suffix in (("plain", ""), ("crf", " + CRF")):
            each = [r["evaluate"][f"{kind}_miou"] for r in runs.values()]
            measures = [spread([r["evaluate"][f"{kind}_{m}"] for r in runs.values()]) for m in MEASURES]
            rows.append([name + suffix, *measures, " ".join(f"{m:.2f}" for m in each)])
    for kind, suffix in (("plain", ""), ("crf", " + CRF")):
        key = f"{kind}_miou"
        ratios = [100 * weak[s]["evaluate"][key] / full[s]["evaluate"][key] for s in args.seeds]
        rows.append([f"ratio{suffix}, %", spread(ratios), "", "", " ".join(f"{r:.2f}" for r in ratios)])
    print(table(("DeepLab, learned from", *MEASURES, "mIoU of each seed"), rows))

    if masks := [own[first["masks"]] for own in weak.values() if "plain_miou" in own[first["masks"]]]:
        rows = []
        for kind, suffix in (("plain", ""), ("crf", " + CRF")):
            each = [own[f"{kind}_miou"] for own in masks]
            rows.append([first["masks"] + suffix, spread(each), " ".join(f"{m:.2f}" for m in each)])
        heading = f"masks that it learned from, on {masks[0]['split']}"
        print("\n" + table((heading, "miou", "mIoU of each seed"), rows))

    labels = [key.removeprefix("iou_") for key in first if key.startswith("iou_")]
    each_class = []
    for name, runs in ((first["masks"], weak), ("true masks", full)):
        each_class.append([name, *(spread([r["evaluate"][f"iou_{label}"] for r in runs.values()]) for label in labels)])
    print("\n" + table(("IoU, last step", *labels), each_class))
    stages = list(next(iter(weak.values())))
    times = [[seed, *(own[s]["seconds"] for s in stages)] for seed, own in weak.items()]
    print("\n" + table(("seed", *(f"{s}, s" for s in stages), "all, min"), [[*t, sum(t[1:]) / 60] for t in times]))
    times = [[seed, *(own[s]["seconds"] for s in ("segment", "evaluate"))] for seed, own in full.items()]
    print("\n" + table(("seed, true masks", "segment, s", "evaluate, s"), times))


if __name__ == "__main__":
    main()
