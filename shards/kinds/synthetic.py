"""`esol-shards create synthetic`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from shards.kind import KINDS, Kind, natural, positive

if TYPE_CHECKING:
    from shards.samples import Source


@KINDS.add("synthetic")
class Synthetic(Kind):
    """Procedural scenes, for tests and the demo."""

    summary = "Procedural scenes with exact masks: each class has a small telling part and a plainer body."
    example = "esol-shards create synthetic --train 1000 --val 200 --out data/synthetic"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--train", type=natural, default=1000, metavar="N", help="training images (default: 1000)")
        parser.add_argument("--val", type=natural, default=200, metavar="N", help="validation images (default: 200)")
        parser.add_argument(
            "--size", type=positive, default=96, metavar="N", help="pixels of a side, from 32 (default: 96)"
        )
        parser.add_argument(
            "--classes", type=positive, default=5, metavar="N", help="how many kinds of objects, to 20 (default: 5)"
        )

    def source(self, options: argparse.Namespace) -> Source:
        from shards.synthetic import synthetic_source

        return synthetic_source(options.train, options.val, options.size, options.seed, options.classes)
