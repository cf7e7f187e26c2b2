"""How the shipped recipe does on many sets of photos and scenes, as it stands: a column of one table each.

    ESOL_WEIGHTS=weights python -m benchmarks.transfer --data DATA --seeds 0

DATA holds voc-animals (VOC's own layout), magnetic-tiles (folders by class) and coco-tiny; synthetic scenes are drawn.
Every set runs configs/custom-cpu.yaml as it stands, through the masks; each seed has its own order of the shards.
Photos' labels choose everything, masks only score. What has finished is not run again; --sets names some of the sets.
--rows is for machines that do not last: rows that are in the folder are taken from there, others are put there;
benchmarks/transfer_rows has those that were measured since.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from benchmarks.common import machine, table
from benchmarks.main_line import MAIN_LINE, ROOT, SOURCES, spread
from benchmarks.transfer_sets import SCALES, SETS, TransferSet
from esol.base.palette import VOID
from esol.base.progress import progress
from esol.config import CrfConfig, MaskConfig
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.samples import decode_mask
from esol.data.transforms import decode
from esol.engines.ranks import precision_of
from esol.ops.class_maps import ClassMaps, class_maps
from esol.ops.dense_crf import mean_field, unary_from_labels
from esol.ops.metrics import Counts, confusion_matrix, score
from esol.ops.pseudo_labels import mask_threshold, pseudo_masks
from esol.ops.thresholds import auto_threshold
from esol.pipeline import records
from esol.pipeline.cam import trained_heads
from esol.pipeline.masks import highest
from esol.report.judge import WORTH, Evidence
from esol.stages.localize import SAMPLED
from shards.writer import create

MASK_STAGES = ("seed_masks", "psa_masks", "irn_masks", "vote_masks")
STAGES = (*MAIN_LINE, "psa_labels", "psa", "psa_masks", "irn_labels", "irn", "irn_masks", "vote_masks")
SCORED = 60  # photos by which seeds with the CRF are scored, and the final masks against them
TIMED = 10  # photos by which the time of auto and the judge is measured
WORTHS = [  # candidates for what a stage is worth, of which the other sets' pairs choose
    {"vote_masks": vote, "psa_masks": psa} for vote, psa in product((1, 1.05, 1.1), (1, 1.1, 1.2, 1.3))
]
GRID = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7)  # thresholds of which the best is known to the truth alone
SHARD = 32  # samples
Row = dict[str, Any]


def run(
    name: str,
    spec: TransferSet,
    seed: int,
    data: Path,
    out: Path,
    overrides: Sequence[str],
    only: Sequence[str] = STAGES,
) -> Path:
    """The run directory of a set and seed, in which the stages `only` are finished."""
    folder = out / f"{name.replace(' ', '-')}-seed{seed}"
    shards = folder / "shards"
    if not (shards / "index.json").exists():
        create(spec.source(data, folder / "source"), str(shards), SHARD, seed, overwrite=True)
    weights = Path(os.environ.get("ESOL_WEIGHTS", "weights")) / "tf_efficientnet_lite0.safetensors"
    settings = [f"run_dir={folder / 'run'}", f"data.root={shards}", f"seed={seed}", f"stages=[{', '.join(STAGES)}]"]
    settings += [f"model.weights={weights}", "tracking.uri=none", *spec.overrides, *overrides]
    options = [part for text in settings for part in ("--set", text)]
    config = str(ROOT / "configs/custom-cpu.yaml")
    command = [sys.executable, str(ROOT / "esol/train.py"), "--config", config, "--resume", *options]
    subprocess.run([*command, "--stages", ",".join(only)], check=True)
    return folder / "run"


def rows_of(run_dir: Path) -> Row:
    """What a finished run scores; kept in transfer.json as long as its stages' outputs stay what they were."""
    outputs = {name: manifest.output for name, manifest in records.manifests(run_dir).items()}
    kept = run_dir / "transfer.json"
    if kept.exists() and (row := json.loads(kept.read_text()))["outputs"] == outputs:
        return row
    row = {"outputs": outputs, "results": records.results(run_dir)}
    row |= _on_some_photos(run_dir, row["results"])
    kept.write_text(json.dumps(row))
    return row


