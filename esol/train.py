"""Runs the stages of a config: the entry for every launcher.

    python esol/train.py --config configs/demo.yaml
    accelerate launch --config_file launch/cpu.yaml --num_processes 2 esol/train.py --config configs/demo.yaml
    torchrun --nproc-per-node 2 esol/train.py --config configs/demo.yaml --set seed=1 --stages classify,expand --resume

Exit codes: 0 done; 2 something the user can mend, said in one line; 75 stopped by a signal after saving, 130 by Ctrl-C,
70 a rank stood still or was lost (go on with --resume after any of them).
"""

from __future__ import annotations

import argparse
import errno
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # launchers put esol/ first on the path, where its modules would shadow others
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before exits.entry takes it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from esol import config as configuration
from esol.base import exits
from esol.base.errors import LaunchError

AGAIN = "finished stages, shards and checkpoints are kept, go on with --resume"
if TYPE_CHECKING:
    from esol.data.index import Index
    from esol.engines.base import Engine

_PATIENCE = 60  # seconds for an earlier job in the same run directory to be gone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a run, shared by this file and `esol run`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML, see configs/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        dest="overrides",
        help="overrides one key of the config",
    )
    parser.add_argument("--engine", choices=("accelerate", "deepspeed"), help="the same as --set engine.name=...")
    parser.add_argument("--stages", metavar="A,B", help="only these stages of the config (default: all of them)")
    parser.add_argument(
        "--resume", action="store_true", help="go on inside an interrupted stage from its last checkpoint"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it


def run(args: argparse.Namespace) -> int:
    """Runs the stages of args.config and returns the exit code."""
    try:
        engine = [f"engine.name={args.engine}"] if args.engine else []
        config = configuration.load(args.config, [*args.overrides, *engine])
        return _run(config, args.stages.split(",") if args.stages else None, args.resume)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        what = f"{error.filename or args.config}: {error.strerror}"
        print(f"error: {what}; when that is mended, go on with --resume", file=sys.stderr, flush=True)
        return exits.MEND


def _run(config: configuration.Config, only: list[str] | None, resume: bool) -> int:
    # torch, accelerate and MLflow only from here on: a mistake in the config is said at once
    from esol.data.index import Index
    from esol.engines import make_engine
    from esol.pipeline import store
    from esol.report.tables import summary
    from esol.stages import check_splits, chosen

    chosen(config, only)
    index = Index.load(config.data.root)
    check_splits(config, index, only)
    index.check_files()
    run_dir, engine = Path(config.run_dir), make_engine(config.engine, config.seed)
    with engine.watched(run_dir / "stalled"):
        code = _work(config, only, resume, engine, index)
    if code:
        return code
    if engine.is_main:
        stale = "".join(f"\nout of date: {line}" for line in store.outdated(run_dir))
        print(f"\n{summary(store.results(run_dir))}\n{stale}\nall numbers: esol report {run_dir}", flush=True)
    engine.close()
    return 0


def _work(config: configuration.Config, only: list[str] | None, resume: bool, engine: Engine, index: Index) -> int:
    """Accepts the run, holds its directory and goes through its stages."""
    from esol.base.files import atomic_write, hold, writable
    from esol.data.reader import ShardReader
    from esol.engines.base import gather_text
    from esol.pipeline import needs
    from esol.pipeline.context import Context
    from esol.pipeline.store import Store
    from esol.stages import STAGES, chosen, run_stages
    from esol.tracking.tracker import Tracker
    from esol.training.loop import Stopped, StopSignal

    run_dir = Path(config.run_dir)
    stages = Store(config, STAGES, index.hash, engine.beat)
    names = [stage.name for stage in chosen(config, only)]
    needs.check(config, index, engine, lambda: stages.plan(names))  # nothing is written before a run is accepted
    writable(run_dir)
    busy = ""
    if engine.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock = hold(run_dir / ".lock", _PATIENCE)  # as long as this function runs
            if lock.unlocked:
                print(
                    f"warning: {run_dir} cannot be locked ({lock.unlocked}): see to it that no other job works in it",
                    file=sys.stderr,
                )
            atomic_write(run_dir / "resolved.yaml", configuration.to_yaml(config))
        except TimeoutError as other:
            busy = f"{run_dir} is in use by {other}: wait for it, end it, or set another run_dir"
    if busy := "".join(gather_text(engine, busy)):
        raise LaunchError(busy)
    with Tracker(config, engine.is_main, index.hash, engine.world_size, resume) as tracker, StopSignal() as stop:
        context = Context(config, engine, tracker, index, ShardReader(index, config.data.cache), stop, resume)
        try:
            run_stages(context, only, stages)
        except Stopped as stopped:
            context.say(f"{stopped}; go on with --resume")
            return stopped.code
    return 0


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return run(parser.parse_args())


def main() -> int:
    """The entry of launchers; returns the exit code."""
    return exits.entry(_main, AGAIN)


if __name__ == "__main__":
    sys.exit(main())
