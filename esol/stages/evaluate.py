"""Stage evaluate: what DeepLab predicts for data.eval_split, scored where there is truth, with and without the CRF."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esol.config import CrfConfig, PredictionConfig
from esol.data.samples import encode_mask
from esol.models.backbones import build_backbone
from esol.models.deeplab import DeepLab
from esol.ops.metrics import score
from esol.ops.segmentation import by_parts, logits_by_scale
from esol.ops.tiles import Tile
from esol.pipeline import records
from esol.pipeline.inference import InferenceStage, Members, Sample, Tally
from esol.pipeline.made import StageShards
from esol.pipeline.masks import against_truth, judge_counts, mask_stages, scored, write_confusion
from esol.pipeline.registry import register
from esol.pipeline.scores import Results, by_class
from esol.pipeline.weights import initial_weights, restore
from esol.report.judge import Evidence, Label
from esol.report.pictures import Pixels, paint
from esol.stages.segment import SegmentConfig


@dataclass(frozen=True)
class EvaluateConfig(PredictionConfig):
    """Prediction and scores of data.eval_split, with and without the CRF; `esol predict` does the same."""


@dataclass(frozen=True)
class Predicted:
    """Of one photo: label maps without and with the CRF, and labels of the photo that they had lost."""

    plain: Label
    refined: Label
    lost: list[int]


class PredictingStage(InferenceStage[Predicted]):
    """Predicts label maps with a DeepLab, without and with the CRF, and writes the latter.

    network: the stage that trained it.
    """

    produces = ("index.*", "*.tar", "confusion.json")
    beside = True
    network: ClassVar[str]
    config: PredictionConfig

    def open(self) -> None:
        own = self.context.config.section(SegmentConfig)
        backbone = build_backbone(own.model, pretrained=False)
        net = DeepLab(backbone, len(self.context.index.classes) + 1, own.rates)
        self.net = self.context.ready(restore(net, self.context.config, self.network))
        self.masks = str(records.results(self.context.run_dir)[self.network]["masks"])
        self.learned = StageShards(self.context, self.masks) if self.masks in mask_stages() else None

    def labels(self, sample: Sample) -> list[int]:
        """The labels, 0 for background, that it may find in a photo."""
        return list(range(len(self.context.index.classes) + 1))

    def taught(self, sample: Sample) -> Label | None:
        """The mask of the photo that the network learned from, None where it learned from none or from the truth."""
        if self.learned is None or sample.ordinal not in self.learned:
            return None
        return self.learned.label_map(sample.ordinal, "mask.png")

    def make(self, samples: Sequence[Sample]) -> list[Predicted]:
        made = [Predicted(np.zeros(sample.size, np.uint8), np.zeros(sample.size, np.uint8), []) for sample in samples]
        for i, part, before, after in self._parts(samples, self.config):
            number = torch.tensor(self.labels(samples[i]), dtype=torch.uint8, device=before.device)
            made[i].plain[part.kept] = number[before.argmax(0)].cpu().numpy()
            made[i].refined[part.kept] = number[after.argmax(0)].cpu().numpy()
        return made

    def _parts(self, samples: Sequence[Sample], config: PredictionConfig) -> Iterator[tuple[int, Tile, Tensor, Tensor]]:
        """What by_parts says of the photos, of their labels alone; nothing of a photo that can only be background."""
        device, keys = self.context.engine.device, ", ".join(sample.key for sample in samples)
        some = [i for i, sample in enumerate(samples) if len(self.labels(sample)) > 1]
        images = [samples[i].image.to(device) for i in some]

        def tell(what: str) -> None:
            self.context.engine.beat(f"{what} of {keys}")

        with self.context.engine.autocast():
            found = logits_by_scale(
                images, self.net, scales=config.scales, flip=config.flip, combine=config.combine, tell=tell
            )
        known = [self.labels(samples[i]) for i in some]
        found = [[logits[labels] for logits in own] for own, labels in zip(found, known, strict=True)]
        for n, part, before, after in by_parts(images, found, config, tell):
            yield some[n], part, before, after

    def members(self, sample: Sample, made: Predicted) -> Members:
        return {"mask.png": encode_mask(made.refined)}

    def confidence(self, sample: Sample, mask: Label) -> NDArray[np.float32]:
        """How probable the network found the label, before the CRF, for which nobody has to wait then."""
        sure = np.ones(sample.size, np.float32)
        for _, part, before, _ in self._parts([sample], replace(self.config, crf=CrfConfig(iterations=0))):
            place = torch.zeros(len(self.context.index.classes) + 1, dtype=torch.int64, device=before.device)
            place[self.labels(sample)] = torch.arange(len(before), device=before.device)
            label = place[torch.from_numpy(mask[part.kept].astype(np.int64)).to(before.device)]
            sure[part.kept] = before.gather(0, label[None])[0].cpu().numpy()
        return sure

    def count(self, sample: Sample, made: Predicted) -> Tally:
        classes = len(self.context.index.classes)
        counts = judge_counts(sample, made.refined, sample.classes, classes, self.taught(sample), made.lost)
        if sample.truth is not None:
            for name, mask in (("plain", made.plain), ("crf", made.refined)):
                counts |= against_truth(name, sample.truth, mask, classes)
        return counts

    def tiles(self, sample: Sample, made: Predicted) -> dict[str, Pixels]:
        return {"prediction": paint(sample.pixels, made.plain), "with CRF": paint(sample.pixels, made.refined)}

    def results(self, tally: Tally) -> Results:
        context, split = self.context, getattr(self.context.config.data, self.scored)
        results = Results(last="plain")
        if "crf" in tally and tally["crf"].any():
            write_confusion(self.folder, tally["crf"])
            results.scores["plain"] = scored(tally, "plain", split)
            if self.config.crf.iterations:
                results.scores["crf"], results.last = scored(tally, "crf", split), "crf"
            classes = by_class(score(tally["crf"]), context.index.classes, "iou", "precision", "recall")
            # without a class that the truth lacks, and without the precision of one that is predicted nowhere
            classes = {name: {m: v for m, v in own.items() if not np.isnan(v)} for name, own in classes.items()}
            results.scores[results.last] = replace(results.scores[results.last], classes=classes)
        model = context.config.section(SegmentConfig).model
        results.others = {"split": split, "initial_weights": initial_weights(model), "masks": self.masks}
        results.others |= {"photos": len(context.index.split(split))}
        results.others |= Evidence.of(tally).numbers(context.index.classes, self.name)
        return results


@register
class Evaluate(PredictingStage):
    """Predicts data.eval_split."""

    name = "evaluate"
    after = "segment"
    section = EvaluateConfig
    version = 5
    needs = ("segment",)
    makes = "predictions"
    shaped_by = ("data.eval_split",)
    splits = ("eval_split",)
    scored = "eval_split"
    labelled = False
    network = "segment"
