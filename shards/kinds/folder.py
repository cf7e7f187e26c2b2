"""`esol-shards create folder`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from shards.kind import KINDS, Kind, add_drop_unlabelled, positive

if TYPE_CHECKING:
    from shards.samples import Source


@KINDS.add("folder")
class Folder(Kind):
    """A folder of your own photos with a table of labels."""

    summary = (
        "Your own photos: ROOT/images, ROOT/labels.csv (image,labels[,split]; labels joined by ;),\n"
        "and where you have them ROOT/masks/NAME.png and ROOT/classes.txt."
    )
    example = "esol-shards create folder my-photos --out data/my-photos"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("root", metavar="ROOT", help="folder or URL")
        parser.add_argument(
            "--long-side", type=positive, default=0, metavar="N", help="re-encode larger photos to N pixels"
        )
        add_drop_unlabelled(parser)

    def source(self, options: argparse.Namespace) -> Source:
        from shards.folder import folder_source

        return folder_source(options.root, options.long_side, options.drop_unlabelled)
