"""The stages that make pseudo masks and the label maps that affinity networks learn from, both out of class maps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esol.base.errors import EsolError
from esol.base.files import atomic_write
from esol.base.palette import VOID
from esol.base.schema import finite
from esol.config import Auto, Config, MaskConfig
from esol.data.index import Index
from esol.data.samples import encode_mask
from esol.ops.metrics import METRICS, Counts, ThresholdCurve, confusion_matrix, score
from esol.ops.pseudo_labels import Cue, pseudo_masks
from esol.ops.saliency import saliency_channels, saliency_labels
from esol.ops.seeds import best_class
from esol.pipeline.context import Context
from esol.pipeline.inference import InferenceStage, Members, Sample, Tally
from esol.pipeline.made import StageShards
from esol.pipeline.registry import table
from esol.pipeline.saliency import lacking_maps, saliency_map
from esol.pipeline.scores import Results, Scores, by_class
from esol.pipeline.weights import initial_weights
from esol.report.judge import Evidence, Label
from esol.report.pictures import Pixels, heat, paint


@dataclass(frozen=True)
class Mask:
    """Of one photo: scores (n, H, W) in 0..1 of its classes (n,), the label maps without and with the CRF, what the
    seeds say, and the classes that the mask had lost before the seeds stood in for them."""

    classes: Tensor
    scores: Tensor
    plain: Label
    refined: Label
    seeds: Label
    lost: list[int]


class MaskStage(InferenceStage[Mask]):
    """A stage that scores every pixel for the classes of its photo, from class maps, and makes pseudo masks of that.

    refines: whether it starts from the seeds, against which it is held then, and which stand in for what it loses;
    votes: whether vote_masks counts its masks.
    """

    makes = "masks"
    needs: ClassVar[tuple[str, ...]] = ("localize",)
    # seeds stand in for what is lost
    shaped_by: ClassVar[tuple[str, ...]] = ("data.mask_split", "data.score_split", "seed_masks", "saliency")
    produces: ClassVar[tuple[str, ...]] = ("index.*", "*.tar", "curves.json", "confusion.json")
    refines: ClassVar[bool] = False
    votes: ClassVar[bool] = True
    beside = True
    config: MaskConfig
    maps: StageShards

    def scores(self, image: Tensor, maps: dict[str, NDArray[Any]]) -> Tensor:
        """Scores (n, H, W) in 0..1 of a photo uint8 (3, H, W) on the engine's device, from localize's maps.npz."""
        raise NotImplementedError

    def scores_of(self, images: Sequence[Tensor], maps: Sequence[dict[str, NDArray[Any]]]) -> list[Tensor]:
        """The scores of several photos, for a stage that computes something for all of them in one pass."""
        return [self.scores(image, own) for image, own in zip(images, maps, strict=True)]

    def open(self) -> None:
        self.maps = StageShards(self.context, "localize")

    def _scored(
        self, samples: Sequence[Sample]
    ) -> tuple[list[dict[str, NDArray[Any]]], list[Tensor], list[Tensor], list[Tensor]]:
        """The maps of photos as localize wrote them, and on the device: the photos, their classes and their scores."""
        device = self.context.engine.device
        arrays = [self.maps.arrays(sample.ordinal, "maps.npz") for sample in samples]
        images = [sample.image.to(device) for sample in samples]
        classes = [torch.from_numpy(own["classes"]).to(device) for own in arrays]
        return arrays, images, classes, self.scores_of(images, arrays)

    def make(self, samples: Sequence[Sample]) -> list[Mask]:
        arrays, images, classes, scores = self._scored(samples)
        full = [torch.from_numpy(own["full"]).to(self.context.engine.device).float() / 255 for own in arrays]
        cues = [self._cue(*one) for one in zip(samples, images, scores, strict=True)]
        masks = [[one.cpu() for one in both] for both in pseudo_masks(images, scores, classes, self.config, cues)]
        lost = [
            [c for c in own["classes"].tolist() if not bool((refined == c + 1).any())]
            for own, (_, refined) in zip(arrays, masks, strict=True)
        ]
        edges: MaskConfig = self.context.config.named("seed_masks")
        flat = replace(edges, crf=replace(edges.crf, iterations=0))
        wanted = [self.refines and bool(own) and cue is None for own, cue in zip(lost, cues, strict=True)]
        made: dict[int, Mask] = {}
        for config in (edges, flat):  # elsewhere nobody would look at the seeds' edges
            some = [i for i, own in enumerate(wanted) if own == (config is edges)]
            seeds = pseudo_masks([images[i] for i in some], [full[i] for i in some], [classes[i] for i in some], config)
            for i, (said, sharp) in zip(some, seeds, strict=True):
                plain, refined = masks[i]
                if wanted[i]:
                    refined = stand_in(refined, sharp.cpu(), lost[i])
                made[i] = Mask(classes[i], scores[i], plain.numpy(), refined.numpy(), said.cpu().numpy(), lost[i])
        return [made[i] for i in range(len(samples))]

    def _cue(self, sample: Sample, image: Tensor, scores: Tensor) -> Cue | None:
        """What the photo's saliency map decides, where the config wants one."""
        saliency, config = saliency_map(self.context, sample, image), self.context.config.saliency
        if saliency is None:
            return None
        labels = saliency_labels(scores, saliency, floor=config.floor, conflict=config.conflict)
        return Cue(labels, saliency_channels(scores, saliency, floor=config.floor))

    def members(self, sample: Sample, made: Mask) -> Members:
        return {"mask.png": encode_mask(made.refined)}

    def confidence(self, sample: Sample, mask: Label) -> NDArray[np.float32]:
        """The score of a pixel's class, before the CRF, or what the best score leaves for background; 0 for void.

        The CRF's own probabilities are of little use here: all but all of them are 0 or 1.
        """
        (arrays,), _, (classes,), (scores,) = self._scored([sample])
        label = torch.from_numpy(mask).to(scores.device)
        found = (label == 0) * (1 - best_class(scores, classes)[1])
        for number, own in zip(arrays["classes"].tolist(), scores, strict=True):
            found = torch.where(label == number + 1, own, found)
        return found.cpu().numpy()

    def count(self, sample: Sample, made: Mask) -> Tally:
        classes = len(self.context.index.classes)
        counts = judge_counts(sample, made.refined, made.classes.tolist(), classes, made.seeds, made.lost)
        if sample.truth is not None:
            curve = ThresholdCurve(classes)
            winner, best = (t.cpu().numpy() for t in best_class(made.scores, made.classes))
            curve.update(sample.truth, winner, best)
            counts |= {"curve": curve.counts}
            for name, label in (("plain", made.plain), ("crf", made.refined)):
                counts |= against_truth(name, sample.truth, label, classes)
        return counts

    def tiles(self, sample: Sample, made: Mask) -> dict[str, Pixels]:
        pixels, best = sample.pixels, best_class(made.scores, made.classes)[1].cpu().numpy()
        return {
            "best score": heat(pixels, best),
            f"above {self.config.threshold}": paint(pixels, made.plain),
            "with CRF": paint(pixels, made.refined),
        }

    def results(self, tally: Tally) -> Results:
        """plain and crf, at the stated threshold; best: without the CRF, at the threshold of the highest mIoU."""
        context, split = self.context, self.context.config.data.score_split
        results = Results()
        if "crf" in tally and tally["crf"].any():  # nothing but void is no truth
            curve = ThresholdCurve(len(self.context.index.classes))
            curve.add(tally["curve"])
            write_curves(context, self.folder, {"plain": curve})
            write_confusion(self.folder, tally["crf"])
            best = curve.best()
            results.scores["plain"] = scored(tally, "plain", split, self.config.threshold)
            if self.config.crf.iterations:
                results.scores["crf"] = scored(tally, "crf", split, self.config.threshold)
            results.scores["best"] = Scores.of(best, split, best.threshold)
            results.last = list(results.scores)[-2]
            classes = by_class(score(tally["crf"]), context.index.classes, "iou")
            results.scores[results.last] = replace(results.scores[results.last], classes=classes)
            results.others = {"threshold": self.config.threshold}
            results.others |= {"split": split, "initial_weights": initial_weights(context.config.model)}
        results.others |= Evidence.of(tally).numbers(context.index.classes, self.name)
        return results

    def remarks(self, results: Mapping[str, Mapping[str, Any]]) -> list[str]:
        return mask_remarks(self.context.config, self.name, results, self.refines)

    @classmethod
    def lacks(cls, config: Config, index: Index, world_size: int) -> Iterator[EsolError]:
        """Saliency maps of every photo, where the config wants them."""
        return lacking_maps(config, index)


