"""The stages of a run, in order: which of them run, and which are skipped because what they made still stands."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

from esol import affinity_labels, displacement, evaluation, fit, localization, masks, vote
from esol.base.errors import CheckpointError, ConfigError, DataError
from esol.base.schema import semantic
from esol.config import MASK_STAGES, VOTERS, Config
from esol.data.index import Index
from esol.engines.base import gather_text
from esol.ops.class_maps import SOURCES
from esol.pipeline.context import Context
from esol.pipeline.judging import remarks
from esol.pipeline.registry import Stage
from esol.pipeline.store import MANIFEST, Store
from esol.pipeline.store import results as store_results

HEADLINE = {"loss", "images_per_second", "labelled", "right", "seconds"}
HEADLINE |= {f"{source}_miou" for source in SOURCES}
HEADLINE |= {"threshold", "plain_miou", "crf_miou", "judge", "initial_weights"}  # results.json has all


def _reads(*needed: str, optional: tuple[str, ...] = ()) -> Callable[[Config], tuple[str, ...]]:
    """Stages that it always reads, and those that it reads where the run has them."""
    return lambda config: (*needed, *(name for name in optional if name in config.stages))


def _any_of(names: tuple[str, ...]) -> Callable[[Config], tuple[str, ...]]:
    """Those of the stages that the run has, and the first of them at least."""
    return lambda config: tuple(name for name in names if name in config.stages) or names[:1]


def _masks(config: Config) -> tuple[str, ...]:
    """What segment reads: the masks that it is told to learn from, or all that the judge chooses from."""
    given = config.segment.masks
    if given == "auto":
        return _any_of(MASK_STAGES)(config)
    return () if given == "truth" else (given,)


def _settings(data: tuple[str, ...], *sections: str) -> Callable[[Config], dict[str, Any]]:
    """Fields of `data`, whole sections, the seed and the engine: what is not named is no reason to run again."""

    def settings(config: Config) -> dict[str, Any]:
        fields = semantic(config.data)
        own = {section: semantic(getattr(config, section)) for section in ("engine", *sections)}
        return {"data": {name: fields[name] for name in data}, "seed": config.seed, **own}

    return settings


def _training(name: str) -> Callable[[Config], dict[str, Any]]:
    return _settings(("train_split", "long_side", "crop", "damaged"), "model", name)


def _pairs(*sections: str) -> Callable[[Config], dict[str, Any]]:
    return _settings(("mask_split", "damaged"), *sections)


def _inference(*sections: str) -> Callable[[Config], dict[str, Any]]:
    return _settings(("mask_split", "score_split"), *sections)


_WEIGHTS = ("model.safetensors",)
_SHARDS = ("index.json", "*.tar")
_SCORED = (*_SHARDS, "curves.json")

# A version goes up when the stage's code gives another result from the same inputs (tests/end_to_end/test_versions.py).
_TABLE = (
    Stage("classify", _reads(), _training("classify"), fit.classify, _WEIGHTS, version=2),
    Stage("decide", _reads("classify"), _training("decide"), fit.decide, _WEIGHTS, version=2),
    Stage("expand", _reads("classify", optional=("decide",)), _training("expand"), fit.expand, _WEIGHTS, version=2),
    Stage("shrink", _reads("classify", "expand"), _training("shrink"), fit.shrink, _WEIGHTS, version=2),
    Stage(
        "localize",
        _reads("classify", optional=("decide", "expand", "shrink")),
        _inference("localize"),
        localization.localize,
        _SCORED,
        version=3,
    ),
    Stage("seed_masks", _reads("localize"), _inference("seed_masks", "saliency"), masks.seed_masks, _SCORED, version=3),
    Stage("psa_labels", _reads("localize"), _inference("psa_labels"), affinity_labels.psa_labels, _SHARDS, version=2),
    Stage("psa", _reads("classify", "psa_labels"), _pairs("model", "psa"), fit.psa, _WEIGHTS),
    Stage(
        "psa_masks",
        _reads("localize", "psa"),
        _inference("psa_masks", "seed_masks", "saliency"),
        masks.psa_masks,
        _SCORED,
        version=3,
    ),
    Stage("irn_labels", _reads("localize"), _inference("irn_labels"), affinity_labels.irn_labels, _SHARDS, version=2),
    Stage("irn", _reads("classify", "irn_labels"), _pairs("model", "irn"), fit.irn, _WEIGHTS),
    Stage("irn_mean", _reads("irn"), _inference(), displacement.irn_mean, _WEIGHTS),
    Stage(
        "irn_masks",
        _reads("localize", "irn"),
        _inference("irn_masks", "seed_masks", "saliency"),
        masks.irn_masks,
        _SCORED,
        version=3,
    ),
    Stage("vote_masks", _any_of(VOTERS), _inference(), vote.vote_masks, _SHARDS),
    Stage("segment", _masks, _pairs("segment"), fit.segment, _WEIGHTS),
    Stage(
        "evaluate", _reads("segment"), _settings(("eval_split",), "evaluate"), evaluation.evaluate, _SHARDS, version=2
    ),
)
STAGES = {stage.name: stage for stage in _TABLE}


def chosen(config: Config, only: Sequence[str] | None) -> list[Stage]:
    """The stages to run, in the table's order; ConfigError for a name that is not in it or not in the config."""
    for name in (*config.stages, *(only or ())):
        if name not in STAGES:
            raise ConfigError(f"there is no stage {name!r}: known are {', '.join(STAGES)}")
    for name in only or ():
        if name not in config.stages:
            raise ConfigError(f"--stages {name}: the config's stages are {', '.join(config.stages)}")
    names = config.stages if only is None else only
    for name in config.stages:
        missing = [n for n in STAGES[name].consumes(config) if n not in config.stages]
        if missing:
            raise ConfigError(f"stages: {name} needs {', '.join(missing)}; add it to stages")
    return [stage for stage in STAGES.values() if stage.name in names]


