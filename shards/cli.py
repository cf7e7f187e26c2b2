"""The `esol-shards` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from esol.errors import EsolError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0 done, 1 verify found damage, 2 an error that the message explains."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except EsolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was finished, run the command again", file=sys.stderr)
        return 130


def _command(commands: argparse._SubParsersAction, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("esol-shards", description="Make, index and check WebDataset shards for esol.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    create = _command(commands, "create", "Make a shard set.", "esol-shards create voc VOC2012 --out data/voc12")
    kinds = create.add_subparsers(required=True, metavar="KIND")
    _add_voc(kinds)
    _add_synthetic(kinds)
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="folder or URL (s3://...) to write to")
    parser.add_argument(
        "--samples-per-shard",
        type=_positive,
        default=128,
        metavar="N",
        help="128 photos are about 15 MB and a few minutes of an inference stage, whose unit of work is a shard (default: 128)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the samples (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace the shard set in DIR")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _add_voc(kinds: argparse._SubParsersAction) -> None:
    parser = _command(
        kinds,
        "voc",
        "PASCAL VOC 2012: labels from Annotations (all objects, difficult ones too, as IRN has it) or cls_labels.npy.",
        "esol-shards create voc VOCdevkit/VOC2012 --masks SegmentationClassAug --out data/voc12",
    )
    parser.add_argument("root", metavar="ROOT", help="folder or URL that holds JPEGImages, Annotations, ImageSets")
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME[=FILE]",
        help="split to include, listed in FILE or in NAME.txt of --ids-dir; repeatable (default: train, train_aug, val if there)",
    )
    parser.add_argument(
        "--ids-dir", default="", metavar="DIR", help="where NAME.txt is (default: ROOT/ImageSets/Segmentation)"
    )
    parser.add_argument(
        "--classes", type=_names, default=None, metavar="A,B,...", help="only these; the rest is background"
    )
    parser.add_argument(
        "--labels", default="", metavar="FILE", help="cls_labels.npy; no code in it is run (default: Annotations)"
    )
    parser.add_argument(
        "--masks",
        default="SegmentationClass",
        metavar="FOLDER",
        help='SegmentationClassAug with SBD\'s masks; "" for none; images may lack one (default: SegmentationClass)',
    )
    parser.add_argument(
        "--long-side", type=_positive, default=0, metavar="N", help="re-encode larger photos to N pixels"
    )
    parser.add_argument("--drop-unlabelled", action="store_true", help="leave out images without any of the classes")
    _add_output(parser)
    parser.set_defaults(run=_voc)


def _voc(options: argparse.Namespace) -> int:
    from shards.voc import CLASSES, voc_source

    source = voc_source(
        options.root,
        options.split,
        options.classes or CLASSES,
        options.labels,
        options.masks,
        options.ids_dir,
        options.long_side,
        options.drop_unlabelled,
    )
    return _create(source, options)


def _add_synthetic(kinds: argparse._SubParsersAction) -> None:
    parser = _command(
        kinds,
        "synthetic",
        "Procedural scenes with exact masks: each class has a small telling part and a plainer body.",
        "esol-shards create synthetic --train 1000 --val 200 --out data/synthetic",
    )
    parser.add_argument(
        "--train", type=int, default=1000, metavar="N", help="images of the train split (default: 1000)"
    )
    parser.add_argument("--val", type=int, default=200, metavar="N", help="images of the val split (default: 200)")
    parser.add_argument("--size", type=_positive, default=96, metavar="N", help="pixels of a side (default: 96)")
    _add_output(parser)
    parser.set_defaults(run=_synthetic)


def _synthetic(options: argparse.Namespace) -> int:
    from shards.synthetic import synthetic_source

    return _create(synthetic_source(options.train, options.val, options.size, options.seed), options)


def _create(source: object, options: argparse.Namespace) -> int:
    from shards.writer import create

    create(source, options.out, options.samples_per_shard, options.seed, options.overwrite)  # type: ignore[arg-type]
    return _describe(options.out)


def _describe(root: str) -> int:
    from esol.data.index import Index

    index = Index.load(root)
    masks = index.members.get("mask.png")
    size = sum(shard.bytes for shard in index.shards) / 1e6
    print(f"{root}: {len(index)} images, {len(index.shards)} shards, {size:.0f} MB, {len(index.classes)} classes")
    for name, ordinals in index.splits.items():
        with_mask = 0 if masks is None else int((masks[ordinals, 0] >= 0).sum())
        print(f"  {name}: {len(ordinals)} images, {with_mask} with mask")
    return 0
