"""The `esol-shards` command. What it needs is imported where it is used, so that --help is quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from esol.base import exits
from esol.base.plugins import import_all, load_plugins
from shards.kind import BUILT_IN, KINDS, natural, positive


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; exit status 0 done, 1 damage was found, 2 an error that the message explains,
    130 Ctrl-C."""

    def command() -> int:
        import_all(BUILT_IN)
        given = list(sys.argv[1:] if arguments is None else arguments)
        if given[:1] == ["create"]:
            before = argparse.ArgumentParser(add_help=False)
            before.add_argument("--plugin", action="append", default=[])
            load_plugins(before.parse_known_args(given)[0].plugin)
        options = _parser().parse_args(given)
        return int(options.run(options))

    return exits.entry(command, "nothing was finished, run the command again")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("esol-shards", description="Makes, indexes and checks WebDataset shards for esol.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    create = _command(
        commands,
        "create",
        "Make a shard set from VOC, COCO, your own folder, or procedural scenes.",
        "esol-shards create voc VOCdevkit/VOC2012 --masks SegmentationClassAug --out data/voc12",
    )
    create.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="a module with more kinds")
    kinds = create.add_subparsers(required=True, metavar="KIND")
    for name, kind in KINDS.items():
        own = _command(kinds, name, kind.summary, kind.example)
        kind().arguments(own)
        _add_output(own)
        own.set_defaults(run=_create, kind=kind())
    _add_index(commands)
    _add_verify(commands)
    _add_export(commands)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder or URL (s3://...) to write to")
    add("--samples-per-shard", type=positive, default=128, metavar="N", help="at most (default: 128; see docs/data.md)")
    add("--seed", type=natural, default=0, metavar="N", help="of the order of the samples (default: 0)")
    add("--overwrite", action="store_true", help="first remove the shard set that DIR holds")
    add(
        "--drop-damaged",
        action="store_true",
        help="leave out images that cannot be read, and say which (default: an error)",
    )


def _create(options: argparse.Namespace) -> int:
    from shards.samples import listing
    from shards.writer import create

    source = options.kind.source(options)
    for note in source.notes:
        print(note)
    census, dropped = create(
        source,
        options.out,
        options.samples_per_shard,
        options.seed,
        options.overwrite,
        drop_damaged=options.drop_damaged,
    )
    _describe(options.out)
    print("\n".join(census.lines()))
    if dropped:
        print(listing(f"warning: {len(dropped)} images were left out", dropped))
    return 0


def _add_index(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "index",
        "Index webdataset shards that something else has made: photo and json {labels, height, width} per sample.",
        "esol-shards index data/theirs --classes classes.txt --split train=train.txt --split val=val.txt",
    )
    add = parser.add_argument
    add("root", metavar="DIR", help="folder or URL with *.tar")
    add("--classes", required=True, metavar="FILE", help="class names without background, one a line")
    add(
        "--split",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="keys of a split, one a line; repeatable (default: all are train)",
    )
    add(
        "--overwrite", action="store_true", help="replace index.json; damage that verify would find goes unnoticed then"
    )
    parser.set_defaults(run=_index)


def _index(options: argparse.Namespace) -> int:
    from shards.verify import index_set

    index_set(options.root, options.classes, options.split, options.overwrite)
    return _describe(options.root)


def _add_verify(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "verify",
        "Read a whole shard set and list every damage by shard and key; exit status 1 if there is any.",
        "esol-shards verify data/voc12",
    )
    parser.add_argument("root", metavar="DIR", help="folder or URL with index.json")
    parser.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    from shards.verify import verify

    problems = verify(options.root, print)
    for problem in problems:
        print(problem)
    if problems:
        print(f"{options.root}: {len(problems)} problems", file=sys.stderr)
        return 1
    return _describe(options.root)


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "export",
        "Write a shard set, or a run's pseudo masks, to plain files: images/, masks/, classes.txt, labels.csv,\n"
        "as esol-shards create folder reads them. Damaged samples are left out and listed; exit status 1 then.",
        "esol-shards export runs/demo/irn_masks --out pseudo-masks",
    )
    add = parser.add_argument
    add("root", metavar="DIR", help="folder or URL with index.json")
    add("--out", required=True, metavar="FOLDER", help="local folder to write to")
    add("--split", default="", metavar="NAME", help="only this split (default: all; needed where splits overlap)")
    add(
        "--overwrite",
        action="store_true",
        help="first remove images/, masks/, labels.csv and classes.txt from FOLDER, all of them, whoever made them",
    )
    add(
        "--voc-results",
        choices=("comp5", "comp6"),
        help="instead write what VOC's evaluation server takes, for comp5 (VOC's data alone) or comp6 (other data too, "
        "ImageNet's weights among them): results/VOC2012/Segmentation/comp6_test_cls/ID.png and results.tgz",
    )
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    from shards.export import export
    from shards.voc_results import export_voc_results

    if options.voc_results:
        count, archive = export_voc_results(options.root, options.out, options.voc_results, options.split)
        print(f"{archive}: {count} masks under VOC's class numbers")
        return 0

    done = export(options.root, options.out, options.split, options.overwrite)
    for line in (*done.notes, *done.problems):
        print(line)
    print(f"{options.out}: {done.images} images, {done.masks} masks")
    if done.problems:
        print(f"{options.root}: {len(done.problems)} damaged samples were left out", file=sys.stderr)
    return 1 if done.problems else 0


def _describe(root: str) -> int:
    from esol.data.index import Index

    index = Index.load(root)
    masks = index.members.get("mask.png")
    size = sum(shard.bytes for shard in index.shards) / 1e6
    print(f"{root}: {len(index)} images, {len(index.classes)} classes, {len(index.shards)} shards, {size:.0f} MB")
    for name, ordinals in index.splits.items():
        with_mask = 0 if masks is None else int((masks[ordinals, 0] >= 0).sum())
        print(f"  {name}: {len(ordinals)} images, {with_mask} with mask")
    return 0
