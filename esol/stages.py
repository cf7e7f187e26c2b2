"""The stages of a run, in order, and how one hands over to the next.

A stage writes the folder run_dir/<stage>: its outputs and, last, manifest.json with what went in (settings, the hash of
every stage and shard set that it consumed), what came out (files by content hash) and its results. A stage whose
manifest still fits is skipped; one whose settings or inputs changed runs again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from esol import affinity_labels, displacement, evaluation, fit, localization, masks
from esol.config import Config
from esol.context import Context, Results
from esol.data.index import Index
from esol.errors import CheckpointError, ConfigError, DataError
from esol.files import atomic_write, sha256
from esol.report import SOURCES
from esol.schema import differing, fingerprint, semantic

HEADLINE = {"loss", "images_per_second", "labelled", "right", "seconds"}
HEADLINE |= {f"{source}_miou" for source in SOURCES}
HEADLINE |= {"threshold", "plain_miou", "crf_miou", "initial_weights"}  # results.json has all


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    consumes: the earlier stages that it reads under a config; settings: what of the config shapes its result;
    run(context, folder): does the work on every rank, writes its outputs and returns its results (the main rank's
    count); produces: files below its folder, by pattern, whose content is its result.
    """

    name: str
    consumes: Callable[[Config], tuple[str, ...]]
    settings: Callable[[Config], dict[str, Any]]
    run: Callable[[Context, Path], Results]
    produces: str


def _reads(*needed: str, optional: tuple[str, ...] = ()) -> Callable[[Config], tuple[str, ...]]:
    """Stages that it always reads, and those that it reads where the run has them."""
    return lambda config: (*needed, *(name for name in optional if name in config.stages))


def _masks(config: Config) -> tuple[str, ...]:
    return (config.mask_stage,) if config.mask_stage else ()


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


