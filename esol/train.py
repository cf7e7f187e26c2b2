"""Runs the stages of a config: the entry for every launcher.

    python esol/train.py --config configs/demo.yaml
    accelerate launch --config_file launch/cpu.yaml --num_processes 2 esol/train.py --config configs/demo.yaml
    torchrun --nproc-per-node 2 esol/train.py --config configs/demo.yaml --set seed=1 --stages classify,expand --resume

Exit codes: 0 done; 2 something the user can mend, said in one line; 75 stopped by a signal after saving (go on with
--resume).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # launchers put esol/ first on the path, where its modules would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from esol import config as configuration
from esol.errors import EsolError


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
    parser.add_argument("--stages", metavar="A,B", help="only these stages of the config (default: all of them)")
    parser.add_argument(
        "--resume", action="store_true", help="go on inside an interrupted stage from its last checkpoint"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it


def run(args: argparse.Namespace) -> int:
    """Runs the stages and returns the exit code."""
    try:
        config = configuration.load(args.config, args.overrides)
        from esol.pipeline import run_pipeline  # torch and accelerate only from here on

        return run_pipeline(config, args.stages.split(",") if args.stages else None, resume=args.resume)
    except EsolError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
