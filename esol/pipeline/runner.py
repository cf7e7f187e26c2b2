"""The stages of a run, in order: which of them run, and which are skipped because what they made still stands."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esol.base.errors import CheckpointError, ConfigError, DataError
from esol.base.strangers import refuse_links
from esol.config import Config
from esol.data.index import Index
from esol.engines.base import gather_text
from esol.pipeline import records
from esol.pipeline.context import Context
from esol.pipeline.registry import Stage, known_stage, table
from esol.pipeline.store import Store

HEADLINE = {"loss", "images_per_second", "labelled", "accuracy", "seconds", "threshold", "judge", "initial_weights"}
"""What is printed of a finished stage, besides the mIoU of its scores; results.json has all."""


def chosen(config: Config, only: Sequence[str] | None) -> list[type[Stage]]:
    """The stages to run, in the table's order; ConfigError for a name that is not in it or not in the config."""
    stages = {name: known_stage(name) for name in (*config.stages, *(only or ()))}
    for name in only or ():
        if name not in config.stages:
            raise ConfigError(f"--stages {name}: the config's stages are {', '.join(config.stages)}")
    order = list(table())
    for name in config.stages:
        missing = [n for n in stages[name].consumes(config) if n not in config.stages]
        if missing:
            raise ConfigError(f"stages: {name} needs {', '.join(missing)}; add it to stages")
        late = [n for n in stages[name].consumes(config) if order.index(n) > order.index(name)]
        if late:
            raise ConfigError(
                f"stages: {name} reads {', '.join(late)}, which stands behind it: give it another `after`"
            )
    names = config.stages if only is None else only
    return [stage for name, stage in table().items() if name in names]


def check_splits(config: Config, index: Index, only: Sequence[str] | None) -> None:
    """DataError, before any work, for a split that a chosen stage will want and the shards have not."""
    for stage in chosen(config, only):
        for name, split in stage.settings(config)["data"].items():
            if name.endswith("_split") and split not in index.splits:
                raise DataError(
                    f"data.{name} = {split}, which stage {stage.name} needs, but {index.root} has: "
                    f"{', '.join(index.splits)}. Set data.{name} to one of them, or leave the stage out of stages"
                )


def photos(config: Config, index: Index) -> NDArray[np.int64]:
    """The samples of all splits that the config's stages read, whichever of them run now, in rising order."""
    stages = [known_stage(name).settings(config)["data"].items() for name in config.stages]
    names = {split for items in stages for name, split in items if name.endswith("_split")}
    return np.unique(np.concatenate([index.splits.get(name, np.zeros(0, np.int64)) for name in sorted(names)]))


def run_stages(
    context: Context, only: Sequence[str] | None, store: Store, finished: Callable[[str], object] = lambda name: None
) -> None:
    """Runs or skips every chosen stage and keeps results.json up to date.

    finished: called with its name on the main rank after a stage, while the others may go on.
    """
    stages = chosen(context.config, only)
    for number, stage in enumerate(stages, 1):
        task = _look(context, stage, store)
        place = f"stage {number} of {len(stages)}, {stage.name}"
        if task["error"]:
            raise CheckpointError(task["error"])
        if not task["why"]:
            context.say(f"{place}: done before with these settings, skipped")
            continue
        context.say(f"{place}: runs again, {task['why']}" if task["had"] else place)
        context.settings, context.fingerprint = task["settings"], task["fingerprint"]
        _run(context, stage, store)
        if context.engine.is_main:
            finished(stage.name)


def _run(context: Context, stage: type[Stage], store: Store) -> None:
    work = stage(context)
    if context.engine.is_main:
        work.folder.mkdir(parents=True, exist_ok=True)
        (work.folder / records.MANIFEST).unlink(missing_ok=True)
    context.engine.barrier(f"the folder of {stage.name}")
    begun = time.monotonic()
    context.engine.beat(f"the start of {stage.name}")
    with context.tracker.stage(stage.name):
        results = work.run()
        results.others["seconds"] = round(time.monotonic() - begun, 1)
        flat = results.flat()
        if context.engine.is_main:
            store.finish(stage.name, results, context.engine.world_size)
            # no earlier, or a fault in between would cost the whole stage
            shutil.rmtree(work.folder / "checkpoints", ignore_errors=True)
        context.tracker.results(flat)
    context.engine.barrier(f"the manifest of {stage.name}")
    if context.engine.is_main:
        for line in work.remarks(records.results(context.run_dir)):
            context.say(line)
    headline = HEADLINE | {f"{name}_miou" for name in results.scores if "_at_" not in name and name != "best"}
    shown = (f"{k} {v}" if isinstance(v, str) else f"{k} {v:.4g}" for k, v in flat.items() if k in headline)
    context.say(f"{stage.name}: " + ", ".join(shown))


def _look(context: Context, stage: type[Stage], store: Store) -> dict[str, Any]:
    """What the main rank finds of a stage, on every rank: why it must run, whether it had run before, or an error."""
    task: dict[str, Any] = {"error": "", "why": "", "had": False, "settings": {}, "fingerprint": ""}
    if context.engine.is_main:
        try:
            store.plan([stage.name])
            state = store.state(stage.name)
            task |= {"why": state.why, "had": state.manifest is not None}
            if state.why:
                refuse_links(context.run_dir / stage.name)
            task |= {"settings": store.settings(stage.name), "fingerprint": store.stamp(stage.name)}
            if not state.why:
                store.write_results()  # its folder may come from another run
        except CheckpointError as error:
            task["error"] = str(error)
    found: dict[str, Any] = json.loads(gather_text(context.engine, json.dumps(task))[0])
    return found
