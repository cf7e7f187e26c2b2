"""What every stage of a run is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esol.config import Config
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.engines.base import Engine
from esol.tracking.tracker import Tracker
from esol.training.loop import StopSignal


@dataclass
class Context:
    """One run on one rank; settings and fingerprint are those of the stage at work."""

    config: Config
    engine: Engine
    tracker: Tracker
    index: Index
    reader: ShardReader
    stop: StopSignal
    resume: bool
    settings: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    def say(self, text: str) -> None:
        """Prints a line, once per job."""
        if self.engine.is_main:
            print(text, flush=True)
