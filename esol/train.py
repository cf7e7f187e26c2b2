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
import textwrap
from pathlib import Path

if __name__ == "__main__":  # launchers put esol/ first on the path, where its modules would shadow others
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before exits.entry takes it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from esol.base import exits
from esol.base.errors import refused

AGAIN = "finished stages, shards and checkpoints are kept, go on with --resume"


class _Help(argparse.Action):
    """--help, which names the stages: they are imported only when somebody asks."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from esol.pipeline.registry import table

        names = {kind: [n for n, stage in table().items() if stage.default is kind] for kind in (True, False)}
        parser.epilog = (
            f"stages, in order:\n{textwrap.indent(textwrap.fill(', '.join(names[True]), 100), '  ')}\n"
            f"only where a config names them:\n  {', '.join(names[False])}\n\n"
            "example:\n  esol run --config configs/demo.yaml --stages classify,decide --set seed=1 --resume"
        )
        parser.print_help()
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a run, shared by this file and `esol run`; the parser is made with add_help=False."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-h", "--help", action=_Help, nargs=0, help="show this help message, and the stages")
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
    place = args.config
    try:
        from esol.pipeline.config_file import load  # and torch with it, for every stage brings its section

        engine = [f"engine.name={args.engine}"] if args.engine else []
        config = load(args.config, [*args.overrides, *engine])
        place = config.run_dir  # what could not be written, where the error does not say
        from esol.pipeline.job import run_job  # and what starts processes with it, once the config is one

        return run_job(config, args.stages.split(",") if args.stages else None, args.resume)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        print(f"error: {refused(error, place)}", file=sys.stderr, flush=True)
        return exits.MEND


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    add_arguments(parser)
    return run(parser.parse_args())


def main() -> int:
    """The entry of launchers; returns the exit code."""
    return exits.entry(_main, AGAIN)


if __name__ == "__main__":
    sys.exit(main())
