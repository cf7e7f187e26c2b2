"""The photos and scenes of benchmarks.transfer: how each set is made of the data at hand, and which splits it has."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.main_line import ROOT
from shards.coco import coco_source
from shards.folder import folder_source
from shards.samples import Source
from shards.synthetic import synthetic_source
from shards.voc import voc_source
from shards.voc_xml import labels_of

ANIMALS = ("cat", "cow", "dog", "horse", "person", "sheep")
MASKS = "SegmentationClassAug"
Choice = Callable[[dict[str, set[str]]], list[str]]  # of ids, given the labels of all


@dataclass(frozen=True)
class TransferSet:
    """A set: source(data, scratch) makes it; photos: it counts in the targets; overrides: which splits it has."""

    source: Callable[[Path, Path], Source]
    photos: bool = False
    overrides: tuple[str, ...] = ()


def _animals(data: Path, scratch: Path, classes: Sequence[str], choose: Choice) -> Source:
    """Photos of voc-animals' train_aug that `choose` takes, given the labels of all in an order drawn once."""
    root = data / "voc-animals"
    ids = (ROOT / "configs/voc-animals/train_aug.txt").read_text().split()
    random.Random(0).shuffle(ids)
    known = {i: set(labels_of(f"{root}/Annotations/{i}.xml")) & set(classes) for i in ids}
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "train.txt").write_text("".join(f"{i}\n" for i in sorted(choose(known))))
    return voc_source(str(root), ["train"], classes, masks=MASKS, ids_dir=str(scratch), long_side=320)


def _first(count: int) -> Choice:
    return lambda known: list(known)[:count]


def _of_each(count: int) -> Choice:
    """So many photos with each class alone."""

    def choose(known: dict[str, set[str]]) -> list[str]:
        each = {
            name: [i for i, own in known.items() if own == {name}][:count]
            for name in sorted(set().union(*known.values()))
        }
        return [i for ids in each.values() for i in ids]

    return choose


def _with_and_without(count: int) -> Choice:
    return lambda known: [i for i in known if known[i]][:count] + [i for i in known if not known[i]][:count]


def _all_animals(data: Path, scratch: Path) -> Source:
    lists = str(ROOT / "configs/voc-animals")
    return voc_source(
        str(data / "voc-animals"),
        ["train_aug", "train"],
        ANIMALS,
        masks=MASKS,
        ids_dir=lists,
        long_side=320,
    )


def _tiles(data: Path, scratch: Path) -> Source:
    """Folders by class as a labels.csv; `free` has no defect, so that its label is empty."""
    root, rows = data / "magnetic-tiles", []
    for folder in sorted((root / "images").iterdir()):
        rows += [
            (f"{folder.name}/{p.name}", "" if folder.name == "free" else folder.name) for p in sorted(folder.iterdir())
        ]
    scratch.mkdir(parents=True, exist_ok=True)
    for name in ("images", "masks"):
        (scratch / name).unlink(missing_ok=True)
        (scratch / name).symlink_to((root / name).absolute(), target_is_directory=True)
    with (scratch / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "labels"), *rows])
    return folder_source(str(scratch))


def _scenes(classes: int, count: int) -> TransferSet:
    """Scenes to learn from; masks are made of at most 100 others, which are scored."""
    splits = ("data.mask_split=val", "data.score_split=val") if count > 100 else ()
    held = 100 if count > 100 else 0
    return TransferSet(lambda data, scratch: synthetic_source(count, held, 192, classes=classes), overrides=splits)


def _coco(data: Path, scratch: Path) -> Source:
    root = data / "coco-tiny"
    pairs = [(str(root / name), str(root / f"annotations/instances_{name}.json")) for name in ("train2017", "val2017")]
    return coco_source([p[0] for p in pairs], [p[1] for p in pairs], ["train", "val"])


def _more_classes(source: Source, count: int) -> Source:
    """Classes behind the others that no photo shows."""
    return replace(source, classes=(*source.classes, *(f"never-{i}" for i in range(count))))


def _twice(source: Source) -> Source:
    again = "-again"

    def read(key: str) -> dict[str, bytes]:
        sample = source.read(key.removesuffix(again))
        return {**sample, "__key__": key}  # type: ignore[dict-item]  # webdataset's own is text

    return replace(source, splits={n: [*k, *(f"{i}{again}" for i in k)] for n, k in source.splits.items()}, read=read)


SETS: dict[str, TransferSet] = {
    "animals-3131": TransferSet(
        _all_animals, True, ("data.train_split=train_aug", "data.mask_split=train", "data.score_split=train")
    ),
    "animals-400": TransferSet(lambda data, at: _animals(data, at, ANIMALS, _first(400)), True),
    "animals-60": TransferSet(lambda data, at: _animals(data, at, ("cow", "dog", "horse"), _of_each(20)), True),
    "three-classes": TransferSet(lambda data, at: _animals(data, at, ("cat", "dog", "sheep"), _of_each(80)), True),
    "cat-or-not": TransferSet(lambda data, at: _animals(data, at, ("cat",), _with_and_without(120)), True),
    "tiles": TransferSet(_tiles),
    **{f"scenes-{c}-{n}": _scenes(c, n) for n in (100, 1000) for c in (5, 10, 20)},
    "coco-tiny": TransferSet(_coco),
}
# animals-400 with something changed that must not matter; --scales compares their seeds
SCALES: dict[str, TransferSet] = {
    "animals-400": SETS["animals-400"],
    "60 classes more": TransferSet(lambda data, at: _more_classes(SETS["animals-400"].source(data, at), 60)),
    "every photo twice": TransferSet(lambda data, at: _twice(SETS["animals-400"].source(data, at))),
    "half the batch": TransferSet(
        SETS["animals-400"].source,
        overrides=tuple(f"{stage}.global_batch=8" for stage in ("classify", "decide", "expand", "shrink")),
    ),
}
