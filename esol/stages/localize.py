"""Stage localize: class maps of all trained heads, scored as seeds and written as shards that mirror the input."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from esol.base.errors import ConfigError
from esol.base.palette import VOID
from esol.base.schema import key, one_of
from esol.config import Config, MapsConfig, MaskConfig
from esol.data.samples import decode_mask
from esol.engines.base import gather_text
from esol.ops.class_maps import ClassMaps
from esol.ops.metrics import Score, ThresholdCurve
from esol.ops.pseudo_labels import pseudo_masks
from esol.ops.seeds import best_class
from esol.pipeline.cam import PAPER_THRESHOLD, MapStage, cam_stages, trained_heads
from esol.pipeline.crew import Crew
from esol.pipeline.inference import Members, Sample, Tally
from esol.pipeline.likeness import likeness, parted
from esol.pipeline.masks import highest, spoken, write_curves
from esol.pipeline.registry import register
from esol.pipeline.scores import Results, Scores, by_class
from esol.pipeline.weights import initial_weights
from esol.report.judge import FINE, Evidence, Label, rank_maps

PART = "part.png"  # optional member, 255 on an object's telling part: recall is then also given for the rest, the body
SAMPLED = 64  # photos by which write = auto chooses: maps of all heads and their CRF cost a second a photo
SEEN = 80  # pixels, long side of the maps in seen.npz


@dataclass(frozen=True)
class LocalizeConfig(MapsConfig):
    """Class maps of the trained stages, scored as seeds, and written as shards that mirror the input."""

    write: str = key("auto")  # whose maps later stages get: auto (the judge's choice), last, cam, or a stage
    # photos that a pass has at once, of those whose scaled sizes are alike; for a GPU
    batch: int = key(1, low=1, high=1024, unit="images")


@register
class Localize(MapStage):
    """Makes and writes the maps of data.mask_split and data.score_split, and scores those of the latter."""

    name = "localize"
    after = "shrink"
    section = LocalizeConfig
    version = 6
    needs = ("classify",)
    makes = "maps"
    produces = ("index.*", "*.tar", "curves.json")
    config: LocalizeConfig

    @classmethod
    def consumes(cls, config: Config) -> tuple[str, ...]:
        """All stages of the run whose maps there are."""
        return tuple(s.name for s in cam_stages() if s.name in (*cls.needs, *config.stages))

    @classmethod
    def check(cls, config: Config) -> None:
        write, made_by = config.section(LocalizeConfig).write, {stage.source: stage.name for stage in cam_stages()}
        one_of(write, ("auto", "last", *made_by), "localize.write")
        stage = made_by.get(write)
        if stage is not None and stage not in (*cls.needs, *config.stages):
            raise ConfigError(
                f"localize.write = {write}, but stages has no {stage}: add it, or set localize.write to last"
            )

    def open(self) -> None:
        self.net = self.context.ready(trained_heads(self.context.config, len(self.context.index.classes)))
        choose = self.config.write == "auto" and len(self.net) > 1
        self.judged = judged_maps(self) if choose else {}
        self.written = map_source(self.judged, self.config.write, list(self.net))

    @property
    def batch(self) -> int:
        return self.config.batch

    def members(self, sample: Sample, made: dict[str, ClassMaps]) -> Members:
        return {"maps.npz": _pack(made[self.written]), "seen.npz": _pack_small(made)}

    def count(self, sample: Sample, made: dict[str, ClassMaps]) -> Tally:
        """The curve of every source, and that of the body where the shard tells parts from bodies."""
        if sample.truth is None:
            return {}
        members, reader = self.context.index.members, self.context.reader
        truths = {"": sample.truth}
        if PART in members and members[PART][sample.ordinal, 0] >= 0:
            part = decode_mask(reader.read(sample.ordinal, PART), sample.name)
            truths["_body"] = np.where(part > 0, np.uint8(VOID), sample.truth)
        counts: Tally = {}
        for source, own in made.items():
            winner, score = (t.cpu().numpy() for t in best_class(own.full, own.classes))
            for suffix, truth in truths.items():
                curve = ThresholdCurve(len(self.context.index.classes))
                curve.update(truth, winner, score)
                counts[source + suffix] = curve.counts
        return counts

    def results(self, tally: Tally) -> Results:
        """Each source's scores at its best threshold; *_at_cam: at the one that is best for the CAM."""
        context, classes = self.context, self.context.index.classes
        split = context.config.data.score_split
        curves = {source: ThresholdCurve(len(classes)) for source in tally if tally[source].any()}
        for source, curve in curves.items():
            curve.add(tally[source])
        results = Results()
        for source in (s for s in self.net if s in curves):
            best, cam = curves[source].best(), curves["cam"].best().threshold
            for name, score in (
                (source, best),
                (f"{source}_at_cam", curves[source].at(cam)),
                (f"{source}_at_{PAPER_THRESHOLD:g}", curves[source].at(PAPER_THRESHOLD)),
            ):
                more = {}
                if f"{source}_body" in curves and name != f"{source}_at_{PAPER_THRESHOLD:g}":
                    more["body_recall"] = _foreground_recall(curves[f"{source}_body"].at(score.threshold))
                results.scores[name] = Scores.of(score, split, score.threshold, **more)
            results.scores[source].classes.update(by_class(best, classes, "iou"))
            self.thresholds[source] = best.threshold
        write_curves(context, self.folder, curves)
        results.others = {"write": self.written, **{f"{name}_judge": number for name, number in self.judged.items()}}
        results.others |= {"split": split, "initial_weights": initial_weights(context.config.model)}
        return results

    def remarks(self, results: Mapping[str, Mapping[str, Any]]) -> list[str]:
        return map_remarks(self.judged, self.written)


