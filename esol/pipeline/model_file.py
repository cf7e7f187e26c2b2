"""A trained DeepLab as one file: safetensors whose header says how to build the network and how to predict with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from esol.base.errors import CheckpointError, ConfigError
from esol.base.files import atomic_write
from esol.base.schema import build
from esol.base.strangers import json_tree
from esol.config import PredictionConfig
from esol.data.index import check_classes

FORMAT = "esol-deeplab 2"


@dataclass(frozen=True)
class ModelInfo:
    """What the file's header holds.

    classes: names without background; backbone, rates: of the network; evaluate: how it predicts; photo_side: median
    long side of the photos that it learned from, in pixels; masks: the stage whose masks it learned from, "truth" for
    true ones; initial_weights: what it started from, in words; precision: fp32, bf16 or fp16, in which it learned and
    was evaluated.
    """

    classes: tuple[str, ...]
    backbone: str
    rates: tuple[int, ...]
    evaluate: PredictionConfig
    photo_side: int
    masks: str
    initial_weights: str
    precision: str = "fp32"


def write_model(path: Path, state: Mapping[str, Tensor], info: ModelInfo) -> None:
    """Writes weights and header; the same weights and info give the same bytes."""
    # one entry: safetensors writes several in an order that differs from call to call
    header = {"esol": json.dumps(describe(info))}
    atomic_write(path, save({key: value.contiguous() for key, value in state.items()}, header))


def describe(info: ModelInfo) -> dict[str, Any]:
    """What the header says."""
    return {"format": FORMAT, **asdict(info)}


def read_info(path: Path) -> ModelInfo:
    """The header alone; CheckpointError where the file is no model of ours."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise CheckpointError(f"{path} is no file")
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: give the run directory of a finished segment stage, a folder that esol export wrote, "
            "or a .safetensors file of either"
        ) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    try:
        about: dict[str, Any] = json_tree(header["esol"])
        if (found := about.pop("format")) != FORMAT:
            raise CheckpointError(f"{path} has format {found!r}, this program reads {FORMAT!r}")
        evaluate = build(PredictionConfig, about["evaluate"], "evaluate", expand=False)
        values = {**about, "evaluate": evaluate, "classes": tuple(about["classes"]), "rates": tuple(about["rates"])}
        _check(info := ModelInfo(**values))
        return info
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{path} is no DeepLab that esol wrote (its header: {error!r:.300})") from error


def _check(info: ModelInfo) -> None:
    """ValueError where a header says what no DeepLab of ours has."""
    check_classes(info.classes)
    for name in ("backbone", "masks", "initial_weights", "precision"):
        if not isinstance(value := getattr(info, name), str):
            raise ValueError(f"{name} = {value!r:.80}")
    for name, numbers, most in (("rates", info.rates, 1000), ("photo_side", (info.photo_side,), 1 << 20)):
        if not 1 <= len(numbers) <= 16 or not all(type(n) is int and 1 <= n <= most for n in numbers):
            raise ValueError(f"{name} = {numbers!r:.80}")
