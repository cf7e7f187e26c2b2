"""`esol-shards create voc`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from shards.kind import KINDS, Kind, add_drop_unlabelled, names, positive

if TYPE_CHECKING:
    from shards.samples import Source


@KINDS.add("voc")
class Voc(Kind):
    """PASCAL VOC 2012, as it is downloaded."""

    summary = "PASCAL VOC 2012. Labels are all objects of Annotations, difficult ones too (as in IRN)."
    example = "esol-shards create voc VOCdevkit/VOC2012 --masks SegmentationClassAug --out data/voc12"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("root", metavar="ROOT", help="folder or URL with JPEGImages, Annotations, ImageSets")
        add(
            "--split",
            action="append",
            default=[],
            metavar="NAME[=FILE]",
            help="a split, listed in FILE or in NAME.txt of the ids; repeatable "
            "(default: train, train_aug, val if there)",
        )
        add("--ids-dir", default="", metavar="DIR", help="where NAME.txt is (default: ROOT/ImageSets/Segmentation)")
        add(
            "--classes",
            type=names,
            metavar="A,B",
            help="only these, in this order; the rest is background (default: all 20)",
        )
        add(
            "--labels",
            default="",
            metavar="FILE",
            help="IRN's cls_labels.npy instead of Annotations; no code in it runs",
        )
        add(
            "--masks",
            default="SegmentationClass",
            metavar="FOLDER",
            help='also: SegmentationClassAug, or "" for none; an image may lack its mask (default: SegmentationClass)',
        )
        add(
            "--long-side",
            type=positive,
            default=0,
            metavar="N",
            help="re-encode larger photos to N pixels (default: never)",
        )
        add_drop_unlabelled(parser)
        add(
            "--no-labels",
            action="append",
            default=[],
            metavar="NAME",
            help="a split without Annotations, such as test, to predict only; repeatable",
        )

    def source(self, options: argparse.Namespace) -> Source:
        from shards import voc

        return voc.voc_source(
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