def check_splits(config: Config, index: Index, only: Sequence[str] | None) -> None:
    """DataError, before any work, for a split that a chosen stage will want and the shards have not."""
    for stage in chosen(config, only):
        for name, split in stage.settings(config)["data"].items():
            if name.endswith("_split") and split not in index.splits:
                raise DataError(
                    f"data.{name} = {split}, which stage {stage.name} needs, but {index.root} has: "
                    f"{', '.join(index.splits)}. Set data.{name} to one of them, or leave the stage out of stages"
                )


def run_stages(context: Context, only: Sequence[str] | None, store: Store) -> None:
    """Runs or skips every chosen stage and keeps results.json up to date."""
    for stage in chosen(context.config, only):
        folder = context.run_dir / stage.name
        task = _look(context, stage, store)
        if task["error"]:
            raise CheckpointError(task["error"])
        if not task["why"]:
            context.say(f"{stage.name}: done before with these settings, skipped")
            continue
        if task["had"]:
            context.say(f"{stage.name}: runs again, {task['why']}")
        context.settings, context.fingerprint = task["settings"], task["fingerprint"]
        if context.engine.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MANIFEST).unlink(missing_ok=True)
        context.engine.barrier(f"the folder of {stage.name}")
        begun = time.monotonic()
        context.engine.beat(f"the start of {stage.name}")
        with context.tracker.stage(stage.name):
            results = stage.run(context, folder)
            results["seconds"] = round(time.monotonic() - begun, 1)
            if context.engine.is_main:
                store.finish(stage.name, results, context.engine.world_size)
                # no earlier, or a fault in between would cost the whole stage
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            context.tracker.results(results)
        context.engine.barrier(f"the manifest of {stage.name}")
        if context.engine.is_main:
            for line in remarks(context.config, stage.name, store_results(context.run_dir)):
                context.say(line)
        shown = (f"{k} {v}" if isinstance(v, str) else f"{k} {v:.4g}" for k, v in results.items() if k in HEADLINE)
        context.say(f"{stage.name}: " + ", ".join(shown))


def _look(context: Context, stage: Stage, store: Store) -> dict[str, Any]:
    """What the main rank finds of a stage, on every rank: why it must run, whether it had run before, or an error."""
    task: dict[str, Any] = {"error": "", "why": "", "had": False, "settings": {}, "fingerprint": ""}
    if context.engine.is_main:
        try:
            store.plan([stage.name])
            state = store.state(stage.name)
            task |= {"why": state.why, "had": state.manifest is not None}
            task |= {"settings": store.settings(stage.name), "fingerprint": store.stamp(stage.name)}
            if not state.why:
                store.write_results()  # its folder may come from another run
        except CheckpointError as error:
            task["error"] = str(error)
    return json.loads(gather_text(context.engine, json.dumps(task))[0])