def _share_of_time(
    timed: Sequence[tuple[torch.Tensor, dict[str, ClassMaps], float]], results: Row, labelled: int
) -> float:
    """Percent of the run's seconds that auto and the judge took, by what they take now for some photos.

    timed: photo, maps of every source and seconds that those took. A photo costs five automatic thresholds (seeds, and
    labels and walk of PSA and IRN) and a look of the judge at every mask stage; SAMPLED ones also the maps of every
    source, and masks of them.
    """
    sample = each = 0.0
    for image, maps, seconds in timed:
        evidence = Evidence.empty(1 + max(int(own.classes.max()) for own in maps.values()))
        begun = time.perf_counter()
        made = [pseudo_masks([image], [own.full], [own.classes], MaskConfig())[0] for own in maps.values()]
        masks = [mask.numpy() for _, mask in made]
        middle = time.perf_counter()
        for mask in masks:
            evidence.add(image.numpy(), mask, maps["cam"].classes.tolist(), seeds=mask)
        judged = time.perf_counter()
        for _ in range(5):
            auto_threshold(maps["cam"].full.amax(0))
        sample += seconds + judged - begun
        each += len(MASK_STAGES) * (judged - middle) / len(masks) + time.perf_counter() - judged
    photos = min(labelled, SAMPLED) * sample + labelled * each
    return 100 * photos / len(timed) / sum(own["seconds"] for own in results.values())


@torch.no_grad()
def _on_some_photos(run_dir: Path, results: Row) -> Row:
    """mIoU with the CRF on SCORED photos: "seeds" of every stage, "masks" of every mask stage; "share" of time.

    Seeds at the photos' own thresholds; the CAM's, and those of the maps that were written, also at the best threshold
    for all photos.
    """
    config, written = records.ran_with(run_dir, "localize"), results["localize"]["write"]
    torch.set_num_threads(config.engine.threads or torch.get_num_threads())
    kind = precision_of(config.engine.precision, torch.device("cpu"))
    index = Index.load(config.data.root)
    reader, width = ShardReader(index), len(index.classes) + 1
    heads = trained_heads(config, len(index.classes)).eval()
    made = {stage: ShardReader(Index.load(run_dir / stage)) for stage in MASK_STAGES}
    place = {stage: {str(key): i for i, key in enumerate(own.index.keys)} for stage, own in made.items()}
    counts: dict[tuple[str, float | str], Counts] = defaultdict(lambda: np.zeros((width, width), np.int64))
    ordinals = index.split(config.data.score_split)
    chosen = ordinals[np.unique(np.linspace(0, len(ordinals) - 1, SCORED).astype(int))].tolist()
    timed: list[tuple[torch.Tensor, dict[str, ClassMaps], float]] = []
    with progress("seeds with CRF", len(chosen), "photos", True) as advance:
        for done, ordinal in enumerate(chosen, 1):
            image = decode(reader.image(ordinal), reader.name(ordinal))
            labels = torch.from_numpy(reader.labels(ordinal))
            truth = np.zeros(image.shape[1:], np.uint8)  # of a photo without any object, which needs no mask
            if index.members["mask.png"][ordinal, 0] >= 0:
                truth = decode_mask(reader.read(ordinal, "mask.png"), reader.name(ordinal))
            begun = time.perf_counter()
            with torch.autocast("cpu", kind, enabled=kind is not None):
                scales, flip = config.localize.scales, config.localize.flip
                own = class_maps(image[None], labels[None], heads, scales=scales, flip=flip)[0]
            if labels.any() and len(timed) < TIMED:
                timed.append((image, own, time.perf_counter() - begun))
            for source, maps in own.items():
                thresholds: dict[float | str, float] = {t: t for t in GRID if source in ("cam", written)}
                thresholds["auto"] = mask_threshold(MaskConfig(), maps.full)
                for which, label in _masks(image, maps.full, maps.classes, thresholds).items():
                    counts[source, which] += confusion_matrix(truth, label, width)
            for stage, masks in made.items():
                mask = decode_mask(masks.read(place[stage][str(index.keys[ordinal])], "mask.png"), stage)
                counts[stage, "auto"] += confusion_matrix(truth, np.where(mask == VOID, 0, mask), width)
            advance(done, "")
    miou = {key: 100 * score(count).miou for key, count in counts.items()}
    seeds = {source: {"auto": miou[source, "auto"]} for source in SOURCES}
    for source in {"cam", written}:
        seeds[source]["best"] = max(miou[source, t] for t in GRID)
    covered = np.union1d(index.split(config.data.mask_split), ordinals)
    labelled = sum(bool(reader.labels(int(o)).any()) for o in covered)
    share = _share_of_time(timed, results, labelled)
    return {"seeds": seeds, "masks": {stage: miou[stage, "auto"] for stage in MASK_STAGES}, "share": share}


