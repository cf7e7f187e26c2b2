"""What a checkpoint's file holds: copies of tensors, written and read without pickled code."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esol.base.errors import CheckpointError, first_line
from esol.base.files import atomic_write

STATE = "state.pt"


def on_host(value: Any) -> Any:
    """A copy of a tree of tensors in the host's memory; from a GPU it is there when the GPU's queue has come so far."""
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_host(item) for item in value)
    if not isinstance(value, Tensor):
        return value
    if value.device.type == "cpu":
        return value.detach().clone()
    return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value.detach(), non_blocking=True)


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Through memory, because torch's own writer hides why a disk refused (these models are small)."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(path, buffer.getbuffer())


def read_state(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, not the state of a run")
        return state
    except Exception as error:  # a damaged or hostile file leads the unpickler to raise whatever it pleases
        raise CheckpointError(f"cannot read {path}: {first_line(error)}") from error
