"""Whether what a run directory holds still stands: the manifest of every stage against config, code and data.

A stage writes the folder run_dir/<stage>: its outputs and, last, manifest.json with what went in (its version, its
settings, the data, the output of every stage that it read), what came out (each file by size and hash), its results and
the whole config that it ran with. A stage is current where all of that holds today and every stage that it came from is
current as well, up to the photos.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from esol.base.errors import CheckpointError
from esol.base.files import atomic_write
from esol.base.schema import differing, fingerprint, finite
from esol.config import Config
from esol.pipeline.records import (
    FORMAT,
    MANIFEST,
    RESULTS,
    Manifest,
    damage,
    file_hash,
    folder_hash,
    made_by_another_version,
    manifests,
    read_manifest,
)
from esol.pipeline.registry import Stage
from esol.pipeline.scores import Results


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
            settings["weights"] = file_hash(Path(path)) if Path(path).is_file() else path
        return json.loads(json.dumps(settings))

    def consumed(self, name: str) -> dict[str, str]:
        """The data and what the stages that it reads have now, "" for one that has not finished."""
        found = {"data": self._data}
        settings, cue = self._stages[name].settings(self._config), self._config.saliency
        if "saliency" in settings and cue.source == "folder":
            found["saliency"] = folder_hash(Path(cue.folder))
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
            outputs[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
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