def _masks(
    image: torch.Tensor, maps: torch.Tensor, classes: torch.Tensor, thresholds: dict[Any, float]
) -> dict[Any, np.ndarray]:
    """Label maps with the CRF at every threshold, on one lattice."""
    if not len(maps):
        return {which: np.zeros(image.shape[1:], np.uint8) for which in thresholds}
    best, row = maps.max(0)
    unaries = [unary_from_labels(torch.where(best > t, row + 1, 0), len(maps) + 1, 0.7) for t in thresholds.values()]
    number = torch.cat((torch.zeros(1, dtype=torch.int64), classes + 1))
    [made] = mean_field([image], [unaries], CrfConfig())
    return {which: number[q.argmax(0)].to(torch.uint8).numpy() for which, q in zip(thresholds, made, strict=True)}


def pairs(row: Row, worth: Mapping[str, float] = WORTH) -> list[bool]:
    """Of every two stages that differ by more than two points: whether the judge orders them so, by that worth.

    Rows of before 2026-11-29 have no judge of maps: today's is another.
    """
    results, seeds = row["results"], row["seeds"]

    def judged(stage: str, number: float) -> float:
        return number / WORTH.get(stage, 1) * worth.get(stage, 1)

    by_maps = {s: results["localize"].get(f"{s}_judge") for s in SOURCES}
    maps = [(number, seeds[s]["auto"]) for s, number in by_maps.items() if number is not None]
    masks = [(judged(s, results[s]["judge"]), results[s]["crf_miou"]) for s in MASK_STAGES]
    return [
        (a[0] > b[0]) == (a[1] > b[1])
        for group in (maps, masks)
        for a, b in combinations(group, 2)
        if abs(a[1] - b[1]) > 2
    ]


def left_out(rows: dict[str, list[Row]]) -> list[bool]:
    """The pairs of every set by the worth that orders most pairs of the other sets, the first of equal ones."""
    found: list[bool] = []
    for name, own in rows.items():
        others = [row for other, each in rows.items() if other != name for row in each]
        best = max(WORTHS, key=lambda worth: sum(ok for row in others for ok in pairs(row, worth)))
        found += [ok for row in own for ok in pairs(row, best)]
    return found


def summary(row: Row) -> Row:
    """One set and seed in the numbers of the table."""
    results, seeds = row["results"], row["seeds"]
    masks = {stage: results[stage]["crf_miou"] for stage in MASK_STAGES}
    chosen, last = highest({stage: results[stage]["judge"] for stage in MASK_STAGES}), results["localize"]["write"]
    return {
        f"CAM + CRF at its best threshold, {SCORED} photos": seeds["cam"]["best"],
        **{f"seeds of {source} + CRF, {SCORED} photos": seeds[source]["auto"] for source in SOURCES},
        "maps written": last,
        **masks,
        "judge took": chosen,
        "best": highest(masks),
        "final": masks[chosen],
        "final - best": masks[chosen] - max(masks.values()),
        f"final - CAM + CRF, {SCORED} photos": row["masks"][chosen] - seeds["cam"]["best"],
        "time of auto and the judge, %": row["share"],
        "cost of auto, seeds + CRF": seeds[last]["best"] - seeds[last]["auto"],
        "cost of auto, PSA": results["psa_masks"]["best_miou"] - results["psa_masks"]["plain_miou"],
        "cost of auto, IRN": results["irn_masks"]["best_miou"] - results["irn_masks"]["plain_miou"],
    }


