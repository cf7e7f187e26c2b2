"""A run directory, opened to look at: what it came to, and its photos, maps and masks one by one."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from esol.base.errors import CheckpointError, DataError
from esol.config import Config, MapsConfig
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.samples import decode_mask
from esol.data.transforms import decode
from esol.models.folded import for_inference
from esol.models.heads import Heads
from esol.ops.class_maps import ClassMaps, class_maps
from esol.pipeline import records
from esol.pipeline.cam import cam_stages, ran_with_maps, trained_heads
from esol.pipeline.records import Manifest
from esol.pipeline.runner import photos
from esol.pipeline.scores import Scores
from esol.report.pictures import Pixels, heat, paint, sheet
from esol.report.tables import results_table


class Run:
    """A run whose stages have finished, up to some stage. EsolError where none has.

    Photos are named by their keys in the shards. Class maps are made when they are asked for, with the networks that
    the run has trained; everything else is read.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        records.finished(self.run_dir)

    def __repr__(self) -> str:
        return f"Run({str(self.run_dir)!r}): {', '.join(self.stages)}"

    def _repr_markdown_(self) -> str:
        return results_table(self.run_dir)

    @property
    def _manifests(self) -> dict[str, Manifest]:
        return records.finished(self.run_dir)

    @property
    def stages(self) -> list[str]:
        """Those that have finished, in order."""
        return list(self._manifests)

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Stage -> name -> number or word, as in results.json."""
        return {name: own.results for name, own in self._manifests.items()}

    @property
    def scores(self) -> dict[str, dict[str, Scores]]:
        """Stage -> what was scored ("cam", "plain", "crf", ...) -> its scores, with those of every class."""
        return {name: own.scores for name, own in self._manifests.items() if own.scores}

    @property
    def config(self) -> Config:
        """The config that its last finished stage ran with."""
        return records.ran_with(self.run_dir, *reversed(self.stages))

    @property
    def classes(self) -> tuple[str, ...]:
        """Without background; class i is number i + 1 in masks."""
        return self._index.classes

    @cached_property
    def _index(self) -> Index:
        return Index.load(self.config.data.root, self.config.data.cache)

    @cached_property
    def _reader(self) -> ShardReader:
        return ShardReader(self._index, self.config.data.cache, photos(self.config, self._index))

    @cached_property
    def _place(self) -> dict[str, int]:
        return {str(key): ordinal for ordinal, key in enumerate(self._index.keys)}

    def photos(self, split: str = "") -> list[str]:
        """The keys of the photos of a split of the shards, of all splits where none is named."""
        if split and split not in self._index.splits:
            raise DataError(f"{self._index.root} has no split {split}, but {', '.join(self._index.splits)}")
        return [str(key) for key in (self._index.keys[self._index.split(split)] if split else self._index.keys)]

    def _ordinal(self, key: str) -> int:
        if key not in self._place:
            raise DataError(f"{self._index.root} has no photo {key}")
        return self._place[key]

    def photo(self, key: str) -> Pixels:
        """uint8 (H, W, 3)."""
        ordinal = self._ordinal(key)
        return decode(self._reader.image(ordinal), self._reader.name(ordinal)).permute(1, 2, 0).numpy()

    def labels(self, key: str) -> list[str]:
        """The classes that the photo is labelled with."""
        return [self.classes[i] for i in np.flatnonzero(self._reader.labels(self._ordinal(key)))]

    def truth(self, key: str) -> NDArray[np.uint8] | None:
        """The photo's true mask (H, W), None where the shards have none."""
        ordinal, masks = self._ordinal(key), self._index.members.get("mask.png")
        if masks is None or masks[ordinal, 0] < 0:
            return None
        return decode_mask(self._reader.read(ordinal, "mask.png"), self._reader.name(ordinal), len(self.classes))

    def maps(self, key: str) -> dict[str, dict[str, NDArray[np.float32]]]:
        """Whose maps ("cam", "decide", "expand", "shrink") -> class of the photo -> its map (H, W) in 0..1."""
        found = self._class_maps(key)
        return {
            source: {
                self.classes[c]: full for c, full in zip(own.classes.tolist(), own.full.cpu().numpy(), strict=True)
            }
            for source, own in found.items()
        }

    def _class_maps(self, key: str) -> dict[str, ClassMaps]:
        settings, image = self._heads_config.section(MapsConfig), torch.from_numpy(self.photo(key))
        device = next(self._heads.parameters()).device
        labels = torch.from_numpy(self._reader.labels(self._ordinal(key)))
        return class_maps(
            [image.permute(2, 0, 1).to(device)],
            [labels.to(device)],
            self._heads,
            scales=settings.scales,
            flip=settings.flip,
            long_side=settings.long_side,
        )[0]

    @cached_property
    def _heads_config(self) -> Config:
        return ran_with_maps(self.run_dir)

    @cached_property
    def _heads(self) -> Heads:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return for_inference(trained_heads(self._heads_config, len(self.classes)), device, None)

    def mask(self, stage: str, key: str) -> NDArray[np.uint8]:
        """The mask (H, W) that a stage made of a photo: 0 background, 1 + i for classes[i], 255 void."""
        own = self._manifests.get(stage)
        if own is None or own.makes not in ("masks", "labels", "predictions"):
            had = [name for name, one in self._manifests.items() if one.makes in ("masks", "labels", "predictions")]
            raise CheckpointError(f"{self.run_dir} has no masks of {stage!r}, but of: {', '.join(had) or 'no stage'}")
        reader = self._masks(stage)
        found = np.flatnonzero(reader.index.keys == key)
        if not len(found):
            raise DataError(f"{stage} has made no mask of {key}: it is in none of its splits")
        member = "label.png" if own.makes == "labels" else "mask.png"
        return decode_mask(reader.read(int(found[0]), member), f"{stage}, {key}", len(self.classes))

    def _masks(self, stage: str) -> ShardReader:
        return ShardReader(Index.load(self.run_dir / stage))

    def plot(self, key: str) -> Image.Image:
        """The photo, every head's best map, the masks of every stage that has one of it, and the truth, in a row."""
        pixels = self.photo(key)
        tiles = {"photo": pixels}
        if cam_stages()[0].name in self._manifests:
            for source, own in self._class_maps(key).items():
                best = own.full.amax(0).cpu().numpy() if len(own.full) else np.zeros(pixels.shape[:2], np.float32)
                tiles[source] = heat(pixels, best)
        for stage, manifest in self._manifests.items():
            if manifest.makes in ("masks", "predictions") and (self._masks(stage).index.keys == key).any():
                tiles[stage] = paint(pixels, self.mask(stage, key))
        if (truth := self.truth(key)) is not None:
            tiles["truth"] = paint(pixels, truth)
        return sheet([(f"{key}: {', '.join(self.labels(key))}", list(tiles.values()))], list(tiles))
