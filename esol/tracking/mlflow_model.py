"""The MLflow model of a run: `esol export` writes it into a folder, the follower logs it at the run."""

from __future__ import annotations

import os
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any


def save_mlflow_model(folder: Path, weights: Path) -> None:
    """Writes a python_function model that `mlflow models serve` serves without this project being installed.

    weights: a file that deploy.model.load_network reads. The code goes along, requirements are what is here.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has no example of an input
        mlflow.pyfunc.save_model(folder, **_model(weights))


def log_mlflow_model(uri: str, run: str, weights: Path, photo: str) -> None:
    """Logs the same model at a run, with a photo in base64 as an example of an input; the run is ended."""
    import mlflow
    import pandas

    mlflow.set_tracking_uri(uri)
    with mlflow.start_run(run_id=run):
        mlflow.pyfunc.log_model(name="model", input_example=pandas.DataFrame({"image": [photo]}), **_model(weights))


def _model(weights: Path) -> dict[str, Any]:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    root = Path(__file__).resolve().parents[2]
    needed = ("mlflow", "numpy", "pandas", "pillow", "pyyaml", "rich", "safetensors", "timm", "torch", "torchvision")
    return {
        "loader_module": "esol.deploy.serving",
        "data_path": str(weights),
        "code_paths": [str(root / "esol")],
        "signature": ModelSignature(
            inputs=Schema([ColSpec(AnyType(), "image")]),  # bytes, or base64 that esol.deploy.serving decodes
            outputs=Schema([ColSpec("string", "mask"), ColSpec("string", "shares")]),
            params=ParamSchema([ParamSpec("fast", DataType.boolean, False)]),
        ),
        "pip_requirements": [f"{name}=={version(name)}" for name in needed],
    }
