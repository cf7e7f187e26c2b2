"""`esol-shards create folder`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from shards.kind import KINDS, Kind, add_drop_unlabelled, positive

if TYPE_CHECKING:
    from shards.samples import Source


@KINDS.add("folder")
class Folder(Kind):
    """A folder of your own photos."""

    summary = (
        "Your own photos: a folder for each class (ROOT/cat, ROOT/dog, ROOT/none for photos without any), or\n"
        "ROOT/images beside a table (image,labels; labels joined by ;), and where you have them ROOT/masks/NAME.png\n"
        "and ROOT/classes.txt. PASCAL VOC and COCO are recognised."
    )
    example = "esol-shards create folder my-photos --out data/my-photos"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("root", metavar="ROOT", help="folder or URL")
        add = parser.add_argument
        add("--labels", default="", metavar="FILE", help="the table of labels (default: ROOT/labels.csv)")
        add(
            "--negatives",
            action="append",
            default=[],
            metavar="NAME",
            help="a folder or label of photos without any object, beside good, free, none, negative, normal, ok and "
            "background; repeatable",
        )
        parser.add_argument(
            "--long-side", type=positive, default=0, metavar="N", help="re-encode larger photos to N pixels"
        )
        add_drop_unlabelled(parser)

    def source(self, options: argparse.Namespace) -> Source:
        from shards.recognise import any_source

        return any_source(options.root, options.long_side, options.drop_unlabelled, options.labels, options.negatives)
