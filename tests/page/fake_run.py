"""A run directory that looks finished, of as many photos as somebody wants: shards, class maps, masks, manifests.

python tests/page/fake_run.py FOLDER PHOTOS     writes it and its page, and prints what that took
"""

from __future__ import annotations

import io
import json
import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from esol.config import Config, DataConfig
from esol.data.index import Index, write_index
from esol.data.reader import ShardReader
from esol.data.samples import encode_jpeg, encode_mask, write_mirror_shard
from esol.pipeline import records
from esol.pipeline.records import FORMAT, MANIFEST, Manifest
from esol.pipeline.registry import config_type
from esol.report.page.page import PAGE, write_page

CLASSES = ("cat", "dog & <b>cow</b>")  # a name that must be escaped
WIDTH, HEIGHT = 96, 72


def fake_run(folder: Path, count: int, masks: bool = True) -> tuple[Path, Config]:
    """Shards and a run of localize, seed_masks and psa_masks; masks: whether the photos have true ones."""
    rng = np.random.default_rng(0)
    grounds = [_photo(rng) for _ in range(20)]
    labels = [[CLASSES[i % 2]] if i % 10 else [] for i in range(count)]

    def truth(i: int) -> np.ndarray:
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        if labels[i]:
            mask[20:50, 10 + i % 40 : 50 + i % 40] = 1 + i % 2
        return mask

    def photos() -> Iterator[dict[str, Any]]:
        for i in range(count):
            about = {"labels": labels[i], "height": HEIGHT, "width": WIDTH}
            sample = {"__key__": f"photo{i:05d}", "jpg": grounds[i % 20], "json": json.dumps(about).encode()}
            yield sample | ({"mask.png": encode_mask(truth(i))} if masks else {})

    def maps() -> Iterator[dict[str, Any]]:
        for i in range(count):
            own = np.array([i % 2] if labels[i] else [], np.int64)
            full = np.repeat((truth(i) > 0)[None] * np.uint8(200), len(own), 0)
            small = full[:, ::2, ::2]
            arrays = {"classes": own, "stride4": full[:, ::4, ::4].astype(np.float16), "full": full}
            yield {
                "__key__": f"photo{i:05d}",
                "maps.npz": _npz(arrays),
                "seen.npz": _npz({"cam": small, "expand": small}),
            }

    def drawn(shift: int) -> Iterator[dict[str, Any]]:
        for i in range(count):
            yield {"__key__": f"photo{i:05d}", "mask.png": encode_mask(np.roll(truth(i), shift * (i % 7), 0))}

    run = folder / "run"
    _shards(folder / "shards", photos(), count)
    index = Index.load(str(folder / "shards"))
    made = {"localize": maps(), "seed_masks": drawn(3), "psa_masks": drawn(1)}
    data = DataConfig(root=str(folder / "shards"), eval_split="train")
    config = config_type()(run_dir=str(run), data=data)
    for place, (name, samples) in enumerate(made.items()):
        _shards(run / name, samples, count)
        results = {"judge": 2.0 + place, "seconds": 3.0} if place else {"write": "expand", "expand_judge": 2.5}
        manifest = Manifest(
            name, place, "masks" if place else "maps", 1, "", {}, {"data": index.hash}, {}, results,
            {"scores": {}, "last": ""}, json.loads(json.dumps(asdict(config))), 1, {}, "",
        )  # fmt: skip
        (run / name / MANIFEST).write_text(json.dumps({"format": FORMAT, **asdict(manifest)}))
    (run / "pictures").mkdir()
    Image.new("RGB", (640, 300), "teal").save(run / "pictures/psa_masks.png")
    return run, config


def _photo(rng: np.random.Generator) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 255, (6, 8), dtype=np.uint8)).convert("RGB")  # gray: masks alone are red
    return encode_jpeg(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _shards(root: Path, samples: Iterator[dict[str, Any]], count: int) -> None:
    root.mkdir(parents=True)
    record = write_mirror_shard(str(root), "shard-000000.tar", samples)
    write_index(root, CLASSES, {"train": range(count)}, [record])


def write(folder: Path) -> dict[str, float]:
    """Writes the page of a fake run; in MB this process's peak memory before and after, and the size of the page."""
    run_dir = folder / "run"
    config = records.ran_with(run_dir, "psa_masks")
    index = Index.load(config.data.root)
    before = _peak()  # torch and its libraries alone are hundreds
    write_page(run_dir, config, index, ShardReader(index), lambda doing: None)
    return {"before": before, "peak": _peak(), "page": (run_dir / PAGE).stat().st_size / 1e6}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if len(sys.argv) > 2:  # in a process of its own, whose memory is not the writer's
        maker = get_context("spawn").Process(target=fake_run, args=(place, int(sys.argv[2])))
        maker.start()
        maker.join()
    print(json.dumps(write(place)))
