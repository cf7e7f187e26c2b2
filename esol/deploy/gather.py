"""Which files of a folder are photos, decided by their bytes, and what the outputs of each are called."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from esol.base.errors import EsolError
from esol.base.strangers import content, printable
from esol.data.photos import HEAD, NEEDS_HEIC, OTHERS, photo_format

OUTPUTS = ("masks", "overlays", "cams", "confidence", "geotiff")  # the folders that predict writes into
REPORT = "predictions.json"
UNFINISHED = "predictions-unfinished"  # stands in a folder while predict writes into it, and says MARK
MARK = f"esol predict writes {REPORT} last\n"
READ = ("JPEG", "PNG", "WebP", *(kind for kind in OTHERS if kind != "HEIC" or find_spec("pillow_heif")))
SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".avif",
    ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".ico", ".jp2", ".j2k", ".jxl", ".psd", ".svg", ".tif",
    ".tiff", ".exr", ".hdr", ".tga", ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".nef", ".nrw", ".orf",
    ".pef", ".raf", ".raw", ".rw2", ".srw", ".x3f",
))  # fmt: skip
"""Names of pictures: a file that is called so is named where it cannot be read, whatever is in it."""

_PART = 160  # bytes of one part of an output's name, so that suffixes and temporary names fit into the usual 255
_PATH = 900  # bytes of an output's whole name


@dataclass
class Gathered:
    """A folder's photos, and everything else in words. Paths are relative to root, as the file system has them.

    photos: sorted; skipped: path -> why a picture, or what may be one, is not read; others: suffix -> number of files
    that are no pictures; hidden, repeated, written: paths whose names begin with a dot, links to folders that are read
    under their own name already, and folders that predict wrote.
    """

    root: Path
    photos: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    hidden: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """A line for each kind of thing that is left out on purpose."""
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in self.others.most_common(5))
        return [
            *([f"{self.others.total()} files are no pictures ({printable(kinds)})"] if self.others else []),
            *_examples("hidden, not read", self.hidden),
            *_examples("links to folders that are read already", self.repeated),
            *_examples("written by esol predict, not read", self.written),
        ]


def gather(photos: Path, out: Path) -> Gathered:
    """One photo, or all below a folder, through links too; each folder once. What predict wrote to `out` is left out.

    EsolError where there is no photo, or where `photos` lies in the folders that predict writes into.
    """
    try:
        _refuse_outputs(photos, out)
        if photos.is_dir():
            found = Gathered(photos)
            _walk(found, {identity for name in OUTPUTS if (identity := _identity(out / name))})
        elif photos.is_file():
            found = Gathered(photos.parent)
            _sort_in(found, photos.name, photos)
        else:
            raise EsolError(f"{photos}: no such photo or folder")
    except OSError as error:
        raise EsolError(f"cannot read {error.filename or photos}: {error.strerror or error}") from error
    if not found.photos and not found.skipped:
        more = "".join(f"; {note}" for note in found.notes())
        raise EsolError(f"{photos} holds no photo (JPEG, PNG, WebP, TIFF, BMP, GIF or AVIF){more}")
    for paths in (found.photos, found.hidden, found.repeated, found.written):
        paths.sort()
    return found


def _refuse_outputs(photos: Path, out: Path) -> None:
    place = Path(os.path.realpath(photos))
    for name in OUTPUTS:
        if place.is_relative_to(os.path.realpath(out / name)):
            raise EsolError(f"{photos} is inside {out / name}, which would be overwritten: give another --out")
    if not _is_ours(out):
        for name in (*OUTPUTS, REPORT):
            if (out / name).is_file() or ((out / name).is_dir() and any((out / name).iterdir())):
                raise EsolError(f"{out / name} was not written by esol predict: give another --out, or move it away")


def _is_ours(folder: Path) -> bool:
    """Whether an earlier predict wrote into it, finished or not."""
    try:
        if (folder / UNFINISHED).exists() and content(folder / UNFINISHED) == MARK.encode():
            return True
        report = json.loads(content(folder / REPORT, 1 << 32))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(report, dict) and {"model", "classes", "images", "skipped"} <= report.keys()


def _walk(found: Gathered, written: set[tuple[int, int]]) -> None:
    """Folders of the tree itself come first, then what links lead to, so that loops end and every name is plain."""
    seen: set[tuple[int, int] | None] = set()
    waiting: list[str] = [""]
    links: list[str] = []
    while waiting or links:
        relative = waiting.pop(0) if waiting else links.pop(0)
        place = found.root / relative
        identity = _identity(place)
        if identity in written:
            found.written.append(relative)
            continue
        if identity in seen:
            found.repeated.append(relative)
            continue
        seen.add(identity)
        try:
            with os.scandir(place) as entries:
                names = sorted(entry.name for entry in entries)
        except OSError as error:
            found.skipped[relative or "."] = f"the folder cannot be read ({error.strerror})"
            continue
        ours = bool({REPORT, UNFINISHED} & set(names)) and _is_ours(place)
        for name in names:
            path = os.path.join(relative, name)
            if name.startswith("."):
                found.hidden.append(path)
            elif ours and name in OUTPUTS and os.path.isdir(place / name):
                found.written.append(path)
            elif os.path.isdir(place / name):
                (links if os.path.islink(place / name) else waiting).append(path)
            else:
                _sort_in(found, path, place / name)


def _sort_in(found: Gathered, path: str, place: Path) -> None:
    """Puts one file where it belongs; never waits for a pipe or device."""
    suffix = os.path.splitext(path)[1].lower()
    try:
        if not stat.S_ISREG(place.stat().st_mode):
            kind, reason = "", "neither a file nor a folder"
        else:
            with open(place, "rb", opener=_without_waiting) as file:
                kind, reason = photo_format(file.read(HEAD)), ""
    except OSError as error:
        found.skipped[path] = _why(error, place)
        return
    if kind in READ or (not kind and not reason and suffix in SUFFIXES):  # decoding says what is wrong with the latter
        found.photos.append(path)
    elif kind or suffix in SUFFIXES:
        advice = NEEDS_HEIC if kind == "HEIC" else f"{kind} is not read: convert it to JPEG, PNG or WebP"
        found.skipped[path] = reason or advice
    else:
        found.others[suffix or "without suffix"] += 1


def _why(error: OSError, place: Path) -> str:
    if error.errno == errno.ENOENT and place.is_symlink():
        return f"a link to {printable(os.readlink(place))}, which is not there"
    if error.errno == errno.ELOOP:
        return "a link that leads in a circle"
    return f"cannot be read ({error.strerror})"


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _identity(place: Path) -> tuple[int, int] | None:
    try:
        status = place.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def output_names(paths: Sequence[str]) -> dict[str, str]:
    """Path of each photo -> name of its outputs, to which a suffix is added; no two meet on any file system.

    Without the picture's suffix; with it where two would meet; with a hash where they still do (names that differ in
    case or in how Unicode is composed), or where parts of the path cannot be a name everywhere or are too long.
    """
    return distinct({path: _candidates(path) for path in paths})


def _candidates(path: str) -> tuple[str, ...]:
    stem, suffix = os.path.splitext(path)
    plain, full = _safe(stem if suffix.lower() in SUFFIXES else path), _safe(path)
    hashed = f"{plain}-{_digest(path)}"
    return (plain, full, hashed) if full == path else (hashed,)


def _safe(path: str) -> str:
    """Without control characters and bytes that are not UTF-8, cut to a length, no folder named like an output."""
    clean = "".join("_" if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in path)
    *folders, last = (_cut(part, _PART) for part in clean.split("/"))
    folders = [f"{part}_" if part.lower().endswith((".png", ".jpg")) else part for part in folders]
    while folders and sum(len(part.encode()) + 1 for part in (*folders, last)) > _PATH:
        folders.pop()
    return "/".join((*folders, last))


def _cut(part: str, length: int) -> str:
    return part.encode()[:length].decode(errors="ignore")


def distinct(candidates: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """The first candidate of each that no other has, compared without case and composition, or a later one."""
    level = dict.fromkeys(candidates, 0)
    while True:
        chosen = {key: names[level[key]] for key, names in candidates.items()}
        times = Counter(map(_folded, chosen.values()))
        meet = [
            key for key, name in chosen.items() if times[_folded(name)] > 1 and level[key] + 1 < len(candidates[key])
        ]
        if not meet:
            return chosen
        for key in meet:
            level[key] += 1


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def texts(paths: Iterable[str]) -> dict[str, str]:
    r"""Path -> the path as valid Unicode, bytes that are not UTF-8 as \xff; different for different paths."""
    plain = {path: os.fsencode(path).decode(errors="backslashreplace") for path in paths}
    times = Counter(plain.values())
    return {p: text if p == text or times[text] == 1 else f"{text} ({_digest(p)})" for p, text in plain.items()}


def _digest(path: str) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:10]


def _examples(what: str, paths: Sequence[str]) -> Iterator[str]:
    if paths:
        more = ", ..." if len(paths) > 3 else ""
        yield f"{len(paths)} {what}: {', '.join(map(printable, paths[:3]))}{more}"
