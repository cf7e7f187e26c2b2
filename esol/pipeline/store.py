"""What a run directory holds: the manifest of every stage, whether it still stands, and what it came from.

A stage writes the folder run_dir/<stage>: its outputs and, last, manifest.json with what went in (its version, its
settings, the data, the output of every stage that it read), what came out (each file by size and hash), its results and
the whole config that it ran with. A stage is current where all of that holds today and every stage that it came from is
current as well, up to the photos. Whoever reads a run reads manifests.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from esol.base.errors import CheckpointError, ConfigError, EsolError
from esol.base.files import atomic_write, sha256
from esol.base.progress import progress
from esol.base.schema import differing, fingerprint, finite
from esol.config import Config
from esol.pipeline.config_file import from_tree
from esol.pipeline.registry import Stage
from esol.pipeline.scores import Results, Scores, scores_from

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
            return from_tree(self.config)
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


@dataclass(frozen=True)
class State:
    """A stage as its folder stands today; why: the reason that it is not current, "" where it is."""

    manifest: Manifest | None
    why: str


class Store:
    """The stages of one run directory, held against a config and the data; it only reads, but for `finish`.

    stages: the table; data_hash: of the index; beat: told what is being done, for a watchdog.
    """

    def __init__(
        self,
        config: Config,
        stages: Mapping[str, type[Stage]],
        data_hash: str,
        beat: Callable[[str], None] = lambda doing: None,
    ) -> None:
        self.run_dir = Path(config.run_dir)
        self._config, self._stages, self._data, self._beat = config, stages, data_hash, beat

    def settings(self, name: str) -> dict[str, Any]:
        """What of the config shapes the stage's result, as plain JSON; initial weights count by content."""
        settings = self._stages[name].settings(self._config)
        if weights := self._stages[name].weights(self._config):
            path = weights[1].weights
            settings["weights"] = _sha256(Path(path)) if Path(path).is_file() else path
        return json.loads(json.dumps(settings))

    def consumed(self, name: str) -> dict[str, str]:
        """The data and what the stages that it reads have now, "" for one that has not finished."""
        found = {"data": self._data}
        settings, cue = self._stages[name].settings(self._config), self._config.saliency
        if "saliency" in settings and cue.source == "folder":
            found["saliency"] = _content(Path(cue.folder))
        for other in self._stages[name].consumes(self._config):
            manifest = read_manifest(self.run_dir / other)
            found[other] = manifest.output if manifest else ""
        return found

    def stamp(self, name: str) -> str:
        """The fingerprint that the stage has if it runs now."""
        return fingerprint(name, self._stages[name].version, self.settings(name), self.consumed(name))

    def state(self, name: str, known: dict[str, State] | None = None) -> State:
        """Whether the stage is current; CheckpointError where its manifest is damaged. known: states seen by now."""
        known = {} if known is None else known
        if name not in known:
            known[name] = self._state(name, known)
        return known[name]

    def _state(self, name: str, known: dict[str, State]) -> State:
        folder = self.run_dir / name
        manifest = read_manifest(folder)
        if manifest is None:
            old = made_by_another_version(folder)
            return State(None, "another version of esol made it" if old else "it has not finished")
        if manifest.version != self._stages[name].version:
            return State(manifest, f"its code changed (version {manifest.version} -> {self._stages[name].version})")
        if changed := differing(manifest.settings, self.settings(name)):
            return State(manifest, "; ".join(f"{key}: {old!r} -> {new!r}" for key, old, new in changed))
        consumed = self.consumed(name)
        names = dict.fromkeys((*consumed, *manifest.consumed))
        if other_inputs := [n for n in names if manifest.consumed.get(n) != consumed.get(n)]:
            return State(manifest, "; ".join(f"its input {n} changed" for n in other_inputs))
        for other in self._stages[name].consumes(self._config):
            if why := self.state(other, known).why:
                return State(manifest, f"its input {other} is out of date ({why})")
        return State(manifest, damage(folder, manifest, self._beat))

    def plan(self, chosen: Collection[str]) -> list[str]:
        """The chosen stages that would run; CheckpointError where one needs another that is not current."""
        known: dict[str, State] = {}
        runs = [name for name in self._stages if name in chosen and self.state(name, known).why]
        for name in runs:
            lacking = {o: why for o in self._came_from(name) if o not in chosen and (why := self.state(o, known).why)}
            for other, why in lacking.items():
                raise CheckpointError(
                    f"{name} needs {other} in {self.run_dir}, but {why}: add {', '.join(lacking)} to --stages"
                )
        return runs

    def finish(self, name: str, results: Results, world_size: int) -> None:
        """Writes the stage's manifest, and results.json with it."""
        folder = self.run_dir / name
        outputs = {}
        for path in (path for pattern in self._stages[name].produces for path in sorted(folder.glob(pattern))):
            self._beat(f"the hash of {path}")
            outputs[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        manifest = Manifest(
            stage=name,
            place=list(self._stages).index(name),
            makes=self._stages[name].makes,
            version=self._stages[name].version,
            fingerprint=self.stamp(name),
            settings=self.settings(name),
            consumed=self.consumed(name),
            outputs=outputs,
            results=finite(results.flat()),
            scored=finite(results.tree()),
            config=json.loads(json.dumps(asdict(self._config))),
            world_size=world_size,
            versions={package: version(package) for package in ("esol", "torch", "torchvision", "numpy")},
            finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
        text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1, allow_nan=False)
        atomic_write(folder / MANIFEST, text)
        self.write_results()

    def write_results(self) -> None:
        """results.json: what the manifests say, for people and scripts."""
        found = {name: manifest.results for name, manifest in manifests(self.run_dir).items()}
        atomic_write(self.run_dir / RESULTS, json.dumps(found, indent=1, allow_nan=False) + "\n")

    def _came_from(self, name: str) -> list[str]:
        """All stages that lie behind it, in the table's order."""
        behind: set[str] = set()
        waiting = [name]
        while waiting:
            for other in self._stages[waiting.pop()].consumes(self._config):
                if other not in behind:
                    behind.add(other)
                    waiting.append(other)
        return [other for other in self._stages if other in behind]


def damage(folder: Path, manifest: Manifest, beat: Callable[[str], None] = lambda doing: None) -> str:
    """The first output that is not what was written, in words; "" where all are."""
    total = len(manifest.outputs)
    with progress(f"check of {folder.name}", total, "files", visible=total > _MANY) as advance:
        for done, (file, written) in enumerate(manifest.outputs.items(), 1):
            path = folder / file
            beat(f"the check of {path}")
            try:
                if path.stat().st_size != written["bytes"] or _sha256(path) != written["sha256"]:
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
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("it holds no object")
        return Manifest(**tree) if tree.pop("format", None) == FORMAT else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): delete {folder} to run the stage again") from error


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


def _content(folder: Path) -> str:
    """Hash over the names and bytes of a folder's PNG files."""
    files = [(path.name, _sha256(path)) for path in sorted(folder.glob("*.png"))]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    """Read once by a process as long as the file stays as it is."""
    about = path.stat()
    key = (str(path.absolute()), about.st_ino, about.st_size, about.st_mtime_ns)
    if key not in _hashes:
        _hashes[key] = sha256(path)
    return _hashes[key]
