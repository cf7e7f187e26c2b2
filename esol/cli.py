"""The `esol` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from esol.base import exits


def _auto(args: argparse.Namespace) -> int:
    from esol.pipeline.auto import auto

    return auto(args.photos, args.out, args.labels, args.negatives, args.device, args.minutes)


def _report(args: argparse.Namespace) -> int:
    from esol.base.strangers import lines
    from esol.report.tables import aligned, results_table, short_report

    text = results_table(args.run_dir) if args.full else short_report(args.run_dir)
    print(lines(text if args.markdown else aligned(text)))
    return 0


def _predict(args: argparse.Namespace) -> int:
    from esol.deploy.predict import predict

    return predict(
        args.model,
        args.photos,
        args.out,
        cam=args.cam,
        confidence=args.confidence,
        fast=args.fast,
        full_size=args.full_size,
    )


def _export(args: argparse.Namespace) -> int:
    from esol.deploy.export import export

    export(args.run_dir, args.out)
    return 0


def _export_masks(args: argparse.Namespace) -> int:
    from esol.base.strangers import lines
    from esol.deploy.export_masks import export_masks

    out = args.out or args.run_dir.with_name(f"{args.run_dir.name}-{args.to}")
    print(lines("\n".join(export_masks(args.run_dir, args.to, out, args.stage, args.split, args.confidence))))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from esol.pipeline import doctor
    from esol.pipeline.config_file import load

    return doctor.run(load(args.config, args.overrides))


def _replay(args: argparse.Namespace) -> int:
    from esol.tracking.follower import replay

    return 1 if replay(args.run_dir, args.uri) else 0


def _ui(args: argparse.Namespace) -> int:
    from esol.tracking.ui import ui

    return ui(args.run_dir, args.port)


def _main() -> int:
    from esol import __version__, train  # where Ctrl-C is one line already

    parser = argparse.ArgumentParser(prog="esol", description="Image-level labels in, pixel masks and a model out.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("auto", help="from a folder of photos to masks and a page, without a decision")
    command.add_argument(
        "photos", metavar="PHOTOS", help="a folder for each class, or images/ and a table, VOC or COCO"
    )
    command.add_argument("--out", type=Path, default=Path("runs/auto"), metavar="RUN", help="default: runs/auto")
    command.add_argument("--labels", default="", metavar="FILE", help="the table of labels, where it lies elsewhere")
    command.add_argument(
        "--negatives",
        action="append",
        default=[],
        metavar="NAME",
        help="folder of photos without any object; repeatable",
    )
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--minutes", type=float, metavar="N", help="how long it may take (default on a CPU: 10)")
    command.set_defaults(run=_auto)

    command = commands.add_parser("run", help="run the stages of a config in this process", add_help=False)
    train.add_arguments(command)
    command.set_defaults(run=train.run)

    command = commands.add_parser("report", help="the numbers of a run as a table")
    command.add_argument("run_dir", type=Path)
    command.add_argument("--full", action="store_true", help="every number instead of a line for each stage")
    command.add_argument("--markdown", action="store_true", help="Markdown, to paste elsewhere")
    command.set_defaults(run=_report)

    command = commands.add_parser("predict", help="masks, overlays and class shares of your own photos")
    command.add_argument("model", type=Path, help="run directory, folder of esol export, or .safetensors file")
    command.add_argument("photos", type=Path, help="a photo, or a folder with photos at any depth")
    command.add_argument("--out", type=Path, required=True, help="folder for masks/, overlays/ and predictions.json")
    command.add_argument("--cam", action="store_true", help="class maps as well (MODEL must be a run directory)")
    command.add_argument("--confidence", action="store_true", help="16-bit maps of how sure the network is as well")
    command.add_argument("--fast", action="store_true", help="one scale, no flip, no CRF")
    command.add_argument(
        "--full-size",
        action="store_true",
        help="never make photos smaller: for aerial and other photos whose scale is that of the training photos",
    )
    command.set_defaults(run=_predict)

    command = commands.add_parser("export", help="a run's model for other programs, with a model card")
    command.add_argument("run_dir", type=Path)
    command.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    command.set_defaults(run=_export)

    command = commands.add_parser("export-masks", help="a run's masks with their photos, for other tools")
    command.add_argument("run_dir", type=Path)
    formats = "png, voc, coco, yolo, ultralytics, labelme, labelstudio or cvat"
    command.add_argument("--to", required=True, metavar="FORMAT", help=formats)
    command.add_argument("--out", type=Path, help="a new or empty folder (default: RUN_DIR-FORMAT)")
    command.add_argument("--stage", default="", help="whose masks (default: those that the judge takes)")
    command.add_argument("--split", default="", help="only the photos of this split (default: all that have a mask)")
    more = "16-bit maps of how sure the stage is as well; takes the stage's time once more"
    command.add_argument("--confidence", action="store_true", help=more)
    command.set_defaults(run=_export_masks)

    command = commands.add_parser(
        "doctor", help="what a config would find on these machines, and what to change; also under a launcher"
    )
    command.add_argument("--config", required=True, metavar="FILE")
    command.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides")
    command.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    command.set_defaults(run=_doctor)

    command = commands.add_parser(
        "replay", help="log a run's metrics.jsonl into MLflow, when tracking failed at the time"
    )
    command.add_argument("run_dir", type=Path)
    command.add_argument("--uri", default="", help="MLflow tracking URI; default: the sqlite file beside the runs")
    command.set_defaults(run=_replay)

    command = commands.add_parser("ui", help="MLflow's pages of a run, on 127.0.0.1")
    command.add_argument("run_dir", type=Path, help="a run directory, or a folder of them: its newest run")
    command.add_argument("--port", type=int, default=5000)
    command.set_defaults(run=_ui)

    args = parser.parse_args()
    return int(args.run(args))


def main() -> int:
    """Parses the command line and runs one command; returns the exit code."""
    return exits.entry(_main, "run the command again, `esol run` with --resume")


if __name__ == "__main__":
    sys.exit(main())
