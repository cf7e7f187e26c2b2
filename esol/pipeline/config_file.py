"""A run's config file: YAML and overrides in, one checked Config out, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from esol.base.errors import ConfigError
from esol.base.plugins import load_plugins
from esol.base.schema import build
from esol.base.strangers import content
from esol.config import Config
from esol.pipeline.registry import config_type, known_stage

MOST_VALUES = 100_000  # of a config


def load(source: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file, applies `a.b=value` overrides in order, checks everything; ConfigError names the key."""
    try:
        text = content(Path(source)).decode()
    except OSError as error:
        raise ConfigError(f"cannot read config {source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{source} is not UTF-8 text (line {line}: {error.reason}): save it as UTF-8") from error
    except ValueError as error:
        raise ConfigError(f"cannot read config {source}: {error}") from error
    try:
        tree = _values(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {_where(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected keys and values at the top level, got {type(tree).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {override!r}: write it as a.b=value")
        _assign(tree, key.strip(), value)
    return from_tree(tree)


def from_tree(tree: dict[str, Any]) -> Config:
    """The config of plain values; loads the plugins it names. ConfigError names the key."""
    return _checked(tree, own=True)


def from_record(tree: dict[str, Any]) -> Config:
    """The config that a run has written down, which may be a stranger's: no $VARIABLE of it is expanded, and no plugin
    loaded that is not installed. ConfigError names the key."""
    return _checked(tree, own=False)


def _checked(tree: dict[str, Any], own: bool) -> Config:
    plugins = tree.get("plugins") or ()
    if not isinstance(plugins, (list, tuple)) or not all(isinstance(name, str) for name in plugins):
        raise ConfigError(f"plugins = {plugins!r}: must be a list of modules, such as [my_package.my_stage]")
    load_plugins(plugins, here=own)
    config: Config = build(config_type(), tree, expand=own)
    for name in config.stages:
        known_stage(name).check(config)
    more = [brought for name in config.stages for brought in known_stage(name).brings(config)]
    return replace(config, stages=tuple(dict.fromkeys((*config.stages, *more))))


def _where(error: yaml.YAMLError) -> str:
    """What is wrong and in which line, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    return problem if mark is None else f"{problem} (line {mark.line + 1}, column {mark.column + 1})"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key that is given twice is an error: of two values the later would count in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode):
                if name.value in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key {name.value} is given twice", name.start_mark
                    )
                seen.add(name.value)
        return node


def _values(text: str) -> Any:
    """What safe YAML says; YAMLError also for numbers and dates that are none, and for what has no end."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"its aliases (*name) stand for more than {MOST_VALUES:,} values")
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, OverflowError) as error:
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, with those of its aliases; RecursionError where it holds itself."""
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        inside = [part for item in parts for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in inside)
    return known[id(node)]


def _assign(tree: dict[str, Any], key: str, value: str) -> None:
    *parents, last = key.split(".")
    node = tree
    for depth, name in enumerate(parents):
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: {'.'.join(parents[: depth + 1])} is a value, it has no keys below it")
        node = child
    try:
        node[last] = _values(value) if value.strip() else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {value!r} is not a YAML value: {_where(error)}") from error


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal one."""
    plain = json.loads(json.dumps(asdict(config)))
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120)
