"""What each knob does to the maps: the picture and the table of docs/maps.md, on the synthetic set.

    esol-shards create synthetic --out data/demo
    python -m benchmarks.knobs --config configs/demo.yaml --seeds 0 --picture docs/maps.png

One run per knob, all from the same classify; the picture is of the first seed.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import machine, table
from benchmarks.main_line import arguments, of_seed, run, share_classify, spread
from esol import config as configuration
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.transforms import decode, decode_mask
from esol.report import heat, paint, sheet

STAGES = "stages=[classify, expand, shrink, localize, seed_masks]"
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
ROWS = 4


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--picture", type=Path, metavar="PNG")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in KNOBS}
    folders: dict[str, Path] = {}
    for seed in args.seeds:
        first: Path | None = None
        for number, (name, knob) in enumerate(KNOBS.items()):
            overrides = [*args.overrides, "tracking.uri=none", STAGES, *knob]
            suffix = f"-knob{number}"
            folder = Path(configuration.load(args.config, of_seed(args.config, seed, overrides, suffix)).run_dir)
            share_classify(first := first or folder, folder)
            results = run(args.config, seed, overrides, suffix=suffix)
            found[name].append(results["seed_masks"])
            folders.setdefault(name, folder)
    print(f"\n{machine()}\n{args.config} {' '.join(args.overrides)}, seeds {args.seeds}\n")
    measures = ("plain_precision", "plain_recall", "plain_miou", "best_threshold", "best_miou")
    rows = [[name, *(spread([own[m] for own in each]) for m in measures)] for name, each in found.items()]
    threshold = next(iter(found.values()))[0]["threshold"]
    heads = ("precision", "recall", "mIoU", "best threshold", "mIoU there")
    print(table((f"seeds at threshold {threshold:g}", *heads), rows))
    if args.picture:
        picture(folders, args.picture)


def picture(folders: dict[str, Path], path: Path) -> None:
    """The maps of every knob, the strongest class of each pixel, for photos that are evenly spread over the split."""
    config = configuration.load(str(next(iter(folders.values())) / "resolved.yaml"))
    data = ShardReader(Index.load(config.data.root))
    maps = {name: ShardReader(Index.load(folder / "localize")) for name, folder in folders.items()}
    ordinals = data.index.split(config.data.score_split)
    rows = []
    for ordinal in ordinals[np.linspace(0, len(ordinals) - 1, ROWS).astype(int)].tolist():
        key = str(data.index.keys[ordinal])
        photo = decode(data.read(ordinal, data.index.image_ext(ordinal)), key).permute(1, 2, 0).numpy()
        tiles = [photo, paint(photo, decode_mask(data.read(ordinal, "mask.png"), key))]
        tiles += [heat(photo, _best(reader, key)) for reader in maps.values()]
        rows.append((key, tiles))
    sheet(rows, ["photo", "truth", *maps]).save(path)


def _best(reader: ShardReader, key: str) -> NDArray[np.float32]:
    """The strongest class map of a sample, (H, W) in 0..1."""
    (ordinal,) = np.flatnonzero(reader.index.keys == key).tolist()
    with np.load(io.BytesIO(reader.read(ordinal, "maps.npz")), allow_pickle=False) as stored:
        return stored["full"].max(0).astype(np.float32) / 255


if __name__ == "__main__":
    main()
