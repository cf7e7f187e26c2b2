"""Engines: the hardware side of training, behind the protocol of base.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esol.config import EngineConfig
    from esol.engines.base import Engine


def make_engine(config: EngineConfig, seed: int) -> Engine:
    """Joins this process to its job; LaunchError where the processes do not form one. Imported only when needed."""
    if config.name == "deepspeed":
        from esol.engines.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(config, seed)
    from esol.engines.accelerate_engine import AccelerateEngine

    return AccelerateEngine(config, seed)
