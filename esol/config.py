"""Configuration: one nested frozen dataclass per concern, read from YAML, checked, and written back resolved.

Every field below is a key of the YAML files in configs/; `--set a.b=value` overrides one. Unknown keys, wrong types and
values out of range stop with the full path of the key. Types, ranges and units stand at the field.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from esol.errors import ConfigError


def _key(
    default: Any = MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    unit: str = "",
    path: bool = False,
    runtime: bool = False,
) -> Any:
    """A field: closed range, unit; path: $VARIABLES are expanded; runtime: it does not change what is computed."""
    return field(
        default=default,
        metadata={"low": low, "high": high, "unit": unit, "path": path, "runtime": runtime},
    )


@dataclass(frozen=True)
class DataConfig:
    """Where the shards are and how an image becomes a training crop (as IRN: long side, then crop)."""

    root: str = _key(path=True, runtime=True)  # folder or URL that holds index.json; its content counts, not its place
    train_split: str = _key("train")
    score_split: str = _key("train")  # has masks; the split that seeds are made for and scored on
    long_side: tuple[int, int] = _key((320, 640), low=16, high=8192, unit="pixels")  # drawn uniformly
    crop: int = _key(512, low=16, high=4096, unit="pixels")
    damaged: Literal["error", "skip"] = _key("error")
    workers: int = _key(2, low=0, high=256, unit="processes per rank", runtime=True)
    cache: str = _key("", path=True, runtime=True)  # folder for shards read from a URL; "" = ~/.cache/esol


@dataclass(frozen=True)
class ModelConfig:
    """The classification network. kernel_channels 0 is the plain CAM network: classifier straight on the backbone."""

    backbone: str = _key("resnet50")  # resnet50, resnet101, small, or timm:<name>
    weights: str = _key("", path=True, runtime=True)  # .safetensors, .pth; "" = download; "none" = random
    output_stride: Literal[8, 16, 32] = _key(16)
    freeze: Literal["none", "stem", "all"] = _key("stem")  # stem: stem and first two stages (IRN); batch norm always
    kernel_channels: int = _key(256, low=0, high=8192, unit="channels")  # of W1, the expansion sampler's kernel


@dataclass(frozen=True)
class TrainConfig:
    """How a training stage learns; the three stages extend it."""

    duration: str = _key("5 epochs")  # "N epochs" or "N steps"
    global_batch: int = _key(16, low=1, high=65536, unit="images per optimizer step, over all ranks")
    optimizer: Literal["sgd", "adamw"] = _key("sgd")
    lr: float = _key(0.1, low=0, high=100)
    momentum: float = _key(0.9, low=0, high=1)  # IRN's real momentum is 1e-4 (RECIPES, quirk)
    weight_decay: float = _key(1e-4, low=0, high=1)
    poly_power: float = _key(0.9, low=0, high=10)  # 0 = constant
    warmup: int = _key(0, low=0, high=1_000_000, unit="steps")
    clip_norm: float = _key(0.0, low=0, high=1e6)  # 0 = off


@dataclass(frozen=True)
class ClassifyConfig(TrainConfig):
    """The CAM network on image-level labels."""

    head_lr: float = _key(10.0, low=0, high=1000, unit="times lr, for W1 and the classifier")


@dataclass(frozen=True)
class ExpandConfig(TrainConfig):
    """The expansion sampler: offsets that maximise the classification loss (paper, section Expansion)."""

    duration: str = _key("100 steps")  # the loss has no upper bound: steps, lr and alpha are one budget
    lr: float = _key(0.05, low=0, high=100)
    momentum: float = _key(0.0, low=0, high=1)  # with it all offsets run one way and the maps shift
    poly_power: float = _key(0.0, low=0, high=10)
    alpha: float = _key(1.0, low=0, high=1000)  # weight of the inverse loss
    classes: Literal["all", "present"] = _key("all")  # whose loss is maximised
    bound: float = _key(1.0, low=0, high=64, unit="feature-grid pixels")  # r in r*tanh(o/r); 0 = free offsets
    clip: float = _key(0.2, low=0, high=1)  # beta of feature clipping; 0 = off
    game: bool = _key(False)  # W1 and V minimise while the offsets maximise


@dataclass(frozen=True)
class ShrinkConfig(TrainConfig):
    """The shrinkage sampler: offsets (and kernel) that keep the classification and lose area."""

    duration: str = _key("250 steps")
    lr: float = _key(0.02, low=0, high=100)
    area: float = _key(0.1, low=0, high=1000)  # lambda, weight of the area loss
    clip: float = _key(0.2, low=0, high=1)  # beta of feature clipping before shrinkage; 0 = off
    bound: float = _key(1.0, low=0, high=64, unit="feature-grid pixels")
    kernel: Literal["identity", "copy", "box"] = _key("box")  # where W2 starts
    learn_kernel: bool = _key(True)
    learn_classifier: bool = _key(True)
    normalise: Literal["minmax", "max"] = _key("minmax")  # of the class maps inside the area loss


@dataclass(frozen=True)
class LocalizeConfig:
    """Class maps of the trained stages, scored as seeds, and written as shards that mirror the input."""

    scales: tuple[float, ...] = _key((0.5, 1.0, 1.5, 2.0), low=0.1, high=8)
    long_side: int = _key(0, low=0, high=8192, unit="pixels")  # of scale 1; 0 = the image's own
    flip: bool = _key(True)
    write: Literal["last", "cam", "expand", "shrink"] = _key("last")  # whose maps the later stages get
    batch: int = _key(1, low=1, high=1024, unit="images of one size")


@dataclass(frozen=True)
class EngineConfig:
    """Hardware side: which engine, numbers format, how a global batch is split."""

    name: Literal["accelerate"] = _key("accelerate", runtime=True)
    precision: Literal["fp32", "bf16", "fp16"] = _key("fp32")
    micro_batch: int = _key(0, low=0, high=65536, unit="images per forward; 0 = the rank's whole share", runtime=True)
    timeout: float = _key(30.0, low=0.1, high=1440, unit="minutes a collective may wait", runtime=True)
    threads: int = _key(0, low=0, high=1024, unit="CPU threads per rank; 0 = cores / local ranks", runtime=True)


@dataclass(frozen=True)
class CheckpointConfig:
    """When training state is saved. A signal or the end of a stage saves as well."""

    every: int = _key(500, low=1, high=1_000_000, unit="steps", runtime=True)
    keep: int = _key(2, low=1, high=1000, unit="checkpoints", runtime=True)


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow; metrics.jsonl in the run directory is always written."""

    uri: str = _key("", path=True, runtime=True)  # "" = sqlite:///<runs folder>/mlflow.db; "none" = no MLflow
    experiment: str = _key("esol", runtime=True)
    every: int = _key(10, low=1, high=100_000, unit="steps between logged values", runtime=True)
    pictures: int = _key(12, low=0, high=64, unit="overlay pictures per stage", runtime=True)


