"""Checkpoints that are whole or absent: written into step-N.tmp, agreed on by all ranks, and renamed to step-N.

The state is copied, and a thread of the main rank writes the copy while training goes on. All that ranks do together
is done by their main threads, at steps that are the same on all.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from esol.base.errors import CheckpointError
from esol.base.files import atomic_write, sha256, sync_folder
from esol.base.schema import differing, finite
from esol.base.strangers import content, json_tree, plain
from esol.engines.base import Engine, gather_text

_LOG = logging.getLogger(__name__)
_FORMAT = "esol-checkpoint 1"
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Resumed:
    """Where a checkpoint left off: optimizer steps done, the notes that the Checkpointer had then, and its ranks."""

    step: int
    notes: dict[str, Any]
    world_size: int


class _Writing:
    """A save under way: on the main rank a thread writes files into step-N.tmp and hashes them.

    notes: of the moment; error: what went wrong, once it has ended.
    """

    def __init__(self, step: int, temporary: Path, notes: dict[str, Any]) -> None:
        self.step, self.temporary, self.notes = step, temporary, notes
        self.error, self.files = "", dict[str, dict[str, Any]]()
        self._thread: threading.Thread | None = None

    def start(self, write: Callable[[Path], list[Path]]) -> None:
        # A daemon: a process that an error ends shall not wait for a disk. What it leaves is a .tmp.
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    def failed(self, problem: Exception) -> None:
        self.error = f"cannot write {getattr(problem, 'filename', None) or self.temporary}: {problem}"

    def goes_on(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self, minutes: float) -> None:
        if self._thread is not None:
            self._thread.join(60 * minutes)
        if self.goes_on():
            self.error = f"cannot write {self.temporary}: not done {minutes:g} minutes later (engine.timeout)"

    def _run(self, write: Callable[[Path], list[Path]]) -> None:
        try:
            written = write(self.temporary)
            self.files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in written}
        except Exception as problem:  # whatever it is, all ranks wait to hear of it
            self.failed(problem)


class Checkpointer:
    """Saves and finds the training state of one stage; every method is a collective.

    folder: shared by all ranks; holds step-N/ (state.pt, manifest.json) and `latest`, the newest one's name.
    config: what the fingerprint was computed from, as plain JSON, to name the keys that differ. notes: kept in the
    manifest as they are at each save (the last logged values). every: steps between saves, for the loop; keep: how many
    checkpoints stay; timeout: minutes that `finish` waits for files.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        *,
        fingerprint: str,
        config: dict[str, Any],
        every: int = 500,
        keep: int = 2,
        notes: dict[str, Any] | None = None,
        timeout: float = 30.0,
    ) -> None:
        self.folder, self.every = folder, every
        self._engine, self._keep = engine, keep
        self._fingerprint, self._config = fingerprint, json.loads(json.dumps(config))
        self._notes = {} if notes is None else notes
        self._timeout = timeout
        self._writing: _Writing | None = None

    def save(self, step: int) -> None:
        """Copies the state after `step` steps, which a thread writes, once the save before it is finished.

        CheckpointError on every rank as from finish, or where step-N.tmp cannot be made.
        """
        self.finish()
        temporary = self.folder / f"step-{step}.tmp"
        self._main_only(f"cannot prepare {temporary}", lambda: _make_empty(temporary))
        writing = _Writing(step, temporary, finite(dict(self._notes)))
        try:
            if (write := self._engine.snapshot()) is not None:
                writing.start(write)
        except Exception as problem:  # whatever it is, the other ranks wait to hear of it
            writing.failed(problem)
        self._writing = writing

    @property
    def writing(self) -> bool:
        """Whether this rank still writes files of the last save."""
        return self._writing is not None and self._writing.goes_on()

    def finish(self) -> None:
        """Waits for the files of the last save and makes its step-N of them; nothing where that is done already.

        CheckpointError on every rank if any could not write, and then the earlier checkpoints are untouched.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        self._engine.beat(f"the files of the checkpoint after step {writing.step}")
        writing.wait(self._timeout)
        self._agree(writing.error, writing.temporary)
        self._main_only(f"cannot finish {writing.temporary}", lambda: self._name(writing), writing.temporary)

    def _name(self, writing: _Writing) -> None:
        temporary, final = writing.temporary, self.folder / f"step-{writing.step}"
        manifest = {
            "format": _FORMAT,
            "step": writing.step,
            "fingerprint": self._fingerprint,
            "world_size": self._engine.world_size,
            "config": self._config,
            "notes": writing.notes,
            "files": writing.files,
        }
        atomic_write(temporary / _MANIFEST, json.dumps(manifest, indent=1))
        if final.exists():  # a damaged one that resume passed over
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(self.folder)
        atomic_write(self.folder / "latest", final.name + "\n")
        self._prune(writing.step)

    def _prune(self, step: int) -> None:
        """Keeps the newest; any beyond `step` were passed over as damaged, and would crowd good ones out."""
        found = _steps(self.folder)
        for other, path in found[: -self._keep] + [item for item in found if item[0] > step]:
            if other != step:
                shutil.rmtree(path, ignore_errors=True)

    def resume(self) -> Resumed | None:
        """Loads the newest undamaged checkpoint into the prepared engine; None where there is none at all.

        Damaged ones are passed over with a warning. CheckpointError on every rank where the configuration differs,
        all are damaged, or a rank cannot read the folder.
        """
        chosen, error = -1, ""
        if self._engine.is_main:
            try:
                chosen = self._choose()
            except CheckpointError as problem:
                error = str(problem)
        self._agree(error)
        step = int(self._engine.reduce(torch.tensor([chosen]), "max"))
        if step < 0:
            return None
        path = self.folder / f"step-{step}"
        try:
            manifest = json_tree(content(path / _MANIFEST))
            self._engine.load(path, step)
        except (CheckpointError, OSError, ValueError) as problem:
            error = f"{problem} (all ranks must see the same folder {self.folder})"
        self._agree(error)
        return Resumed(step, manifest["notes"], manifest["world_size"])

    def _choose(self) -> int:
        """The step of the newest undamaged checkpoint, -1 without any."""
        found = _steps(self.folder)
        for step, path in reversed(found):
            try:
                manifest = verify(path)
            except CheckpointError as problem:
                _LOG.warning("%s; passing over it", problem)
                continue
            if manifest["fingerprint"] != self._fingerprint:
                keys = ", ".join(key for key, *_ in differing(manifest["config"], self._config)) or "an input"
                raise CheckpointError(
                    f"{path} was made with another configuration ({keys} differ): "
                    f"go back to that one, or start afresh in another run_dir"
                )
            return step
        if found:
            raise CheckpointError(f"every checkpoint in {self.folder} is damaged: delete that folder to start afresh")
        return -1

    def _main_only(self, what: str, action: Any, temporary: Path | None = None) -> None:
        error = ""
        if self._engine.is_main:
            try:
                action()
            except OSError as problem:
                error = f"{what}: {problem}"
        self._agree(error, temporary)

    def _agree(self, error: str, temporary: Path | None = None) -> None:
        """Raises on every rank if any has an error; also the barrier between the phases."""
        errors = [f"rank {rank}: {text}" for rank, text in enumerate(gather_text(self._engine, error)) if text]
        if not errors:
            return
        kept = ""
        if temporary is not None:
            if self._engine.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            left = [path.name for _, path in _steps(self.folder)]
            kept = f"; the last good checkpoint is {left[-1]}" if left else "; there is no earlier checkpoint"
        raise CheckpointError("; ".join(errors) + kept)


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there and undamaged; CheckpointError names what is not."""
    try:
        manifest: dict[str, Any] = json_tree(content(path / _MANIFEST))
        if manifest["format"] != _FORMAT:
            raise CheckpointError(f"{path} has format {manifest['format']!r:.80}, this program reads {_FORMAT!r}")
        if path.name != f"step-{manifest['step']}" or not isinstance(manifest["notes"], dict):
            raise ValueError("it is that of another step")
        if not isinstance(manifest["world_size"], int):
            raise ValueError("it does not say how many ranks there were")
        for name, expected in manifest["files"].items():
            if not plain(name) or not (path / name).is_file():
                raise ValueError(f"{name!r:.80} is no file of it")
            if (path / name).stat().st_size != expected["bytes"] or sha256(path / name) != expected["sha256"]:
                raise CheckpointError(f"{path / name} is damaged: its content is not what was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return manifest


def _make_empty(temporary: Path) -> None:
    for stale in temporary.parent.glob("step-*.tmp"):  # of a process that was killed
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """The finished checkpoints, oldest first."""
    found = [(path.name.removeprefix("step-"), path) for path in folder.glob("step-*")]
    return sorted((int(number), path) for number, path in found if number.isdecimal() and len(number) < 19)
