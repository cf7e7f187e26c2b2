"""What every stage of a run is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from esol.base.strangers import lines
from esol.config import Config
from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.engines.base import Engine
from esol.engines.ranks import DTYPES
from esol.models.folded import for_inference
from esol.tracking.tracker import Tracker
from esol.training.loop import StopSignal

_Net = TypeVar("_Net", bound=nn.Module)


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

    @property
    def kind(self) -> torch.dtype | None:
        """What matrix products are computed in, None for float32."""
        return self.engine.kind

    @property
    def precision(self) -> str:
        """The name of that: fp32, bf16 or fp16."""
        return next(name for name, kind in DTYPES.items() if kind is self.kind)

    def ready(self, net: _Net) -> _Net:
        """A network for forward passes alone, on the engine's device and in its precision."""
        return for_inference(net, self.engine.device, self.kind)

    def say(self, text: str) -> None:
        """Prints a line, once per job."""
        if self.engine.is_main:
            print(lines(text), flush=True)
