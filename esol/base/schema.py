"""How a frozen dataclass becomes a checked section of a config file: types, ranges, units, paths, nearest names."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import MISSING, field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from esol.base.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::-([^}]*))?\}|(\w+))")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_SENTENCE = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def key(
    default: Any = MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    unit: str = "",
    path: bool = False,
    runtime: bool = False,
) -> Any:
    """A field: closed range, unit; path: $VARIABLES are expanded; runtime: it does not change what is computed."""
    return field(default=default, metadata={"low": low, "high": high, "unit": unit, "path": path, "runtime": runtime})


def build(cls: Any, tree: Any, where: str = "", base: Any = None, expand: bool = True) -> Any:
    """Makes the dataclass `cls` from plain YAML values; `where` is the path for messages.

    base: an instance whose values stand where the tree has none. A section whose default_factory is not its own class
    has what that gives as its base, so that one dataclass can have other defaults in each place. expand: False for what
    has been built and written down before, whose $VARIABLES would be those of whoever reads it.
    """
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
        if not is_dataclass(hints[name]):
            values[name] = _leaf(hints[name], value, known[name], path, expand)
    for name, spec in known.items():
        path = f"{where}.{name}" if where else name
        if is_dataclass(hints[name]):
            if base is not None:
                own = getattr(base, name)
            else:
                own = None if spec.default_factory is hints[name] else spec.default_factory()  # type: ignore[operator]
            values[name] = build(hints[name], tree.get(name, {}), path, own, expand)
        elif name not in values and base is not None:
            values[name] = getattr(base, name)
        elif name not in values and spec.default is MISSING:
            raise ConfigError(f"{path} is missing: put it into the config or give --set {path}=...")
    config = cls(**values)
    if hasattr(config, "check"):
        config.check(where)
    return config


def one_of(value: str, options: Iterable[str], where: str) -> None:
    """ConfigError, with the nearest option, unless the value is one of them. where: the config's key."""
    options = list(options)
    if value not in options:
        close = difflib.get_close_matches(value, options, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{where} = {value!r}: must be one of {', '.join(options)}{hint}")


def _leaf(kind: Any, value: Any, spec: Any, path: str, expand: bool) -> Any:
    value = _convert(kind, value, path)
    meta = spec.metadata
    low, high, unit = meta.get("low"), meta.get("high"), meta.get("unit")
    for number in value if isinstance(value, tuple) else (value,):
        if type(number) not in (int, float):
            continue
        if (low is not None and not number >= low) or (high is not None and not number <= high):  # nan fails too
            raise ConfigError(f"{path} = {number}: must lie between {low} and {high}" + (f" ({unit})" if unit else ""))
    if expand and meta.get("path") and isinstance(value, str):
        value = _expand(value, path)
    return value


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin = get_origin(kind)
    if origin is Literal:
        options = get_args(kind)
        if value is False and "off" in options:
            value = "off"  # YAML 1.1 reads it so
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
    if origin in (Union, UnionType):  # a number or one of a few words
        number, words = get_args(kind)
        if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
            return _convert(words, value, path)
        return _convert(number, value, path)
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


def fingerprint(*parts: Any) -> str:
    """Hash over configs, without their runtime fields, and other JSON values: equal where the results must be equal."""
    text = json.dumps([semantic(p) for p in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def semantic(value: Any) -> Any:
    """A config section as plain values, without the fields that do not change what is computed."""
    if not is_dataclass(value):
        return value
    return {f.name: semantic(getattr(value, f.name)) for f in fields(value) if not f.metadata.get("runtime")}


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: None stands for a number that could not be measured."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def differing(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted keys at which two trees of plain values differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            found += differing(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        return found
    return [] if old == new else [(where, old, new)]
