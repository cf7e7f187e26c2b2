"""One process of a job: accepts a run, holds its directory, and goes through its stages."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from esol.base.errors import LaunchError, refused
from esol.base.files import atomic_write, hold, writable
from esol.base.strangers import refuse_links
from esol.config import Config
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.data.samples import encode_jpeg
from esol.data.transforms import decode, within
from esol.engines import make_engine
from esol.engines.base import Engine, gather_text
from esol.pipeline import needs, records
from esol.pipeline.config_file import to_yaml
from esol.pipeline.context import Context
from esol.pipeline.registry import table
from esol.pipeline.runner import check_splits, chosen, photos, run_stages
from esol.pipeline.store import Store
from esol.pipeline.weights import WEIGHTS
from esol.report.page.layers import FILES
from esol.report.page.page import FIRST, PAGE, write_page
from esol.report.tables import aligned, headline, short_report, stage_rows, summary
from esol.tracking.mlflow_store import STATE
from esol.tracking.tracker import JSONL, MLFLOW_LOG, Tracker
from esol.training.loop import Stopped, StopSignal

EXAMPLE = 128  # pixels, long side of the photo that MLflow shows as an example of what the model takes
_WRITTEN = (".lock", "resolved.yaml", JSONL, MLFLOW_LOG, STATE, f".{STATE}.lock", records.RESULTS, PAGE, f"{PAGE}.tmp",
            FIRST, FILES, "pictures", "stalled", "features")  # fmt: skip
"""In the run directory, besides the folders of stages."""

_PATIENCE = 60  # seconds for an earlier job in the same run directory to be gone


def run_job(config: Config, only: Sequence[str] | None = None, resume: bool = False) -> int:
    """Runs the stages of a config, or only some of them, and returns the exit code; EsolError for what can be mended.

    resume: an interrupted stage goes on from its last checkpoint.
    """
    if not resume and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise LaunchError(
            "torchrun was told to start this job again where a process fails (--max-restarts), and each time an "
            "interrupted stage would begin anew: add --resume"
        )
    chosen(config, only)
    index = Index.load(config.data.root, config.data.cache)
    check_splits(config, index, only)
    index.check_files()
    run_dir, engine = Path(config.run_dir), make_engine(config.engine, config.seed)
    with engine.watched(run_dir / "stalled"):
        code = _work(config, only, resume, engine, index)
    if code:
        return code
    if engine.is_main:
        print(f"\n{aligned(short_report(run_dir))}\n\n{aligned(summary(records.finished(run_dir)))}\n")
        print(f"all numbers: esol report --full {run_dir}", flush=True)
        if config.tracking.page:
            print(f"to look at: {run_dir / PAGE}", flush=True)
    engine.close()
    return 0


def _work(config: Config, only: Sequence[str] | None, resume: bool, engine: Engine, index: Index) -> int:
    run_dir = Path(config.run_dir)
    stages = Store(config, table(), index.hash, engine.beat)
    names = [stage.name for stage in chosen(config, only)]
    needs.check(config, index, engine, lambda: stages.plan(names))  # nothing is written before a run is accepted
    writable(run_dir)
    refuse_links(*(run_dir / name for name in _WRITTEN))
    reason = ""
    if engine.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock = hold(run_dir / ".lock", _PATIENCE)  # as long as this function runs
            if lock.unlocked:
                print(
                    f"warning: {run_dir} cannot be locked ({lock.unlocked}): see to it that no other job works in it",
                    file=sys.stderr,
                )
            atomic_write(run_dir / "resolved.yaml", to_yaml(config))
        except TimeoutError as other:
            reason = f"{run_dir} is in use by {other}: wait for it, end it, or set another run_dir"
        except OSError as error:  # a full or read-only disk: the other ranks must not take it for a lost peer
            reason = refused(error, run_dir)
    if reason := "".join(gather_text(engine, reason)):
        raise LaunchError(reason)
    tracked = Tracker(config, engine.is_main, index.hash, engine.world_size, resume, profile=_contents(index))
    with tracked as tracker, StopSignal() as stop:
        reader = ShardReader(index, config.data.cache, photos(config, index))
        context = Context(config, engine, tracker, index, reader, stop, resume)
        try:
            run_stages(context, only, stages, partial(_show, context))
            if engine.is_main and ((run_dir / PAGE).exists() or _page(context)):
                tracker.artifact(run_dir / PAGE)
        except Stopped as stopped:
            context.say(f"{stopped}; go on with --resume")
            return stopped.code
    return 0


def _show(context: Context, stage: str) -> None:
    """Brings what people look at up to date behind a stage: the page, and MLflow's numbers and model."""
    tracker, found = context.tracker, records.finished(context.run_dir)
    tracker.headline({"photos": len(context.index), "classes": len(context.index.classes)} | headline(found))
    row = next(row for row in stage_rows(found) if row.name == stage)
    numbers = {"miou": row.miou, "judge": row.judge, "seconds": row.seconds}
    tracker.headline({name: value for name, value in numbers.items() if value is not None}, stage)
    if found[stage].makes == "model":
        first = int(context.index.split(context.config.data.mask_split)[0])
        photo = within(decode(context.reader.image(first), context.reader.name(first)), EXAMPLE)
        example = encode_jpeg(Image.fromarray(photo.permute(1, 2, 0).numpy()))
        tracker.model(context.run_dir / stage / WEIGHTS, example)
    _page(context)


def _contents(index: Index) -> dict[str, Any]:
    """What a set of photos holds: photos, classes, and photos of each split and class."""
    found: dict[str, Any] = {"photos": len(index), "classes": len(index.classes)}
    found |= {f"split {name}": len(index.split(name)) for name in index.splits}
    if index.labels is not None:
        found |= {name: int(n) for name, n in zip(index.classes, index.labels.sum(0), strict=True)}
    return found


def _page(context: Context) -> bool:
    """Writes the page of the run as it stands; False where the config wants none, or it cannot be written."""
    if not context.config.tracking.page:
        return False
    try:
        write_page(context.run_dir, context.config, context.index, context.reader, context.engine.beat)
    except Exception as error:  # it is there to look at: nothing that befalls it may end a run
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        context.say(f"warning: {context.run_dir / PAGE} could not be written ({reason}); the run goes on")
        return False
    return True
