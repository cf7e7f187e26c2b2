"""Names as people and their tools write them: when two of a class are one, which file is meant, what is a safe key."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import PurePosixPath
from urllib.parse import unquote

from esol.base.errors import DataError
from esol.data.index import MOST_CLASSES

_KEY_BYTES = 80  # tar headers hold 100, extension included
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "„": "“", "‘": "’", "«": "»"}
_JOINERS = "\u200c\u200d"  # mean something between the letters of some scripts
_NEGATIVES = ("good", "free", "none", "negative", "negatives", "normal", "ok")
_LETTER = r"[^\W_]"
_UPLOAD = re.compile(r"[0-9a-f]{8}-")  # what Label Studio puts before the name of an uploaded file


def tidy(text: str) -> str:
    """The same name in Unicode's composed form without invisible characters, quotes around it and surplus spaces."""
    text = unicodedata.normalize("NFC", text)
    text = "".join(c for c in text if c.isspace() or c in _JOINERS or unicodedata.category(c) not in ("Cf", "Cc"))
    text = re.sub(rf"(?<!\w)[{_JOINERS}]+|[{_JOINERS}]+(?!\w)", "", " ".join(text.split()))
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    return text


def fold(name: str) -> str:
    """What tidy names of one class have in common: all but upper and lower case; single letters stay apart."""
    bare = re.sub(f"[{_JOINERS}]", "", name)
    return bare if len(bare) == 1 else unicodedata.normalize("NFC", bare.lower())