def tables(rows: dict[str, list[Row]]) -> str:
    """A column a set, then what the targets ask for."""
    found = {name: [summary(row) for row in own] for name, own in rows.items()}
    keys = list(next(iter(found.values()))[0])
    body = []
    for key in keys:
        cells = [[own[key] for own in each] for each in found.values()]
        body.append([key, *(", ".join(dict.fromkeys(c)) if isinstance(c[0], str) else spread(c) for c in cells)])
    judged, bare = ([ok for own in rows.values() for row in own for ok in pairs(row, by)] for by in (WORTH, {}))
    photos = {name: own for name, own in found.items() if SETS[name].photos}

    def over(each: Iterable[list[Row]], key: str) -> list[float]:
        return [mean(own[key] for own in rows_) for rows_ in each]

    costs = [over(found.values(), f"cost of auto, {what}") for what in ("seeds + CRF", "PSA", "IRN")]
    lines = [
        table(("mIoU", *found), body),
        "",
        f"The judge orders {sum(judged)} of {len(judged)} pairs that differ by more than 2 points as the truth does; "
        f"{sum(bare)} by contrast and lost labels alone, "
        f"{sum(left_out(rows))} by what the other sets say that a stage is worth.",
    ]
    if photos:
        gain, short = (over(photos.values(), f"final - {of}") for of in (f"CAM + CRF, {SCORED} photos", "best"))
        lines.append(
            f"Over the {len(photos)} photo sets the final masks are {mean(gain):.2f} above CAM + CRF on average, "
            f"{min(gain):.2f} on the worst set, and at most {-min(short):.2f} below the set's best stage."
        )
    said = (f"{w} {mean(c):.2f}, {max(c):.2f}" for w, c in zip(("seeds + CRF", "PSA", "IRN"), costs, strict=True))
    lines.append("auto thresholds cost, on average and at most: " + "; ".join(said))
    return "\n".join(lines)


def scales(args: argparse.Namespace) -> str:
    """Seeds of every stage at their best threshold, for every change that must not matter."""
    stages, body = MAIN_LINE[: MAIN_LINE.index("localize") + 1], []
    found = {
        name: [
            records.results(run(name, spec, seed, args.data, args.out, args.overrides, stages))["localize"]
            for seed in args.seeds
        ]
        for name, spec in SCALES.items()
    }
    for name, own in found.items():
        body.append([name, *(spread([each[f"{source}_miou"] for each in own]) for source in SOURCES)])
    return f"\n{machine()}\nseeds {args.seeds}\n\n{table(('mIoU of seeds', *SOURCES), body)}"


def commit() -> str:
    """Of the files that are run, with + where some are not committed."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "esol", "configs"], capture_output=True, text=True).stdout
    return head + "+" * bool(changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--rows", type=Path, help="folder of the rows that are done, SET-seedN.json")
    parser.add_argument("--scales", action="store_true", help="compare seeds of animals-400 with those of its SCALES")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=VALUE")
    args = parser.parse_args()
    if args.scales:
        print(scales(args))
        return
    rows: dict[str, list[Row]] = {}
    for seed in args.seeds:
        for name in args.sets:
            begun = time.monotonic()
            done = args.rows / f"{name}-seed{seed}.json" if args.rows else None
            if done and done.exists():
                rows.setdefault(name, []).append(json.loads(done.read_text()))
                continue
            row = rows_of(run(name, SETS[name], seed, args.data, args.out, args.overrides))
            if done:
                done.parent.mkdir(parents=True, exist_ok=True)
                done.write_text(json.dumps({"commit": commit(), "machine": machine(), **row}))
            rows.setdefault(name, []).append(row)
            print(f"{name}, seed {seed}: {(time.monotonic() - begun) / 60:.1f} minutes in this call", flush=True)
    print(f"\n{machine()}\nconfigs/custom-cpu.yaml {' '.join(args.overrides)}, seeds {args.seeds}\n\n{tables(rows)}")


if __name__ == "__main__":
    main()
