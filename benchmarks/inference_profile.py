"""Where the time of every inference stage and of `esol predict` goes, in parts, milliseconds a photo.

    ESOL_WEIGHTS=weights python -m benchmarks.inference_profile --data data/some --photos some-photos

data: a shard set of a few photos with a split train; photos: a folder for predict. Networks learn for a few steps only,
which changes what they say and not how long they take. A part's time is its own, without what it calls. In one thread:
the parts of photos side by side would add up to more than the time.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import machine, table
from esol.data import reader
from esol.deploy import model, predict
from esol.models.affinity_net import AffinityNet
from esol.models.deeplab import DeepLab
from esol.models.heads import Heads
from esol.models.irn_net import IrnNet
from esol.ops import class_maps, dense_crf, lattice, pseudo_labels, segmentation, tiles
from esol.ops.metrics import ThresholdCurve
from esol.pipeline import cam, config_file, crew, inference, job, made, masks, registry
from esol.stages import evaluate, localize, vote

STEPS = {"classify": 4, "decide": 4, "expand": 2, "shrink": 2, "psa": 3, "irn": 2, "segment": 2}
PARTS: list[tuple[Any, str, str]] = [
    (reader.ShardReader, "_read", "read, checksum"),
    (inference, "decode", "decode photo"),
    (predict, "decode", "decode photo"),
    (made, "decode_mask", "decode PNG"),
    (made.StageShards, "arrays", "unpack maps"),
    (Heads, "class_maps", "network"),
    (AffinityNet, "forward", "network"),
    (IrnNet, "forward", "network"),
    (DeepLab, "forward", "network"),
    (class_maps.ClassMaps, "_enlarged", "resize"),
    (tiles, "scale_to_grid", "resize"),
    (model, "within", "resize"),
    (cam, "class_maps", "maps, the rest"),
    (segmentation, "blended", "resize probabilities"),
    (model, "enlarged_labels", "resize probabilities"),
    (ThresholdCurve, "update", "score"),
    (masks, "confusion_matrix", "score"),
    (masks, "judge_counts", "judge"),
    (vote, "judge_counts", "judge"),
    (evaluate, "judge_counts", "judge"),
    (lattice.Kernel, "__init__", "CRF, lattice"),
    (dense_crf.DenseCrf, "infer", "CRF, mean field"),
    (pseudo_labels, "random_walk", "walk"),
    (pseudo_labels, "feature_affinity", "affinities"),
    (pseudo_labels, "boundary_affinity", "affinities"),
    (pseudo_labels, "_enlarge", "resize"),
    (pseudo_labels, "auto_threshold", "thresholds"),
    (localize, "_pack", "pack maps"),
    (masks, "encode_mask", "encode PNG"),
    (vote, "encode_mask", "encode PNG"),
    (evaluate, "encode_mask", "encode PNG"),
    (predict, "encode_mask", "encode PNG"),
    (inference, "write_mirror_shard", "write shard"),
    (inference, "atomic_write", "write counts"),
    (predict, "atomic_write", "write files"),
    (predict, "_save", "encode overlay"),
    (predict, "paint", "paint overlay"),
]


class Parts:
    """Seconds by part, each without what the parts inside it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    def timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        """The function, whose own time counts under the label."""

        @functools.wraps(function)
        def inner(*arguments: Any, **named: Any) -> Any:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._inside.append(0.0)
            begun = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                took = time.perf_counter() - begun
                self.seconds[label] += took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        return inner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--photos", required=True, type=Path)
    parser.add_argument("--config", default="configs/voc-animals.yaml")
    parser.add_argument("--run", default="runs/inference_profile", type=Path, help="made anew")
    args = parser.parse_args()
    parts, rows = Parts(), []
    crew.GPU_THREADS = 1
    for owner, name, label in PARTS:
        setattr(owner, name, parts.timed(getattr(owner, name), label))

    def measured(what: str, work: Callable[[], Any], photos: int) -> Any:
        parts.seconds.clear()
        begun = time.perf_counter()
        found = work()
        total = time.perf_counter() - begun
        own = sorted(parts.seconds.items(), key=lambda item: -item[1])
        said = ", ".join(f"{label} {1e3 * s / photos:.1f}" for label, s in own if s > 0.004 * total)
        rest = total - sum(parts.seconds.values())
        rows.append([what, f"{1e3 * total / photos:.1f}", f"{said}, rest {1e3 * rest / photos:.1f}"])
        return found

    run = inference.InferenceStage.run

    def stage_run(self: inference.InferenceStage[Any]) -> Any:
        data, index = self.context.config.data, self.context.index
        photos = len(np.unique(np.concatenate([index.split(getattr(data, key)) for key in self.splits])))
        return measured(self.name, lambda: run(self), photos)

    inference.InferenceStage.run = stage_run  # type: ignore[method-assign]
    shutil.rmtree(args.run, ignore_errors=True)
    overrides = [f"run_dir={args.run}", f"data.root={args.data}", "data.workers=0", "tracking.uri=none"]
    overrides += [f"data.{key}_split=train" for key in ("train", "mask", "score", "eval")]
    overrides += [f"{name}.duration={count} steps" for name, count in STEPS.items()]
    overrides += [f"{name}.global_batch=4" for name in ("segment", "psa", "irn")]
    overrides += ["tracking.pictures=0", "engine.threads=1"]
    config = config_file.load(args.config, overrides)
    job.run_job(config)
    torch.set_num_threads(1)
    photos = sum(1 for _ in args.photos.iterdir())
    for fast in (False, True):
        out = args.run / f"predicted-{fast}"
        what = f"esol predict{' --fast' if fast else ''}"
        measured(what, lambda out=out, fast=fast: predict.predict(args.run, args.photos, out, fast=fast), photos)
    names = ", ".join(registry.table())
    print(f"\n{machine()}\n{args.config}, {photos} photos predicted; stages: {names}\n")
    print(table(("stage", "ms a photo", "of it"), rows))


if __name__ == "__main__":
    main()
