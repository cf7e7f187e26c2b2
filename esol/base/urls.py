"""URLs that hold secrets: what a run writes names its data and its server, and must not give them away."""

from __future__ import annotations

import re


def secret_in(url: str) -> tuple[str, str]:
    """What a URL gives away, in words, "" where it is nothing; and the URL without it."""
    scheme, separator, rest = url.partition("://")
    place, mark, _ = re.split(r"([?#])", rest, maxsplit=1) if re.search(r"[?#]", rest) else (rest, "", "")
    login, _, _ = place.partition("/")[0].rpartition("@")
    if not separator or not (mark or ":" in login):
        return "", url
    if ":" in login:
        return "a password", f"{scheme}://{place[len(login) + 1 :]}"
    return f"what follows a {mark}, such as a signature", f"{scheme}://{place}"
