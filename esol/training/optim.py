"""Parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import torch

from esol.config import TrainConfig
from esol.training.task import Task


def build_optimizer(task: Task, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over the task's parameter groups; each group keeps its lr_multiplier for the engine.

    ValueError where a parameter that learns is in no group or in two, or a group holds one that does not learn.
    """
    names = {parameter: name for name, parameter in task.named_parameters()}
    learning = {parameter for parameter in names if parameter.requires_grad}
    seen: set[torch.nn.Parameter] = set()
    groups = []
    for group in task.parameter_groups():
        for parameter in group.parameters:
            if parameter in seen:
                raise ValueError(f"{names.get(parameter, '?')} is in two parameter groups, the second is {group.name}")
            if parameter not in learning:
                raise ValueError(f"group {group.name}: {names.get(parameter, 'a foreign parameter')} does not learn")
            seen.add(parameter)
        if group.parameters:
            groups.append(
                {
                    "params": group.parameters,
                    "name": group.name,
                    "lr_multiplier": group.lr_multiplier,
                    "weight_decay": config.weight_decay if group.weight_decay else 0.0,
                }
            )
    forgotten = sorted(names[parameter] for parameter in learning - seen)
    if forgotten:
        raise ValueError(f"parameters that learn but are in no group of {type(task).__name__}: {', '.join(forgotten)}")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.step_lr)
    return torch.optim.SGD(groups, lr=config.step_lr, momentum=config.momentum)


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The base learning rate of step 0..total_steps-1: linear warm-up, then step_lr * (1 - progress) ** poly_power."""
    if step < config.warmup:
        return config.step_lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, total_steps - config.warmup)
    return config.step_lr * (1 - progress) ** config.poly_power
