"""Engines: the hardware side of training, behind the protocol of base.py."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from esol.base.errors import LaunchError

if TYPE_CHECKING:
    from esol.config import EngineConfig
    from esol.engines.base import Engine


def make_engine(config: EngineConfig, seed: int) -> Engine:
    """Joins this process to its job; LaunchError where the processes do not form one. Imported only when needed."""
    if config.name == "deepspeed":
        if find_spec("deepspeed") is None:
            raise LaunchError(
                "engine.name = deepspeed, but deepspeed is not installed here: pip install deepspeed, or leave "
                "engine.name at accelerate, which needs none of it"
            )
        from esol.engines.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(config, seed)
    from esol.engines.accelerate_engine import AccelerateEngine

    return AccelerateEngine(config, seed)
