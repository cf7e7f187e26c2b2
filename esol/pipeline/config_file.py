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
from esol.config import Config
from esol.pipeline.registry import config_type, known_stage


def load(source: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file, applies `a.b=value` overrides in order, checks everything; ConfigError names the key."""
    try:
        text = Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read config {source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{source} is not UTF-8 text (line {line}: {error.reason}): save it as UTF-8") from error
    try:
        tree = yaml.load(text, _Loader) or {}
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
    """The config of plain values, such as a manifest holds; loads the plugins it names. ConfigError names the key."""
    plugins = tree.get("plugins") or ()
    if isinstance(plugins, str) or not all(isinstance(name, str) for name in plugins):
        raise ConfigError(f"plugins = {plugins!r}: must be a list of modules, such as [my_package.my_stage]")
    load_plugins(plugins)
    config: Config = build(config_type(), tree)
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


def _assign(tree: dict[str, Any], key: str, value: str) -> None:
    *parents, last = key.split(".")
    node = tree
    for depth, name in enumerate(parents):
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: {'.'.join(parents[: depth + 1])} is a value, it has no keys below it")
        node = child
    try:
        node[last] = yaml.load(value, _Loader) if value.strip() else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {value!r} is not a YAML value: {_where(error)}") from error


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal one."""
    plain = json.loads(json.dumps(asdict(config)))
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120)