def mask_stages() -> list[str]:
    """The stages that make masks, in order."""
    return [name for name, stage in table().items() if stage.makes == "masks"]


def highest(judged: Mapping[str, float]) -> str:
    """The name with the highest number, of equal ones the first; "" of none."""
    return max(judged, key=lambda name: judged[name], default="")


def judged_masks(config: Config, results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The judge's number of every mask stage of the run that has one."""
    return {
        n: float(results[n]["judge"]) for n in mask_stages() if n in config.stages and "judge" in results.get(n, {})
    }


def mask_remarks(
    config: Config, name: str, results: Mapping[str, Mapping[str, Any]], refines: bool = False
) -> list[str]:
    """Sentences on masks that have just been made: what they lack, and whether refining made them worse."""
    own, known = results[name], mask_stages()
    lines: list[str] = []
    if "judge" not in own:
        return lines
    if own["lost"]:
        instead = "; the seeds stand in there" if refines else ""
        lines.append(f"{name}: {own['lost']:.1f} % of the labels have no pixel in their photo's mask{instead}")
    if own["filled"]:
        lines.append(f"{name}: {own['filled']:.1f} % of the labels cover their whole photo")
    judged = judged_masks(config, {n: results[n] for n in known[: known.index(name) + 1] if n in results})
    if refines and judged[name] < judged.get("seed_masks", 0):
        lines.append(f"warning: {name} made the masks worse than the seeds, by the judge ({spoken(judged)})")
    return lines


def spoken(judged: Mapping[str, float]) -> str:
    """The judge's numbers in a line."""
    return ", ".join(f"{name} {number:.3f}" for name, number in judged.items())


def judge_counts(
    sample: Sample,
    mask: Label,
    classes: Sequence[int],
    num_classes: int,
    seeds: Label | None = None,
    lost: Sequence[int] = (),
) -> Tally:
    """What the judge of masks without truth counts of one photo."""
    evidence = Evidence.empty(num_classes)
    evidence.add(sample.image.numpy(), mask, classes, lost=lost, seeds=seeds)
    return {**evidence.tally()}


def against_truth(name: str, truth: Label, mask: Label, num_classes: int) -> Tally:
    """What the scores of one photo's label map are made of; void counts as background in it."""
    said = np.where(mask == VOID, np.uint8(0), mask)
    counts: Tally = {name: confusion_matrix(truth, said, num_classes + 1)}
    for metric, own in METRICS.items():
        counts[f"{name}.{metric}"] = own.count(truth, said, num_classes + 1)
    return counts


def scored(tally: Tally, name: str, split: str, threshold: float | Auto | None = None) -> Scores:
    """The scores that `against_truth` counted under that name."""
    more = {metric: own.value(tally[f"{name}.{metric}"]) for metric, own in METRICS.items()}
    return Scores.of(score(tally[name]), split, threshold, **more)


def stand_in(mask: Tensor, seeds: Tensor, lost: list[int]) -> Tensor:
    """The mask (H, W) with the seeds' pixels of the lost classes in its background.

    A photo's label says that the class is there, so that a mask without it is known to be wrong.
    """
    wanted = torch.tensor([c + 1 for c in lost], dtype=seeds.dtype, device=seeds.device)
    return torch.where(torch.isin(seeds, wanted) & (mask == 0), seeds, mask)


def write_confusion(folder: Path, matrix: Counts) -> None:
    """confusion.json: pixels by the label of the truth (rows) and by that of the mask, background first."""
    atomic_write(folder / "confusion.json", json.dumps(matrix.tolist()) + "\n")


def write_curves(context: Context, folder: Path, curves: dict[str, ThresholdCurve]) -> None:
    """curves.json, and the same points for MLflow."""
    rows: dict[str, list[dict[str, float]]] = {}
    for source, curve in curves.items():
        rows[source] = []
        for step, one in enumerate(curve.scores()):
            values = {"miou": 100 * one.miou, "precision": 100 * one.mean_precision, "recall": 100 * one.mean_recall}
            rows[source].append({"threshold": one.threshold, **values})
            context.tracker.metrics(
                step, {f"{name} over threshold in percent/{source}": value for name, value in values.items()}
            )
    atomic_write(folder / "curves.json", json.dumps(finite(rows), indent=1, allow_nan=False))
