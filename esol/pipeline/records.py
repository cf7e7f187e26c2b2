"""The record that every finished stage leaves behind: its manifest, and what it says of a run directory.

Whoever reads a run (report, predict, export, the model card) reads these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from esol.base.errors import CheckpointError, ConfigError, EsolError
from esol.base.files import sha256
from esol.base.progress import progress
from esol.base.strangers import content, json_tree, plain
from esol.config import Config
from esol.pipeline.config_file import from_record
from esol.pipeline.scores import Scores, scores_from

FORMAT = "esol-stage 3"
MANIFEST = "manifest.json"
RESULTS = "results.json"
_MANY = 100  # files whose check may take more than a few seconds
_hashes: dict[tuple[str, int, int, int], str] = {}  # path, inode, size, nanoseconds of the last change -> sha256


@dataclass(frozen=True)
class Manifest:
    """What a finished stage says of itself.

    place: among the stages that its program knew, in their order; makes: as the stage has it; outputs: path below its
    folder -> {"bytes", "sha256"}; results: all of them, flat; scored: its scores in their own form, and which of them
    is that of what it wrote.
    """

    stage: str
    place: int
    makes: str
    version: int
    fingerprint: str
    settings: dict[str, Any]
    consumed: dict[str, str]
    outputs: dict[str, dict[str, Any]]
    results: dict[str, Any]
    scored: dict[str, Any]
    config: dict[str, Any]
    world_size: int
    versions: dict[str, str]
    finished: str

    @property
    def output(self) -> str:
        """What a stage that reads this one notes of it."""
        text = json.dumps([self.fingerprint, self.outputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def ran_with(self) -> Config:
        """The config of the run that made it; CheckpointError where this program cannot read that any more."""
        try:
            return from_record(self.config)
        except ConfigError as error:
            raise CheckpointError(f"the config in the manifest of {self.stage} cannot be read: {error}") from error

    @property
    def scores(self) -> dict[str, Scores]:
        """Its scores by name, such as "cam", "plain" and "crf"."""
        return scores_from(self.scored, f"the manifest of {self.stage}")

    @property
    def last_scores(self) -> Scores | None:
        """The scores of the label maps that it wrote; None where they were not scored."""
        return self.scores.get(self.scored["last"])


def damage(folder: Path, manifest: Manifest, beat: Callable[[str], None] = lambda doing: None) -> str:
    """The first output that is not what was written, in words; "" where all are."""
    total = len(manifest.outputs)
    with progress(f"check of {folder.name}", total, "files", visible=total > _MANY) as advance:
        for done, (file, written) in enumerate(manifest.outputs.items(), 1):
            path = folder / file
            beat(f"the check of {path}")
            try:
                if path.stat().st_size != written["bytes"] or file_hash(path) != written["sha256"]:
                    return f"its {file} is not what was written"
            except FileNotFoundError:
                return f"its {file} is missing"
            except OSError as error:
                return f"its {file} cannot be read ({error.strerror})"
            advance(done, file)
    return ""


def read_manifest(folder: Path) -> Manifest | None:
    """A stage's manifest, None where there is none or another version wrote it; CheckpointError where it is damaged."""
    path = folder / MANIFEST
    try:
        tree = json_tree(content(path))
        if not isinstance(tree, dict):
            raise ValueError("it holds no object")
        if tree.pop("format", None) != FORMAT:
            return None
        _check(manifest := Manifest(**tree), folder)
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): delete {folder} to run the stage again") from error


_KINDS = {"str": str, "int": int, "dict": dict}
_NUMBERS = ("seconds", "judge", "lost", "photos", "loss")  # of results, those that readers count with
_WORDS = ("masks", "write", "initial_weights", "split")  # and those that they write down


