"""What the judge of masks without truth decides and says: whose maps are written, which masks DeepLab learns from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from esol.config import MASK_STAGES, WALKS, Config, SeedMasksConfig
from esol.engines.base import gather_text
from esol.ops.class_maps import ClassMaps
from esol.ops.pseudo_labels import pseudo_mask
from esol.pipeline import store
from esol.pipeline.context import Context, Results
from esol.pipeline.inference import mask_splits, photo
from esol.report.judge import Evidence

SAMPLED = 64  # photos by which localize.write = auto chooses: maps of all stages and their CRF cost a second a photo


def highest(judged: Mapping[str, float]) -> str:
    """The name with the highest number, of equal ones the first; "" of none."""
    return max(judged, key=lambda name: judged[name], default="")


def judged_masks(config: Config, results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The judge's number of every mask stage of the run that has one."""
    return {n: float(results[n]["judge"]) for n in MASK_STAGES if n in config.stages and "judge" in results.get(n, {})}


def mask_source(context: Context) -> str:
    """The stage whose masks segment learns from, or "truth"; auto: the judge's first, and the run says so."""
    given = context.config.segment.masks
    if given != "auto":
        return given
    judged = judged_masks(context.config, store.results(context.run_dir))
    had = [name for name in reversed(MASK_STAGES) if name in context.config.stages]
    chosen = highest(judged) or had[0]
    context.say(f"segment: takes {chosen}, by the judge: {_list(judged)}" if judged else f"segment: takes {chosen}")
    return chosen


def map_source(judged: Mapping[str, float], write: str, sources: tuple[str, ...]) -> str:
    """Whose maps localize writes, of the sources that the run has, in the order of the stages."""
    if write == "auto":
        return highest(judged) or sources[-1]
    return sources[-1] if write == "last" else write


def sampled_photos(context: Context) -> list[int]:
    """Photos with a label by which maps are compared, evenly spread over the splits that masks are made for."""
    index = context.index
    ordinals = np.unique(np.concatenate([index.split(split) for split in mask_splits(context)]))
    chosen = ordinals[np.linspace(0, len(ordinals) - 1, min(4 * SAMPLED, len(ordinals))).astype(int)]
    labelled = [int(o) for o in np.unique(chosen) if context.reader.labels(int(o)).any()]
    return [labelled[i] for i in np.unique(np.linspace(0, len(labelled) - 1, SAMPLED).astype(int))] if labelled else []


def add_seeds(context: Context, evidence: dict[str, Evidence], ordinal: int, maps: Mapping[str, ClassMaps]) -> None:
    """Adds one photo's masks from the maps of every source, made as seed_masks makes them by default."""
    image = photo(context, ordinal)
    for source, own in maps.items():
        device = own.full.device
        mask = pseudo_mask(image.to(device), own.full, own.classes, SeedMasksConfig())[1]
        found = evidence.setdefault(source, Evidence.empty(len(context.index.classes)))
        found.add(image.numpy(), mask.cpu().numpy(), own.classes.tolist())


def all_ranks(context: Context, evidence: dict[str, Evidence]) -> dict[str, Evidence]:
    """The sum over all ranks, on every rank; a collective."""
    own = {source: {key: value.tolist() for key, value in asdict(e).items()} for source, e in evidence.items()}
    total: dict[str, Evidence] = {}
    for text in gather_text(context.engine, json.dumps(own)):
        for source, counts in json.loads(text).items():
            found = total.setdefault(source, Evidence.empty(len(context.index.classes)))
            for field in fields(Evidence):
                getattr(found, field.name)[...] += np.array(counts[field.name], np.int64)
    return total


def remarks(config: Config, name: str, results: Mapping[str, Results]) -> list[str]:
    """Sentences on a stage that has just run: what its masks lack, and whether it made them worse."""
    own = results.get(name, {})
    lines = []
    if name == "localize" and (maps := {k.removesuffix("_judge"): v for k, v in own.items() if k.endswith("_judge")}):
        last = list(maps)[-1]
        lines.append(f"localize: writes the maps of {own['write']}; the judge: {_list(maps)}")
        if highest(maps) != last:
            lines.append(f"warning: {last} made the maps worse than {highest(maps)}'s, by the judge")
    if name not in MASK_STAGES or "judge" not in own:
        return lines
    if own["lost"]:
        instead = "; the seeds stand in there" if name in WALKS else ""
        lines.append(f"{name}: {own['lost']:.1f} % of the labels have no pixel in their photo's mask{instead}")
    if own["filled"]:
        lines.append(f"{name}: {own['filled']:.1f} % of the labels cover their whole photo")
    judged = judged_masks(config, {n: results[n] for n in MASK_STAGES[: MASK_STAGES.index(name) + 1] if n in results})
    if name in WALKS and judged[name] < judged.get("seed_masks", 0):
        lines.append(f"warning: {name} made the masks worse than the seeds, by the judge ({_list(judged)})")
    return lines


def _list(judged: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {number:.3f}" for name, number in judged.items())
