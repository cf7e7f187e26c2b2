"""`esol auto`: from a folder of photos to masks, a model and a page to look at, without a decision."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from esol.base import exits
from esol.base.errors import DataError
from esol.base.files import atomic_write, writable
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.pipeline import records
from esol.pipeline.features import FEATURES
from esol.pipeline.recipe import CHAIN, OPTIONAL, Initial, Machine, Photos, config_text, find_weights, this_machine
from esol.report.tables import best_masks

CONFIG, ABOUT = "config.yaml", "auto.json"
CPU_MINUTES = 10.0  # that a run takes on a CPU where nobody says how many
SIDE_CPU, SIDE_GPU = 512, 1024  # pixels: larger photos are made smaller
FEWEST, FEW = 4, 20  # photos in all without which nothing starts; photos of a class below which a word is due
# of the usual training, of maps and walks and of DeepLab, as the time allows
SHARES = ((1.0, 1.0), (1.0, 0.5), (1.0, 0.3), (1.0, 0.2), (0.8, 0.2), (0.6, 0.2), (0.4, 0.2))
MARGIN = 0.9  # of the time that is planned for


def auto(
    photos: str,
    out: Path,
    labels: str = "",
    negatives: Sequence[str] = (),
    device: str = "auto",
    minutes: float | None = None,
) -> int:
    """Makes shards and a config of the photos, runs its stages and returns the exit code. What is there is kept.

    minutes: how long it may take; None: ten on a CPU, and as long as it takes on a GPU. EsolError, in one line, for
    whatever the user can mend.
    """
    machine = this_machine(device)
    initial = find_weights(machine)
    if not machine.gpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    writable(out)
    out.mkdir(parents=True, exist_ok=True)
    if code := _make_shards(photos, out, labels, negatives, SIDE_GPU if machine.gpu else SIDE_CPU):
        return code
    index = Index.load(str(out / "shards"))
    about = look(index)
    path = out / CONFIG
    if path.exists() and minutes is None:
        print(f"goes on with {path}; delete it, or give --minutes, to have it written anew")
    else:
        budget = CPU_MINUTES if minutes is None and not machine.gpu else minutes
        text, lines = plan(out, index, about, machine, initial, budget)
        atomic_write(path, text)
        print("\n".join(lines), flush=True)

    from esol.pipeline.config_file import load
    from esol.pipeline.job import run_job

    if code := run_job(load(path), resume=True):
        return code
    shutil.rmtree(out / FEATURES, ignore_errors=True)  # gigabytes that a run which is done has no use for
    print("\n".join(closing(photos, out)), flush=True)
    return 0


def _make_shards(photos: str, out: Path, labels: str, negatives: Sequence[str], side: int) -> int:
    """Calls `esol-shards create folder`, unless what it would read is what it has read; returns its exit code."""
    shards, stamp = out / "shards", _stamp(photos, labels, negatives, side)
    about = json.loads((out / ABOUT).read_text()) if (out / ABOUT).exists() else {}
    if about.get("photos") == stamp and (shards / "index.json").exists():
        print(f"{shards}: made before of these photos, kept")
        return 0
    command = [sys.executable, "-m", "shards", "create", "folder", photos, "--out", str(shards), "--drop-damaged"]
    command += ["--long-side", str(side), *(["--labels", labels] if labels else [])]
    command += [part for name in negatives for part in ("--negatives", name)]
    env = {name: value for name, value in os.environ.items() if name != exits.NOTED}  # its end is not this run's
    done = subprocess.run([*command, *(["--overwrite"] if shards.exists() else [])], env=env)
    if done.returncode == 0:
        atomic_write(out / ABOUT, json.dumps({"photos": stamp}) + "\n")
    return done.returncode


def _stamp(photos: str, labels: str, negatives: Sequence[str], side: int) -> str:
    """A hash of what shards are made from: names, sizes and times of all files, and the options."""
    files: list[tuple[str, int, int]] = []
    for place in [Path(photos), *([Path(labels)] if labels else [])]:
        for path in sorted([place, *place.rglob("*")] if place.is_dir() else [place]):
            if path.is_file():
                files.append((str(path), path.stat().st_size, path.stat().st_mtime_ns))
    return hashlib.sha256(json.dumps([files, labels, list(negatives), side]).encode()).hexdigest()[:16]


def look(index: Index) -> Photos:
    """What the shards hold, as far as the recipe asks; DataError where a classifier could learn nothing from them."""
    train = index.split("train") if "train" in index.splits else np.arange(0)
    if len(train) < FEWEST:
        raise DataError(
            f"{len(train)} photos to learn from are too few: a classifier needs some {FEW} of each class, and as many "
            "without it"
        )
    assert index.labels is not None  # create has just written them
    labels = index.labels[train]
    counts = labels.sum(0)
    if always := [name for name, count in zip(index.classes, counts, strict=True) if count == len(train)]:
        raise DataError(
            f"every photo is labelled {', '.join(always)}, so that nothing shows what is not: a classifier learns a "
            "class from photos with and without it. Add photos of another class, or photos of the same places without "
            "any object, in a folder named none"
        )
    for name, count in zip(index.classes, counts.tolist(), strict=True):
        if count < FEW:
            print(f"warning: {count} photos of {name} are few; from {FEW} on the maps become dependable")
    reader = ShardReader(index)
    sides = []
    for ordinal in train[np.linspace(0, len(train) - 1, min(50, len(train))).astype(int)]:
        sample = json.loads(reader.read(int(ordinal), "json"))
        sides.append(max(sample["width"], sample["height"]))
    splits = {name: len(ordinals) for name, ordinals in index.splits.items()}
    members = index.members.get("mask.png")
    masks = members is not None and bool((members[train, 0] >= 0).any())
    return Photos(len(train), int(np.median(sides)), splits, masks)


def plan(
    out: Path, index: Index, photos: Photos, machine: Machine, initial: Initial, minutes: float | None
) -> tuple[str, list[str]]:
    """The config's text, and lines for people on what will run and how long it takes.

    Where the time is short, stages of OPTIONAL are left out in their order before the training gets shorter, and
    DeepLab last of all.
    """
    from esol.pipeline.config_file import from_tree  # and torch with it
    from esol.pipeline.estimate import measure, seconds

    def config(stages: Sequence[str], share: tuple[float, float], reason: str = "") -> str:
        return config_text(out, photos, machine, initial, stages, share, reason)

    def without(*groups: Sequence[str]) -> list[str]:
        # where DeepLab has nothing to predict but what it learned from, nobody misses evaluate
        left = [*(stage for group in groups for stage in group), *(["evaluate"] if photos.evaluated == "train" else [])]
        return [stage for stage in CHAIN if stage not in left]

    print(f"measuring {machine.words} ...", flush=True)
    speed = measure(from_tree(yaml.safe_load(config(CHAIN, SHARES[0]))), index)
    irn, shrink, deeplab = OPTIONAL
    choices = [(without(*groups), SHARES[0]) for groups in ((), (irn,))]
    choices += [(without(irn, shrink), share) for share in SHARES]
    choices += [(without(irn, shrink, deeplab), share) for share in SHARES]
    took: dict[str, float] = {}
    for stages, share in choices:
        took = seconds(from_tree(yaml.safe_load(config(stages, share))), index, speed)
        if minutes is None or sum(took.values()) <= MARGIN * 60 * minutes:
            break
    about = max(1, round(sum(took.values()) / 60))
    reason = f"about {about} minute{'s' if about > 1 else ''} on {machine.words}"
    if left := [stage for stage in ("shrink", "irn", "segment") if stage not in stages]:
        reason += f"; without {', '.join(left)}, for which {minutes:g} minutes are too short"
    if share[0] < 1:
        reason += f"; training is {share[0]:.0%} as long as usual"
    if share[1] < 1 and "segment" in stages:
        reason += f"; DeepLab's {share[1]:.0%}"
    lines = [reason, "  " + ", ".join(f"{name} {round(own)} s" for name, own in took.items())]
    if minutes is not None and sum(took.values()) > 60 * minutes:
        lines.append(f"warning: this is more than --minutes {minutes:g}, and nothing more can be left out")
    return config(stages, share, reason), lines


def closing(photos: str, out: Path) -> list[str]:
    """Where things are, and three commands that go on from here."""
    found = records.finished(out)
    best = best_masks(found)
    lines = [f"masks: {out / best}", "", "next:"]
    lines += [f"  esol export-masks {out} --to coco     # or png, yolo, cvat, labelme, ..."]
    if "segment" in found:
        lines += [f"  esol predict {out} MORE-PHOTOS --out predictions     # masks of photos without any label"]
    lines += [f"  esol auto {photos} --out {out} --minutes 60     # longer training, more stages"]
    return lines
