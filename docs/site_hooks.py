"""What `make docs` does to the pages: the README is the first one, and pages from elsewhere in the repository join in.

Links that lead out of docs/ to another of these pages go there; those to other files become their names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
JOINED = {"README.md": "index.md", "launch/README.md": "launch.md", "benchmarks/RESULTS.md": "results.md"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of JOINED."""
    for source, page in JOINED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns a page's links from the repository's places to the site's; a link to a file that is not there stays, and
    the build names it."""
    origin = next((source for source, name in JOINED.items() if name == page.file.src_uri), f"docs/{page.file.src_uri}")

    def placed(found: re.Match[str]) -> str:
        mark, text, target, anchor = (part or "" for part in found.groups())
        if ":" in target:
            return found[0]
        place = os.path.normpath(Path(origin).parent / target)
        if place in JOINED:
            return f"{mark}[{text}]({JOINED[place]}{anchor})"
        if place.startswith("docs/"):
            return f"{mark}[{text}]({place.removeprefix('docs/')}{anchor})"
        return text if (ROOT / place).exists() else found[0]

    return _LINK.sub(placed, markdown)
