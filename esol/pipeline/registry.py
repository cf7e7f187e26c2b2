"""What a stage is: one row of the table in esol/stages.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esol.config import Config
from esol.pipeline.context import Context, Results


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    consumes: the earlier stages that it reads under a config; settings: what of the config shapes its result;
    run(context, folder): does the work on every rank, writes its outputs and returns its results (the main rank's
    count); produces: patterns of the files below its folder that are its result; version: raised by hand when the
    stage's code gives another result from the same inputs, so that what an earlier version made is made again.
    """

    name: str
    consumes: Callable[[Config], tuple[str, ...]]
    settings: Callable[[Config], dict[str, Any]]
    run: Callable[[Context, Path], Results]
    produces: tuple[str, ...]
    version: int = 1