def _check(manifest: Manifest, folder: Path) -> None:
    """ValueError where a manifest is none that a stage in this folder has written."""
    for field in fields(manifest):
        kind, value = _KINDS[str(field.type).partition("[")[0]], getattr(manifest, field.name)
        if not isinstance(value, kind):
            raise ValueError(f"{field.name} = {value!r:.80}")
    if manifest.stage != folder.name or not manifest.stage.isidentifier():
        raise ValueError(f"stage = {manifest.stage!r:.80}: another folder's")
    for file, written in manifest.outputs.items():
        about = written if isinstance(written, dict) else {}
        if not plain(file) or not (isinstance(about.get("bytes"), int) and isinstance(about.get("sha256"), str)):
            raise ValueError(f"outputs: {file!r:.80}")
    for name, value in manifest.results.items():
        number = value is None or isinstance(value, (int, float))
        if name in _NUMBERS or name.endswith("_judge"):
            fits = number and not isinstance(value, bool)
        else:
            fits = isinstance(value, str) or (number and name not in _WORDS)
        if not fits:
            raise ValueError(f"results: {name!r:.80} = {value!r:.80}")
    for name in ("consumed", "versions"):
        if not all(isinstance(value, str) for value in getattr(manifest, name).values()):
            raise ValueError(f"{name} holds what is no text")
    if not isinstance(manifest.scored.get("scores"), dict) or not isinstance(manifest.scored.get("last"), str):
        raise ValueError("scored has no scores")


def made_by_another_version(folder: Path) -> bool:
    """Whether a stage has finished in a program whose manifests this one does not read."""
    return (folder / MANIFEST).is_file() and read_manifest(folder) is None


def manifests(run_dir: Path) -> dict[str, Manifest]:
    """The manifests of all finished stages, in the order of the stages."""
    found = {path.parent.name: read_manifest(path.parent) for path in sorted(run_dir.glob(f"*/{MANIFEST}"))}
    there = [manifest for manifest in found.values() if manifest is not None]
    return {manifest.stage: manifest for manifest in sorted(there, key=lambda m: (m.place, m.stage))}


def is_run(folder: Path) -> bool:
    """Whether a stage has finished there."""
    return any(folder.glob(f"*/{MANIFEST}"))


def need(run_dir: Path, stage: str) -> Manifest:
    """The manifest of a stage that must have finished; CheckpointError where it has not, or its files are damaged."""
    manifest = read_manifest(run_dir / stage)
    if manifest is None:
        raise CheckpointError(f"{run_dir} has no finished {stage}: run it to its end, with this version of esol")
    if why := damage(run_dir / stage, manifest):
        raise CheckpointError(f"{run_dir / stage} is damaged, {why}: run {stage} again")
    return manifest


def finished(run_dir: Path) -> dict[str, Manifest]:
    """The manifests of all finished stages, in the order of the stages; EsolError where there is none."""
    found = manifests(run_dir)
    if not found:
        raise EsolError(f"{run_dir} has no finished stage: is it the folder of a run?")
    return found


def results(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Stage -> its results, flat, of all stages that have finished; EsolError where none has."""
    return {name: manifest.results for name, manifest in finished(run_dir).items()}


def outdated(run_dir: Path) -> list[str]:
    """A line for each finished stage that was made from what other stages no longer hold."""
    found = manifests(run_dir)
    stale: dict[str, str] = {}
    for name, manifest in found.items():
        for other, output in manifest.consumed.items():
            if other == "data":
                continue
            if other not in found:
                stale[name] = f"{name} was made from a {other} that is gone"
            elif found[other].output != output:
                stale[name] = f"{name} was made from an earlier {other}"
            elif other in stale:
                stale[name] = f"{name} was made from a {other} that is itself out of date"
    return list(stale.values())


def ran_with(run_dir: Path, *stages: str) -> Config:
    """The config that the first of the stages that has finished ran with, its run_dir where the run is now."""
    for stage in stages:
        if manifest := read_manifest(run_dir / stage):
            return replace(manifest.ran_with, run_dir=str(run_dir))
    raise CheckpointError(f"{run_dir} has no finished {stages[0]}: run it to its end, with this version of esol")


def folder_hash(folder: Path) -> str:
    """Hash over the names and bytes of a folder's PNG files."""
    files = [(path.name, file_hash(path)) for path in sorted(folder.glob("*.png"))]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """Read once by a process as long as the file stays as it is."""
    about = path.stat()
    key = (str(path.absolute()), about.st_ino, about.st_size, about.st_mtime_ns)
    if key not in _hashes:
        _hashes[key] = sha256(path)
    return _hashes[key]