def map_source(judged: Mapping[str, float], write: str, sources: Sequence[str]) -> str:
    """Whose maps are written, of the sources that the run has, in the order of the stages."""
    if write == "auto":
        return highest(judged) or sources[-1]
    return sources[-1] if write == "last" else write


def map_remarks(judged: Mapping[str, float], written: str) -> list[str]:
    """Sentences on whose maps are written, and on a last stage that made them worse."""
    if not judged:
        return []
    best, last = highest(judged), list(judged)[-1]
    lines = [f"localize: writes the maps of {written}; the judge: {spoken(judged)}"]
    if best != last:
        lines.append(f"warning: {last} made the maps worse than {best}'s, by the judge")
    return lines


def judged_maps(stage: MapStage) -> dict[str, float]:
    """The judge's number of every source's maps, by a sample of the photos, on every rank; a collective.

    The maps become masks as seed_masks makes them by default, and what those show is divided by how much of what the
    backbone finds alike they part, as a share of what the first source's do: contrast alone likes the part of an object
    that has the strongest edges.
    """
    engine, classes = stage.context.engine, stage.context.index.classes
    evidence: dict[str, Evidence] = {}
    seen: Counter[str] = Counter()
    crew = Crew(engine.device)

    def masks(ordinal: int) -> tuple[Sample, dict[str, tuple[Label, int]]]:
        sample, found = stage.sample(ordinal), dict[str, tuple[Label, int]]()
        with torch.no_grad(), crew.room(sample.size):
            image = sample.image.to(engine.device)
            made = stage.make([sample])[0]
            with engine.autocast():
                alike = likeness(stage.net.net.backbone, image)
            for source, own in made.items():
                [(_, mask)] = pseudo_masks([image], [own.full], [own.classes], MaskConfig())
                found[source] = mask.cpu().numpy(), round(FINE * parted(alike, mask))
        return sample, found

    for sample, found in crew.map(masks, sampled_photos(stage)[engine.rank :: engine.world_size]):
        for source, (mask, cut) in found.items():
            own = evidence.setdefault(source, Evidence.empty(len(classes)))
            own.add(sample.image.numpy(), mask, sample.classes)
            seen[source] += cut
    counted = {source: {key: value.tolist() for key, value in asdict(e).items()} for source, e in evidence.items()}
    total: dict[str, Evidence] = {}
    cuts: Counter[str] = Counter()
    for text in gather_text(engine, json.dumps([counted, seen])):
        each, own_cuts = json.loads(text)
        cuts.update(own_cuts)
        for source, counts in each.items():
            own = total.setdefault(source, Evidence.empty(len(classes)))
            for field in fields(Evidence):
                getattr(own, field.name)[...] += np.array(counts[field.name], np.int64)
    return rank_maps({source: own.numbers(classes)["judge"] for source, own in total.items()}, cuts)


def sampled_photos(stage: MapStage) -> list[int]:
    """Photos with a label by which maps are compared, evenly spread over the splits that masks are made for."""
    index, data = stage.context.index, stage.context.config.data
    ordinals = np.unique(np.concatenate([index.split(getattr(data, key)) for key in stage.splits]))
    chosen = ordinals[np.linspace(0, len(ordinals) - 1, min(4 * SAMPLED, len(ordinals))).astype(int)]
    labelled = [int(o) for o in np.unique(chosen) if stage.context.reader.labels(int(o)).any()]
    return [labelled[i] for i in np.unique(np.linspace(0, len(labelled) - 1, SAMPLED).astype(int))] if labelled else []


def _pack(maps: ClassMaps) -> bytes:
    """maps.npz: classes int64 (n,), stride 4 float16 (n, H/4, W/4), full uint8 (n, H, W) in 1/255."""
    return _npz(
        classes=maps.classes.cpu().numpy(),
        stride4=maps.low.cpu().numpy().astype(np.float16),
        full=(maps.full * 255).round().to(torch.uint8).cpu().numpy(),
    )


def _pack_small(made: dict[str, ClassMaps]) -> bytes:
    """seen.npz, for people to look at: every source's maps, uint8 (n, h, w) in 1/255, long side SEEN at most."""
    small = {}
    for source, own in made.items():
        height, width = own.low.shape[1:]  # the full ones cost sixteen times as much, and nothing else needs them all
        scale = min(1.0, SEEN / max(height, width))
        size = (max(1, round(scale * height)), max(1, round(scale * width)))
        low = own.low if len(own.low) else own.low.new_zeros(1, height, width)
        pooled = F.adaptive_avg_pool2d(low[None], size)[0][: len(own.low)]
        small[source] = (pooled * 255).round().to(torch.uint8).cpu().numpy()
    return _npz(**small)


def _npz(**arrays: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _foreground_recall(score: Score) -> float:
    return 100 * float(np.nanmean(score.recall[1:]))