_TABLE = (
    Stage("classify", _reads(), _training("classify"), fit.classify, "model.safetensors"),
    Stage("decide", _reads("classify"), _training("decide"), fit.decide, "model.safetensors"),
    Stage("expand", _reads("classify", optional=("decide",)), _training("expand"), fit.expand, "model.safetensors"),
    Stage("shrink", _reads("classify", "expand"), _training("shrink"), fit.shrink, "model.safetensors"),
    Stage(
        "localize",
        _reads("classify", optional=("decide", "expand", "shrink")),
        _inference("localize"),
        localization.localize,
        "index.json",
    ),
    Stage("seed_masks", _reads("localize"), _inference("seed_masks", "saliency"), masks.seed_masks, "index.json"),
    Stage("psa_labels", _reads("localize"), _inference("psa_labels"), affinity_labels.psa_labels, "index.json"),
    Stage("psa", _reads("classify", "psa_labels"), _pairs("model", "psa"), fit.psa, "model.safetensors"),
    Stage("psa_masks", _reads("localize", "psa"), _inference("psa_masks", "saliency"), masks.psa_masks, "index.json"),
    Stage("irn_labels", _reads("localize"), _inference("irn_labels"), affinity_labels.irn_labels, "index.json"),
    Stage("irn", _reads("classify", "irn_labels"), _pairs("model", "irn"), fit.irn, "model.safetensors"),
    Stage("irn_mean", _reads("irn"), _inference(), displacement.irn_mean, "model.safetensors"),
    Stage("irn_masks", _reads("localize", "irn"), _inference("irn_masks", "saliency"), masks.irn_masks, "index.json"),
    Stage("segment", _masks, _pairs("segment"), fit.segment, "model.safetensors"),
    Stage("evaluate", _reads("segment"), _settings(("eval_split",), "evaluate"), evaluation.evaluate, "index.json"),
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


def run_stages(context: Context, only: Sequence[str] | None) -> None:
    """Runs or skips every chosen stage and keeps results.json up to date."""
    for stage in chosen(context.config, only):
        folder = context.run_dir / stage.name
        settings = {**stage.settings(context.config), **_weights(context, stage)}
        consumed = {"data": context.index.hash}
        for name in stage.consumes(context.config):
            consumed[name] = _output_hash(context, name, stage.name)
        stamp = fingerprint(stage.name, settings, consumed)
        manifest = _read_manifest(folder)
        fits = (
            manifest is not None and manifest["fingerprint"] == stamp and _outputs(stage, folder) == manifest["outputs"]
        )
        if not context.engine.any(context.engine.is_main and not fits):
            if context.engine.is_main and manifest is not None:  # its folder may come from another run
                _add_results(context.run_dir / "results.json", stage.name, manifest["results"])
            context.say(f"{stage.name}: done before with these settings, skipped")
            continue
        if manifest is not None:
            context.say(f"{stage.name}: runs again, {_difference(manifest, settings, consumed)}")
        context.settings, context.fingerprint = settings, stamp
        context.engine.barrier(f"all ranks to see that {stage.name} is to run")
        if context.engine.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.json").unlink(missing_ok=True)
        context.engine.barrier(f"the folder of {stage.name}")
        begun = time.monotonic()
        context.engine.beat(f"the start of {stage.name}")
        with context.tracker.stage(stage.name):
            results = stage.run(context, folder)
            results["seconds"] = round(time.monotonic() - begun, 1)
            if context.engine.is_main:
                _write_manifest(stage, folder, context, settings, consumed, results)
                # no earlier, or a fault in between would cost the whole stage
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                _add_results(context.run_dir / "results.json", stage.name, results)
            context.tracker.results(results)
        context.engine.barrier(f"the manifest of {stage.name}")
        shown = (f"{k} {v}" if isinstance(v, str) else f"{k} {v:.4g}" for k, v in results.items() if k in HEADLINE)
        context.say(f"{stage.name}: " + ", ".join(shown))


def _weights(context: Context, stage: Stage) -> dict[str, Any]:
    """The initial weights count by content, not by place."""
    if stage.name not in ("classify", "psa", "irn", "segment"):
        return {}
    weights = (context.config.segment.model if stage.name == "segment" else context.config.model).weights
    return {"weights": sha256(Path(weights)) if Path(weights).is_file() else weights}


def _write_manifest(
    stage: Stage, folder: Path, context: Context, settings: dict[str, Any], consumed: dict[str, str], results: Results
) -> None:
    manifest = {
        "stage": stage.name,
        "fingerprint": context.fingerprint,
        "settings": settings,
        "consumed": consumed,
        "outputs": _outputs(stage, folder),
        "results": results,
        "world_size": context.engine.world_size,
        "versions": {name: version(name) for name in ("esol", "torch", "torchvision", "numpy")},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    atomic_write(folder / "manifest.json", json.dumps(manifest, indent=1))


def _outputs(stage: Stage, folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.glob(stage.produces))}


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        return manifest if {"fingerprint", "settings", "consumed", "outputs", "results"} <= manifest.keys() else None
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): delete the folder to run the stage again") from error


def _output_hash(context: Context, name: str, consumer: str) -> str:
    manifest = _read_manifest(context.run_dir / name)
    if manifest is None:
        raise CheckpointError(
            f"{consumer} needs {name}, which has not finished in {context.run_dir}: add it to --stages"
        )
    settings = json.loads(json.dumps(STAGES[name].settings(context.config)))
    was = {key: manifest["settings"].get(key) for key in settings}
    if changed := [f"{key}: {old!r} -> {new!r}" for key, old, new in differing(was, settings)]:
        raise CheckpointError(f"{name} in {context.run_dir} has other settings ({'; '.join(changed)}): run it again")
    outputs = _outputs(STAGES[name], context.run_dir / name)
    if outputs != manifest["outputs"]:
        raise CheckpointError(f"{context.run_dir / name}: outputs do not match manifest.json: run {name} again")
    return hashlib.sha256(json.dumps([manifest["fingerprint"], outputs], sort_keys=True).encode()).hexdigest()[:16]


def _difference(manifest: dict[str, Any], settings: dict[str, Any], consumed: dict[str, str]) -> str:
    """What changed since a manifest was written, for people."""
    changed = [
        f"{key}: {old!r} -> {new!r}"
        for key, old, new in differing(manifest["settings"], json.loads(json.dumps(settings)))
    ]
    names = dict.fromkeys((*consumed, *manifest["consumed"]))
    changed += [f"its input {n} changed" for n in names if manifest["consumed"].get(n) != consumed.get(n)]
    return "; ".join(changed) or "its outputs were missing or changed"


def _add_results(path: Path, stage: str, results: Results) -> None:
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything[stage] = results
    ordered = {name: everything[name] for name in STAGES if name in everything}
    atomic_write(path, json.dumps(ordered, indent=1) + "\n")
