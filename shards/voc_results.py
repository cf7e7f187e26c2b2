"""What VOC's evaluation server takes: results/VOC2012/Segmentation/comp6_test_cls/ID.png, and the archive to upload."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np

from esol.base.errors import DataError
from esol.base.files import atomic_write
from esol.base.palette import VOID
from esol.base.progress import progress
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.samples import decode_mask, encode_mask
from shards.voc import CLASSES


def export_voc_results(root: str, out: str, competition: str, split: str = "") -> tuple[int, Path]:
    """Writes the masks of a set under VOC's class numbers, and OUT/results.tgz; returns their number and the archive.

    competition: comp5 (nothing but VOC's own data, not even weights from ImageNet) or comp6; split: may be left out
    where the set has one. DataError where OUT is not empty, a class is none of VOC's, or a sample lacks a sound mask
    without void: the server takes all images or none.
    """
    index, folder = Index.load(root), Path(out)
    if not split and len(index.splits) != 1:
        raise DataError(f"{root} has the splits {', '.join(index.splits)}: say which one with --split")
    split = split or next(iter(index.splits))
    if foreign := [name for name in index.classes if name not in CLASSES]:
        raise DataError(f"{root}: {', '.join(foreign)} is no class of VOC, whose server this is for")
    if "mask.png" not in index.members:
        raise DataError(f"{root} holds no masks: give the folder of a run's stage evaluate, or of a mask stage")
    numbers = np.zeros(256, np.uint8)
    numbers[1 : len(index.classes) + 1] = [CLASSES.index(name) + 1 for name in index.classes]
    ordinals = index.split(split)
    reader = ShardReader(index, wanted=ordinals)
    place = folder / "results/VOC2012/Segmentation" / f"{competition}_{split}_cls"
    try:
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} is not empty: choose another folder")
        place.mkdir(parents=True)
        with progress("export", len(ordinals), "masks", visible=True) as advance:
            for count, ordinal in enumerate(map(int, ordinals), 1):
                name = f"{reader.name(ordinal)}: mask.png"
                key = str(index.keys[ordinal])
                if key != Path(key).name:
                    raise DataError(f"{name}: {key!r} is no id of VOC's")
                levels = decode_mask(reader.read(ordinal, "mask.png"), name, len(index.classes))
                if (levels == VOID).any():
                    raise DataError(f"{name} holds void (255), which the server refuses: give predictions")
                atomic_write(place / f"{key}.png", encode_mask(numbers[levels]))
                advance(count, "")
        archive = folder / "results.tgz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder / "results", "results")
    except OSError as error:
        raise DataError(f"cannot write to {error.filename or folder}: {error.strerror or error}") from error
    return len(ordinals), archive
