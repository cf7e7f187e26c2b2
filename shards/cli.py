"""The `esol-shards` command. What it needs is imported where it is used, so that --help is quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from esol.base import exits

if TYPE_CHECKING:
    from shards.samples import Source


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; exit status 0 done, 1 damage was found, 2 an error that the message explains,
    130 Ctrl-C."""

    def command() -> int:
        options = _parser().parse_args(arguments)
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
    kinds = create.add_subparsers(required=True, metavar="KIND")
    for kind in (_add_voc, _add_coco, _add_folder, _add_synthetic):
        _add_output(kind(kinds))
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
    add(
        "--samples-per-shard", type=_positive, default=128, metavar="N", help="at most (default: 128; see docs/data.md)"
    )
    add("--seed", type=_natural, default=0, metavar="N", help="of the order of the samples (default: 0)")
    add("--overwrite", action="store_true", help="first remove the shard set that DIR holds")
    add(
        "--drop-damaged",
        action="store_true",
        help="leave out images that cannot be read, and say which (default: an error)",
    )


def _drop_unlabelled(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--drop-unlabelled",
        action="store_true",
        help="leave out images without a label (default: they are photos without any object of the classes)",
    )


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return int(text)


def _natural(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below zero")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _add_voc(kinds: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = _command(
        kinds,
        "voc",
        "PASCAL VOC 2012. Labels are all objects of Annotations, difficult ones too (as in IRN).",
        "esol-shards create voc VOCdevkit/VOC2012 --masks SegmentationClassAug --out data/voc12",
    )
    add = parser.add_argument
    add("root", metavar="ROOT", help="folder or URL with JPEGImages, Annotations, ImageSets")
    add(
        "--split",
        action="append",
        default=[],
        metavar="NAME[=FILE]",
        help="a split, listed in FILE or in NAME.txt of the ids; repeatable (default: train, train_aug, val if there)",
    )
    add("--ids-dir", default="", metavar="DIR", help="where NAME.txt is (default: ROOT/ImageSets/Segmentation)")
    add(
        "--classes",
        type=_names,
        metavar="A,B",
        help="only these, in this order; the rest is background (default: all 20)",
    )
    add("--labels", default="", metavar="FILE", help="IRN's cls_labels.npy instead of Annotations; no code in it runs")
    add(
        "--masks",
        default="SegmentationClass",
        metavar="FOLDER",
        help='also: SegmentationClassAug, or "" for none; an image may lack its mask (default: SegmentationClass)',
    )
    add(
        "--long-side",
        type=_positive,
        default=0,
        metavar="N",
        help="re-encode larger photos to N pixels (default: never)",
    )
    _drop_unlabelled(parser)
    add(
        "--no-labels",
        action="append",
        default=[],
        metavar="NAME",
        help="a split without Annotations, such as test, to predict only; repeatable",
    )
    parser.set_defaults(run=_voc)
    return parser


def _voc(options: argparse.Namespace) -> int:
    from shards import voc

    source = voc.voc_source(
        options.root,
        splits=options.split,
        classes=voc.CLASSES if options.classes is None else options.classes,
        labels=options.labels,
        masks=options.masks,
        ids_dir=options.ids_dir,
        long_side=options.long_side,
        drop_unlabelled=options.drop_unlabelled,
        no_labels=options.no_labels,
    )
    return _create(source, options)


def _add_coco(kinds: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = _command(
        kinds,
        "coco",
        "MS COCO instances. Crowd regions are left out; where objects overlap, the later annotation counts.",
        "esol-shards create coco --images train2014 --annotations annotations/instances_train2014.json --split train\n"
        "    --images val2014 --annotations annotations/instances_val2014.json --split val --out data/coco14",
    )
    add = parser.add_argument
    add(
        "--images",
        action="append",
        required=True,
        metavar="DIR",
        help="photos of the annotations; one DIR serves for all",
    )
    add("--annotations", action="append", required=True, metavar="FILE", help="instances json; repeatable")
    add("--split", action="append", required=True, metavar="NAME", help="name of the split, one for each FILE")
    add(
        "--keep-unannotated",
        action="store_true",
        help="keep images without annotations: 82,783/40,504 of COCO 2014 (default: drop them, 82,081/40,137)",
    )
    parser.set_defaults(run=_coco)
    return parser


def _coco(options: argparse.Namespace) -> int:
    from shards.coco import coco_source

    source = coco_source(options.images, options.annotations, options.split, options.keep_unannotated)
    return _create(source, options)


def _add_folder(kinds: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = _command(
        kinds,
        "folder",
        "Your own photos: ROOT/images, ROOT/labels.csv (image,labels[,split]; labels joined by ;),\n"
        "and where you have them ROOT/masks/NAME.png and ROOT/classes.txt.",
        "esol-shards create folder my-photos --out data/my-photos",
    )
    parser.add_argument("root", metavar="ROOT", help="folder or URL")
    parser.add_argument(
        "--long-side", type=_positive, default=0, metavar="N", help="re-encode larger photos to N pixels"
    )
    _drop_unlabelled(parser)
    parser.set_defaults(run=_folder)
    return parser


def _folder(options: argparse.Namespace) -> int:
    from shards.folder import folder_source

    return _create(folder_source(options.root, options.long_side, options.drop_unlabelled), options)


def _add_synthetic(kinds: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = _command(
        kinds,
        "synthetic",
        "Procedural scenes with exact masks: each class has a small telling part and a plainer body.",
        "esol-shards create synthetic --train 1000 --val 200 --out data/synthetic",
    )
    parser.add_argument("--train", type=_natural, default=1000, metavar="N", help="training images (default: 1000)")
    parser.add_argument("--val", type=_natural, default=200, metavar="N", help="validation images (default: 200)")
    parser.add_argument(
        "--size", type=_positive, default=96, metavar="N", help="pixels of a side, from 32 (default: 96)"
    )
    parser.add_argument(
        "--classes", type=_positive, default=5, metavar="N", help="how many kinds of objects, to 20 (default: 5)"
    )
    parser.set_defaults(run=_synthetic)
    return parser


def _synthetic(options: argparse.Namespace) -> int:
    from shards.synthetic import synthetic_source

    return _create(synthetic_source(options.train, options.val, options.size, options.seed, options.classes), options)


def _create(source: Source, options: argparse.Namespace) -> int:
    from shards.samples import listing
    from shards.writer import create

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
