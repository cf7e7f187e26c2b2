"""ESOL: image-level labels in, pixel masks and a segmentation model out.

    run = esol.run("configs/demo.yaml", overrides=["seed=1"], stages=["classify"])
    run = esol.open_run("runs/demo")
    model = esol.load_model("runs/demo")
    model.predict("photo.jpg").overlay()

docs/python.md walks through them. Nothing heavy is imported before one of them is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esol.config import Config
    from esol.deploy.model import Model
    from esol.report.run import Run

__version__ = "0.1.0"
__all__ = ["__version__", "load_config", "load_model", "open_run", "run"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of a YAML file and `a.b=value` overrides.

    ConfigError, which names the key and says what to do, where something in it is wrong.
    """
    from esol.pipeline.config_file import load

    return load(path, overrides)


def run(
    config: str | Path | Config, overrides: Sequence[str] = (), stages: Sequence[str] | None = None, resume: bool = True
) -> Run:
    """Runs the stages of a config in this process, or only some of them, and opens the run.

    What is finished already is not done again; resume: an interrupted stage goes on from its last checkpoint. On many
    processes the launchers start esol/train.py instead. EsolError, in one line, for whatever can be mended.
    """
    from esol.base.errors import EsolError
    from esol.pipeline.config_file import load
    from esol.pipeline.job import run_job
    from esol.report.run import Run

    checked = load(config, overrides) if isinstance(config, (str, Path)) else config
    if checked is config and overrides:
        raise EsolError("overrides: give them to load_config, a config that is loaded does not change")
    if code := run_job(checked, stages, resume):
        raise EsolError(f"the run was stopped (exit code {code}); all is saved, call it again to go on")
    return Run(checked.run_dir)


def open_run(run_dir: str | Path) -> Run:
    """A run directory's results, photos, maps, masks and pictures; EsolError where no stage has finished there."""
    from esol.report.run import Run

    return Run(run_dir)


def load_model(place: str | Path, fast: bool = False, full_size: bool = False) -> Model:
    """The segmentation model of a run directory, of a folder that `esol export` wrote, or of a .safetensors file.

    fast: one scale, no mirror image, no CRF; full_size: photos are never made smaller. On a GPU where there is one.
    CheckpointError where there is no model.
    """
    from esol.deploy.model import Model

    return Model(place, fast, full_size)