def similar(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ by a hyphen, space, underscore, final punctuation or a plural's ending alone.

    Neither other letters (car, cat) nor other digits (1.5, 15) nor signs with a meaning (C, C++) make names similar.
    """
    found: list[tuple[str, str]] = []
    first: dict[str, str] = {}
    for name in names:
        bare = _bare(name)
        if bare in first:
            found.append((first[bare], name))
        first.setdefault(bare, name)
    for bare, name in first.items():
        if len(bare) > 2 and bare[-1].isalpha():
            plurals = [bare + "s", *([bare + "es"] if re.search(r"(s|x|z|ch|sh|o)$", bare) else [])]
            plurals += [bare[:-1] + "ies"] if bare.endswith("y") else []
            found += [(name, first[plural]) for plural in plurals if plural in first]
    return found


def _bare(name: str) -> str:
    if len(name) == 1:
        return name
    text = unicodedata.normalize("NFKC", fold(name)).lower()
    text = text.strip(" .,:;!?…") or text
    between = rf"({_LETTER})(?:[\s_]+|[-‐‑–]|[.'’])(?={_LETTER})"
    return re.sub(rf"(?!\d\W?_?\d){between}", r"\1", text)


def matcher(classes: Sequence[str]) -> Callable[[str], str]:
    """From a label to the class that it names: its exact spelling, else the only one that folds alike, else itself."""
    exact = set(classes)
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(fold(name), []).append(name)

    def match(label: str) -> str:
        label = label if label in exact else tidy(label)
        found = alike.get(fold(label), [])
        return found[0] if label not in exact and len(found) == 1 else label

    return match


def check_count(classes: Sequence[str], where: str) -> None:
    """DataError where masks cannot number the classes."""
    if len(classes) > MOST_CLASSES:
        raise DataError(f"{where}: {len(classes)} classes; masks can number {MOST_CLASSES}: merge or leave out some")


def is_background(name: str) -> bool:
    """Whether a name says what no class is: background, _background_, BG."""
    return tidy(name).strip("_ ").lower() in ("background", "bg")


def is_negative(name: str) -> bool:
    """Whether a label or a folder says that its photos show no object: good, free, none, negative, background, ..."""
    return is_background(name) or tidy(name).lower() in _NEGATIVES


def foreground(names: Iterable[str], where: str) -> tuple[tuple[str, ...], list[str]]:
    """A list of classes without what stands for no class at its head, as labelme, CVAT and mmseg write it; and notes.

    DataError, naming `where`, for a background further down, a name that is given twice, none, or more than 254.
    """
    given = [tidy(name) for name in names]
    start = next((i for i, name in enumerate(given[:2], 1) if is_background(name)), 0)
    if start == 2 and given[0].strip("_ ").lower() not in ("ignore", "void", "unlabeled", "unlabelled"):
        start = 0
    classes = tuple(given[start:])
    notes = [f"{where}: {', '.join(given[:start])} is no class, masks number it 0"] if start else []
    for number, name in enumerate(classes, 1 + start):
        if is_background(name):
            raise DataError(
                f"{where}, entry {number}: {name!r} cannot be a class, since 0 is background in every mask; take it "
                "out and number the masks without it"
            )
    if twice := [name for name, times in Counter(classes).items() if times > 1]:
        raise DataError(f"{where} names a class twice: {twice[0]}")
    if not classes or not all(classes):
        raise DataError(f"{where} must name each class once, one a line")
    check_count(classes, where)
    return classes, notes


def safe_key(name: str) -> str:
    """A sample's key from a path without extension: dots, slashes, spaces and what does not print are underscores.

    Longer ones than 80 bytes are cut and end in a hash of the whole; names that differ may meet in one key.
    """
    key = "".join("_" if c in "./\\" or c.isspace() or not c.isprintable() else c for c in name)
    if len(key.encode()) <= _KEY_BYTES:
        return key
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:12]
    return key.encode()[: _KEY_BYTES - 13].decode(errors="ignore") + "_" + digest


class FileNames:
    """The files of a folder, found under the names that tables and annotation files give them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        self._by_form: dict[str, list[str]] = {}
        self._by_base: dict[str, list[str]] = {}
        for name in sorted(self.names):
            form = unicodedata.normalize("NFC", name)
            self._by_form.setdefault(form, []).append(name)
            self._by_base.setdefault(PurePosixPath(form).name, []).append(name)
        self._tops = {name.split("/", 1)[0] for name in self.names if "/" in name}

    def same(self, wanted: str) -> str | None:
        """The name itself, or the one that differs by its Unicode form alone (macOS writes é as two characters)."""
        if wanted in self.names:
            return wanted
        found = self._by_form.get(unicodedata.normalize("NFC", wanted), [])
        return found[0] if len(found) == 1 else None

    def find(self, wanted: str) -> str | None:
        """The name itself, or the one file meant by it; None where there is none or more than one.

        In turn: another Unicode form, backslashes, percent signs and addresses, folders before it that are not
        here, Label Studio's eight digits before a name, a folder here that the name lacks.
        """
        if wanted in self.names:
            return wanted
        for name in self._spellings(wanted.strip()):
            if (same := self.same(name)) is not None:
                return same
        base = unicodedata.normalize("NFC", wanted.strip())
        found = [] if "/" in base or "\\" in base else self._by_base.get(base, [])
        return found[0] if len(found) == 1 else None

    def find_stem(self, wanted: str) -> str | None:
        """The one file that has this name before its suffix."""
        found = self._by_stem.get(unicodedata.normalize("NFC", wanted), [])
        return found[0] if len(found) == 1 else None

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        stems: dict[str, list[str]] = {}
        for name in self.names:
            path = PurePosixPath(unicodedata.normalize("NFC", name))
            if path.suffix:
                stems.setdefault(str(path.with_suffix("")), []).append(name)
        return stems

    def _spellings(self, wanted: str) -> Iterable[str]:
        yield wanted
        for path in dict.fromkeys((wanted, unquote(wanted.rpartition("?d=")[2].split("?")[0]), tidy(wanted))):
            path = re.sub(r"^[a-zA-Z][a-zA-Z0-9+.-]*:/*", "", path.replace("\\", "/"))
            parts = [part for part in path.split("/") if part not in ("", ".")]
            if ".." in parts:
                continue
            while parts:
                yield "/".join(parts)
                if _UPLOAD.match(parts[-1]):
                    yield "/".join([*parts[:-1], parts[-1][9:]])
                if len(parts) > 1 and parts[0] in self._tops:
                    break  # it is about a folder that is here: not another file of that name
                parts = parts[1:]
