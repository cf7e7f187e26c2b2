"""Things that modules of the project, and plugins, add under a name of their own."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TypeVar

from esol.base.errors import ConfigError

Thing = TypeVar("Thing")


class Named(dict[str, Thing]):
    """Name -> thing, in the order in which they were added; what: a noun for messages, such as "backbone"."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def add(self, name: str) -> Callable[[Thing], Thing]:
        """A decorator that adds a thing under this name; ValueError where another module's has the name already.

        A module that is imported a second time, as spawned processes do, puts its own in place of the first.
        """

        def adding(thing: Thing) -> Thing:
            other = self.get(name)
            if other is not None and getattr(other, "__module__", "") != getattr(thing, "__module__", ""):
                raise ValueError(f"there are two {self.what}s called {name!r}: rename one of them")
            self[name] = thing
            return thing

        return adding

    def need(self, name: str, where: str) -> Thing:
        """The thing of this name; ConfigError, with the nearest name, where there is none. where: the config's key."""
        if name in self:
            return self[name]
        close = difflib.get_close_matches(name, self, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(self)}"
        raise ConfigError(f"{where} = {name!r}: there is no such {self.what}; {hint}")
