"""docs/config.md, made from the sections of a config: every key, its default, values, unit, and what stands behind it.

python tests/config_page.py > docs/config.md
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
import sys
import tokenize
from pathlib import Path
from typing import Any, get_args, get_type_hints

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from esol.pipeline.registry import config_type, table

HEAD = """# Every key of a config

This page is made from the sections in the code (`python tests/config_page.py`), and a test keeps it true. A config is
a YAML file with these sections; what it does not name has the value given here. `--set section.key=value` overrides one
key. The files in configs/ are examples with reasons.
"""


def sentences(kind: type) -> dict[str, str]:
    """Field -> the comment behind it, or on the lines above it; of the dataclass and those that it is made from."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base is object or not dataclasses.is_dataclass(base) or base.__module__ == "types":
            continue
        above: list[str] = []
        field = ""
        for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(base)).readline):
            start = re.match(r"^    (\w+):", token.line)
            if token.type == tokenize.COMMENT:
                text = token.string.lstrip("# ")
                if token.line.lstrip().startswith("#"):
                    above.append(text)
                elif field:
                    found[field] = text
            elif start and token.type == tokenize.NAME and token.start[1] == 4:
                field = start[1]
                if above:
                    found[field] = " ".join(above)
                above = []
    return found


def rows(kind: type, value: Any, where: str) -> list[list[str]]:
    """A row for every key of a section, those of sections inside it among them."""
    hints, said, found = get_type_hints(kind), sentences(kind), []
    for spec in dataclasses.fields(kind):
        name, own = f"{where}.{spec.name}" if where else spec.name, getattr(value, spec.name, dataclasses.MISSING)
        if dataclasses.is_dataclass(hints[spec.name]):
            found += rows(hints[spec.name], own, name)
            continue
        found.append([f"`{name}`", _default(own), _values(hints[spec.name], spec.metadata), said.get(spec.name, "")])
    return found


def _default(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "must be given"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_default, value))}]"
    return '""' if value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def _values(hint: Any, meta: Any) -> str:
    words = [str(word) for part in (hint, *get_args(hint)) for word in get_args(part) if isinstance(word, (str, int))]
    text = " or ".join(dict.fromkeys(words)) if hint is not bool else "true or false"
    if meta.get("low") is not None:
        text = f"{meta['low']:g} to {meta['high']:g}" + (f", or {text}" if text else "")
    return f"{text} {meta['unit']}".strip() if meta.get("unit") else text


def page() -> str:
    """The whole page."""
    config = config_type()
    parts = [HEAD]
    own = {field.name: field for field in dataclasses.fields(config)}
    hints = get_type_hints(config)
    plain = [name for name in own if not dataclasses.is_dataclass(hints[name])]
    parts.append("## Of the whole run\n")
    said = sentences(config)
    values = {"run_dir": dataclasses.MISSING, **{n: own[n].default for n in plain if n != "run_dir"}}
    values["stages"] = "the usual ones"
    top = [[f"`{n}`", _default(values[n]), _values(hints[n], own[n].metadata), said.get(n, "")] for n in plain]
    parts.append(_table(top))
    stages = table()
    for name in (n for n in own if n not in plain):
        kind = hints[name]
        made = own[name].default_factory() if name != "data" else kind("")  # type: ignore[operator,misc]
        what = f"stage {name}" if name in stages else name
        parts.append(f"\n## {what}\n\n{(kind.__doc__ or '').strip().splitlines()[0]}\n")
        listed = rows(kind, made, name)
        if name == "data":
            listed[0][1] = "must be given"
        parts.append(_table(listed))
    return "\n".join(parts) + "\n"


def _table(listed: list[list[str]]) -> str:
    lines = ["| key | default | values | what it is |", "|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in listed)])


if __name__ == "__main__":
    print(page(), end="")
