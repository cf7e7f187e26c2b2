"""`esol-shards create coco`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from shards.kind import KINDS, Kind

if TYPE_CHECKING:
    from shards.samples import Source


@KINDS.add("coco")
class Coco(Kind):
    """MS COCO, or whatever else has its instances files."""

    summary = "MS COCO instances. Crowd regions are left out; where objects overlap, the later annotation counts."
    example = (
        "esol-shards create coco --images train2014 --annotations annotations/instances_train2014.json --split train\n"
        "    --images val2014 --annotations annotations/instances_val2014.json --split val --out data/coco14"
    )

    def arguments(self, parser: argparse.ArgumentParser) -> None:
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

    def source(self, options: argparse.Namespace) -> Source:
        from shards.coco import coco_source

        return coco_source(options.images, options.annotations, options.split, options.keep_unannotated)
