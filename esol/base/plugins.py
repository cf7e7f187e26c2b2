"""Modules of others that add to esol: what they hold adds itself to a register when it is imported."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from esol.base.errors import ConfigError

GROUP = "esol.plugins"  # the entry points by which installed packages name modules that are always loaded
_loaded: set[str] = set()


@cache
def import_all(package: str) -> None:
    """Imports every module of one of the project's own packages, whose contents add themselves to a register."""
    for part in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{part.name}")


def load_plugins(modules: Iterable[str] = (), here: bool = True) -> None:
    """Imports what installed packages offer, and the modules that a config or command names, once each.

    ConfigError where a module cannot be imported. here: a module of the folder that the command was started in is
    found, too; not for what a run directory names, which may lie in that folder with code of whoever made it.
    """
    if GROUP not in _loaded:
        _loaded.add(GROUP)
        modules = (*(point.value for point in entry_points(group=GROUP)), *modules)
    for name in modules:
        if name in _loaded:
            continue
        if not here and (name.partition(".")[0] in sys.stdlib_module_names or name.endswith("__main__")):
            raise ConfigError(f"plugin {name} is a program or a part of Python, which a run cannot have had")
        more = [str(Path.cwd())] if here else []
        sys.path += more
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever a stranger's module raises
            hint = "" if here else "; a run's plugins must be installed, or their folder must be on PYTHONPATH"
            raise ConfigError(f"plugin {name} cannot be imported ({type(error).__name__}: {error}){hint}") from error
        finally:
            for place in more:
                sys.path.remove(place)
        _loaded.add(name)