@dataclass(frozen=True)
class Config:
    """A whole run: `run_dir` holds everything that it writes."""

    run_dir: str = _key(path=True, runtime=True)
    seed: int = _key(0, low=0, high=2**31 - 1)
    stages: tuple[str, ...] = _key(("classify", "expand", "shrink", "localize"), runtime=True)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    expand: ExpandConfig = field(default_factory=ExpandConfig)
    shrink: ShrinkConfig = field(default_factory=ShrinkConfig)
    localize: LocalizeConfig = field(default_factory=LocalizeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::-([^}]*))?\}|(\w+))")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_SENTENCE = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def load(source: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file, applies `a.b=value` overrides in order, checks everything; ConfigError names the key."""
    try:
        text = Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read config {source}: {error.strerror}") from error
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected keys and values at the top level, got {type(tree).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {override!r}: write it as a.b=value")
        _assign(tree, key.strip(), value)
    return build(Config, tree)


def _assign(tree: dict[str, Any], key: str, value: str) -> None:
    *parents, last = key.split(".")
    node = tree
    for depth, name in enumerate(parents):
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: {'.'.join(parents[: depth + 1])} is a value, it has no keys below it")
        node = child
    try:
        node[last] = yaml.safe_load(value) if value.strip() else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {value!r} is not a YAML value: {error}") from error


def build(cls: Any, tree: Any, where: str = "") -> Any:
    """Makes the dataclass `cls` from plain YAML values; `where` is the path for messages."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{where or 'config'}: expected keys below it, got {tree!r}")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    values: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{where}.{name}" if where else str(name)
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {where + '.' if where else ''}{close[0]}?" if close else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown key {path}: {hint}")
        kind = hints[name]
        values[name] = build(kind, value, path) if is_dataclass(kind) else _leaf(kind, value, known[name], path)
    for name, spec in known.items():
        path = f"{where}.{name}" if where else name
        if name in values:
            continue
        if is_dataclass(hints[name]):
            values[name] = build(hints[name], {}, path)
        elif spec.default is MISSING:
            raise ConfigError(f"{path} is missing: put it into the config or give --set {path}=...")
    config = cls(**values)
    _check_whole(config, where)
    return config


def _leaf(kind: Any, value: Any, spec: Any, path: str) -> Any:
    value = _convert(kind, value, path)
    meta = spec.metadata
    low, high, unit = meta.get("low"), meta.get("high"), meta.get("unit")
    for number in value if isinstance(value, tuple) else (value,):
        if type(number) not in (int, float):
            continue
        if (low is not None and not number >= low) or (high is not None and not number <= high):  # nan fails too
            raise ConfigError(f"{path} = {number}: must lie between {low} and {high}" + (f" ({unit})" if unit else ""))
    if meta.get("path") and isinstance(value, str):
        value = _expand(value, path)
    return value


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin = get_origin(kind)
    if origin is Literal:
        options = get_args(kind)
        if value in options and type(value) in {type(option) for option in options}:
            return value
        close = difflib.get_close_matches(str(value), map(str, options), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{path} = {value!r}: must be one of {', '.join(map(str, options))}{hint}")
    if origin is tuple:
        inner = get_args(kind)
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} = {value!r}: must be a list, such as [a, b]")
        if inner[-1] is Ellipsis:
            return tuple(_convert(inner[0], v, f"{path}[{i}]") for i, v in enumerate(value))
        if len(value) != len(inner):
            raise ConfigError(f"{path} = {value!r}: must have {len(inner)} entries")
        return tuple(_convert(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(inner, value, strict=True)))
    if origin in (Union, UnionType):
        raise TypeError(f"{path}: unions are not supported in config classes")
    if kind is float:
        if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
            value = float(value)  # YAML 1.1 reads 1e-4 as text
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif kind is str:
        if value is None:
            return ""
        if isinstance(value, str):
            return value
    elif kind in (bool, int) and type(value) is kind:
        return value
    raise ConfigError(f"{path} = {value!r}: must be {_SENTENCE[kind]}")


def _expand(value: str, path: str) -> str:
    def variable(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        found = os.environ.get(name) or match[2]
        if found is None:
            raise ConfigError(
                f"{path} = {value!r}: environment variable {name} is not set; export it or give --set {path}=..."
            )
        return found

    return os.path.expanduser(_VARIABLE.sub(variable, value))


def _check_whole(config: Any, where: str) -> None:
    """Rules between fields of one section."""
    if isinstance(config, TrainConfig):
        parse_duration(config.duration, f"{where}.duration")
    if isinstance(config, DataConfig) and config.long_side[0] > config.long_side[1]:
        raise ConfigError(f"{where}.long_side = {list(config.long_side)}: the first must not exceed the second")
    if isinstance(config, LocalizeConfig) and not config.scales:
        raise ConfigError(f"{where}.scales is empty: give at least one, such as [1.0]")
    if isinstance(config, Config) and config.model.kernel_channels == 0:
        needing = [s for s in ("expand", "shrink") if s in config.stages]
        if needing:
            raise ConfigError(
                f"model.kernel_channels = 0 is the plain CAM network, which {needing[0]} cannot use: "
                "set it above 0 or leave the stage out of stages"
            )


def parse_duration(text: str, path: str) -> tuple[int, str]:
    """'5 epochs' -> (5, 'epochs'); ConfigError otherwise."""
    match = re.fullmatch(r"\s*(\d+)\s*(epoch|step)s?\s*", text)
    if not match or int(match[1]) < 1:
        raise ConfigError(f"{path} = {text!r}: write it as '5 epochs' or '2000 steps'")
    return int(match[1]), match[2] + "s"


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal one."""
    plain = json.loads(json.dumps(asdict(config)))
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120)


def fingerprint(*parts: Any) -> str:
    """Hash over configs, without their runtime fields, and other JSON values: equal where the results must be equal."""
    text = json.dumps([semantic(p) for p in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def semantic(value: Any) -> Any:
    """A config section as plain values, without the fields that do not change what is computed."""
    if not is_dataclass(value):
        return value
    return {f.name: semantic(getattr(value, f.name)) for f in fields(value) if not f.metadata.get("runtime")}


def differing(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted keys at which two trees of plain values differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            found += differing(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        return found
    return [] if old == new else [(where, old, new)]
