"""What DeepSpeed gets to read: our config's decisions and the user's JSON in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from esol.base.errors import ConfigError
from esol.config import DeepSpeedConfig

_WHOLE = 100_000  # numbers of a parameter below which ZeRO 3 leaves it whole, its own default
_OURS = {  # DeepSpeed's keys that our config decides, and where
    "train_batch_size": "<stage>.global_batch",
    "train_micro_batch_size_per_gpu": "engine.micro_batch",
    "gradient_accumulation_steps": "<stage>.global_batch and engine.micro_batch",
    "gradient_clipping": "<stage>.clip_norm",
    "optimizer": "<stage>.optimizer",
    "scheduler": "<stage>.lr, warmup and poly_power",
    "bf16": "engine.precision",
    "bfloat16": "engine.precision",
    "fp16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
}


def deepspeed_config(config: DeepSpeedConfig, clip_norm: float) -> dict[str, Any]:
    """What deepspeed.initialize gets: ours, and what the user's JSON adds.

    ConfigError where the JSON decides what our config decides, unless it says "auto"; the message names both keys.
    """
    tree: dict[str, Any] = {}
    if config.json:
        try:
            tree = json.loads(Path(config.json).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"engine.deepspeed.json = {config.json} cannot be read: {error}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"engine.deepspeed.json = {config.json}: the file must hold a JSON object")
    where = f"engine.deepspeed.json = {config.json}"
    for key, field in _OURS.items():
        if key in tree and tree[key] != "auto" and tree[key] != {"enabled": False}:
            raise ConfigError(f"{where}: {key} contradicts {field}, which decides this here: take it out or say auto")
    tree = {key: value for key, value in tree.items() if key not in _OURS}
    zero = tree.get("zero_optimization", {})
    if zero.get("stage", config.zero) not in (config.zero, "auto"):
        raise ConfigError(
            f"{where}: zero_optimization.stage = {zero['stage']} contradicts engine.deepspeed.zero = {config.zero}: "
            "make them equal"
        )
    device = zero.get("offload_optimizer", {}).get("device", "cpu" if config.offload else "none")
    if config.offload and device == "none":
        raise ConfigError(f"{where}: zero_optimization.offload_optimizer contradicts engine.deepspeed.offload = true")
    ours: dict[str, Any] = {"stage": config.zero}
    if config.zero == 3:  # batch norms are used by the convolutions before them (esol.models.folded): they stay whole
        threshold = zero.get("stage3_param_persistence_threshold", _WHOLE)
        ours["stage3_param_persistence_threshold"] = _WHOLE if threshold == "auto" else max(threshold, _WHOLE)
    if config.offload and "offload_optimizer" not in zero:
        ours["offload_optimizer"] = {"device": "cpu"}
    return {
        "zero_allow_untested_optimizer": True,  # torch's own SGD and AdamW
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        **tree,
        "train_micro_batch_size_per_gpu": 1,  # the engine says itself where a step ends
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm if config.zero else 0.0,
        "zero_optimization": {**zero, **ours},
    }
