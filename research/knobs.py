"""What each knob does to the maps: the picture and the table of docs/maps.md, on the synthetic set.

    esol-shards create synthetic --out data/demo
    python -m research.knobs --config configs/demo.yaml --seeds 0 --picture docs/maps.png \\
        --photos val_000125 val_000180 val_000187 val_000102

One run per knob, all from the same classify; the picture is of the first seed.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import machine, table
from benchmarks.main_line import arguments, folder_of, run, spread
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.samples import decode_mask
from esol.data.transforms import decode
from esol.pipeline import config_file
from esol.report.pictures import heat, paint, sheet

STAGES = "stages=[classify, expand, shrink, localize, seed_masks]"
LAST = "localize.write=last"  # the maps that the knobs turn, not those that the judge prefers
KNOBS: dict[str, list[str]] = {
    "as configured": [],
    "expand: 25 steps": ["expand.duration=25 steps"],
    "expand: 400 steps": ["expand.duration=400 steps"],
    "expand.bound 1": ["expand.bound=1"],
    "expand.bound 4": ["expand.bound=4"],
    "shrink.area 0": ["shrink.area=0"],
    "shrink.area 1": ["shrink.area=1"],
    "shrink.clip 0.3": ["shrink.clip=0.3"],
    "shrink.area_term decide": ["shrink.area_term=decide"],
    "decide first": ["stages=[classify, decide, expand, shrink, localize, seed_masks]"],
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--picture", type=Path, metavar="PNG")
    parser.add_argument("--photos", nargs="+", metavar="KEY", help="those in the picture, with --picture")
    args = parser.parse_args()
    if bool(args.picture) != bool(args.photos):
        parser.error("--picture and --photos go together")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in KNOBS}
    folders: dict[str, Path] = {}
    for seed in args.seeds:
        for number, (name, knob) in enumerate(KNOBS.items()):
            overrides = [*args.overrides, "tracking.uri=none", LAST, STAGES, *knob]
            results = run(args.config, seed, overrides, suffix=f"-knob{number}", classify_of="-knob0")
            found[name].append(results["seed_masks"])
            folders.setdefault(name, folder_of(args.config, seed, overrides, f"-knob{number}"))
    print(f"\n{machine()}\n{args.config} {' '.join(args.overrides)}, seeds {args.seeds}\n")
    measures = ("plain_precision", "plain_recall", "plain_miou", "best_threshold", "best_miou")
    rows = [[name, *(spread([own[m] for own in each]) for m in measures)] for name, each in found.items()]
    threshold = next(iter(found.values()))[0]["threshold"]
    heads = ("precision", "recall", "mIoU", "best threshold", "mIoU there")
    print(table((f"seeds at threshold {threshold}", *heads), rows))
    if args.picture:
        picture(folders, args.photos, args.picture)


def picture(folders: dict[str, Path], keys: list[str], path: Path) -> None:
    """The maps of every knob for some photos: of each pixel's strongest class."""
    config = config_file.load(str(next(iter(folders.values())) / "resolved.yaml"))
    data = ShardReader(Index.load(config.data.root))
    maps = {name: ShardReader(Index.load(folder / "localize")) for name, folder in folders.items()}
    rows = []
    for key in keys:
        ordinal = _ordinal(data, key)
        photo = decode(data.read(ordinal, data.index.image_ext(ordinal)), key).permute(1, 2, 0).numpy()
        tiles = [photo, paint(photo, decode_mask(data.read(ordinal, "mask.png"), key))]
        tiles += [heat(photo, _best(reader, key)) for reader in maps.values()]
        rows.append((key, tiles))
    drawn = sheet(rows, ["photo", "truth", *maps]).quantize(200)
    drawn.save(path, optimize=True)


def _ordinal(reader: ShardReader, key: str) -> int:
    found = np.flatnonzero(reader.index.keys == key).tolist()
    if not found:
        raise SystemExit(f"--photos {key}: {reader.index.root} has no such sample")
    return found[0]


def _best(reader: ShardReader, key: str) -> NDArray[np.float32]:
    """The strongest class map of a sample, (H, W) in 0..1."""
    with np.load(io.BytesIO(reader.read(_ordinal(reader, key), "maps.npz")), allow_pickle=False) as stored:
        return stored["full"].max(0).astype(np.float32) / 255


if __name__ == "__main__":
    main()
