"""Class names and keys as people write them: what is the same is folded, what only looks the same is a question."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from esol.data.index import MOST_CLASSES
from esol.errors import DataError

_QUOTES = "\"'`\u00b4\u2018\u2019\u201c\u201d\u00ab\u00bb"
_KEY_BYTES = 80  # tar headers hold 100, extension included


def clean(name: str) -> str:
    """NFC, without invisible characters and quotation marks around it, every run of spaces one space."""
    visible = "".join(c for c in unicodedata.normalize("NFC", name) if unicodedata.category(c) != "Cf")
    return " ".join(visible.split()).strip(_QUOTES).strip()


def fold(names: Mapping[str, int]) -> tuple[dict[str, str], list[str]]:
    """Labels as written, with their counts -> the class of each, and a note for each class that took others in.

    The same is what differs in case, composition or spaces; the commonest spelling stands. DataError for names that
    differ in punctuation, accents or a plural alone: only a list of classes can say whether they are one.
    """
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for name, count in names.items():
        spellings[clean(name).casefold()][clean(name)] += count
    chosen = {key: min(own, key=lambda n: (-own[n], n)) for key, own in spellings.items()}
    bare: dict[str, str] = {}
    for key in sorted(chosen, key=lambda k: (len(_bare(k)), k)):
        own = _bare(key)
        other = next((bare[form] for form in (own, own.removesuffix("s"), own.removesuffix("es")) if form in bare), "")
        if other:
            raise DataError(
                f"the labels {chosen[other]!r} and {chosen[key]!r} look like one class: write them alike, or put both "
                "into classes.txt if they are two"
            )
        bare[own or key] = key
    notes = [
        f"{chosen[key]}: also written {', '.join(repr(n) for n in sorted(own_spellings) if n != chosen[key])}"
        for key, own_spellings in sorted(spellings.items())
        if len(own_spellings) > 1
    ]
    return {name: chosen[clean(name).casefold()] for name in names}, notes


def _bare(name: str) -> str:
    """Letters and digits alone, without accents."""
    apart = unicodedata.normalize("NFKD", name)
    return "".join(c for c in apart if c.isalnum())


def is_background(name: str) -> bool:
    """Whether a name says what no class is: background, _background_, BG."""
    return _bare(clean(name).casefold()) in ("background", "bg")


def foreground(names: Iterable[str], where: str) -> tuple[tuple[str, ...], list[str]]:
    """A list of classes without what stands for no class at its head, as labelme, CVAT and mmseg write it; and notes.

    DataError, naming `where`, for a background further down, a name that is given twice, none, or more than 254.
    """
    given = [clean(name) for name in names]
    start = next((i for i, name in enumerate(given[:2], 1) if is_background(name)), 0)
    if start == 2 and _bare(given[0].casefold()) not in ("ignore", "void", "unlabeled", "unlabelled"):
        start = 0
    classes = given[start:]
    notes = [f"{where}: {', '.join(given[:start])} is no class, masks number it 0"] if start else []
    for number, name in enumerate(classes, 1 + start):
        if is_background(name):
            raise DataError(
                f"{where}, entry {number}: {name!r} cannot be a class, since 0 is background in every mask; take it "
                "out and number the masks without it"
            )
    twice = [name for name, times in Counter(name.casefold() for name in classes).items() if times > 1]
    if twice:
        raise DataError(f"{where} names a class twice: {twice[0]!r}")
    if not classes or not all(classes):
        raise DataError(f"{where} names no class" + (" in a line" if classes else ""))
    if len(classes) > MOST_CLASSES:
        raise DataError(f"{where}: {len(classes)} classes; masks can number {MOST_CLASSES}")
    return tuple(classes), notes


def keys_of(paths: Sequence[str], stems: bool = False) -> dict[str, str]:
    """Path of each photo -> its key, without dots, slashes, spaces and control characters, 80 bytes at most.

    The path without its suffix (stems: the last part of it); where two would meet, or one is too long, a longer name or
    a hash tells them apart, whatever the order of the paths.
    """
    candidates: dict[str, tuple[str, ...]] = {}
    for path in paths:
        whole = str(PurePosixPath(path).with_suffix("")) if PurePosixPath(path).name else path
        tail = hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()[:10]
        short = _safe(PurePosixPath(whole).name) if stems else _safe(whole)
        hashed = f"{_cut(_safe(path), _KEY_BYTES - 11)}-{tail}"
        own = (short, _safe(whole), hashed)
        candidates[path] = tuple(name for name in own if name and len(name.encode()) <= _KEY_BYTES)
    level = dict.fromkeys(candidates, 0)
    while True:
        chosen = {path: names[level[path]] for path, names in candidates.items()}
        times = Counter(chosen.values())
        meet = [p for p, key in chosen.items() if times[key] > 1 and level[p] + 1 < len(candidates[p])]
        if not meet:
            return chosen
        for path in meet:
            level[path] += 1


def _safe(path: str) -> str:
    return "".join(c if c.isprintable() else "_" for c in re.sub(r"[./\\\s]", "_", path))


def _cut(text: str, length: int) -> str:
    return text.encode()[:length].decode(errors="ignore")
