"""What a kind of `esol-shards create` is: where samples come from, and the options that say so."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, ClassVar

from esol.base.named import Named

if TYPE_CHECKING:
    from shards.samples import Source

BUILT_IN = "shards.kinds"  # the package whose modules hold the project's own kinds


class Kind:
    """One kind of source. summary: what its help says; example: a command that uses it.

    Its module imports what is heavy inside `source`, so that --help is quick.
    """

    summary: ClassVar[str]
    example: ClassVar[str]

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds its own options."""

    def source(self, options: argparse.Namespace) -> Source:
        """The samples that the options name; DataError where there are none or they cannot be read."""
        raise NotImplementedError


KINDS: Named[type[Kind]] = Named("kind of source")


def positive(text: str) -> int:
    """An option's whole number from 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return int(text)


def natural(text: str) -> int:
    """An option's whole number from 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below zero")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    """An option's names, joined by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def add_drop_unlabelled(parser: argparse.ArgumentParser) -> None:
    """The option --drop-unlabelled."""
    parser.add_argument(
        "--drop-unlabelled",
        action="store_true",
        help="leave out images without a label (default: they are photos without any object of the classes)",
    )
