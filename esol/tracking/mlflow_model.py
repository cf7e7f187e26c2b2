"""The MLflow model of `esol export`."""

from __future__ import annotations

import os
import warnings
from importlib.metadata import version
from pathlib import Path


def save_mlflow_model(folder: Path, weights: Path) -> None:
    """Writes a python_function model that `mlflow models serve` serves without this project being installed.

    weights: a file that deploy.model.load_network reads. The code goes along, requirements are what is here.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import AnyType

    root = Path(__file__).resolve().parents[2]
    needed = ("mlflow", "numpy", "pandas", "pillow", "pyyaml", "rich", "safetensors", "timm", "torch", "torchvision")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has no example of an input
        mlflow.pyfunc.save_model(
            folder,
            loader_module="esol.deploy.serving",
            data_path=str(weights),
            code_paths=[str(root / "esol")],
            signature=ModelSignature(
                inputs=Schema([ColSpec(AnyType(), "image")]),  # bytes, or base64 that esol.deploy.serving decodes
                outputs=Schema([ColSpec("string", "mask"), ColSpec("string", "shares")]),
            ),
            pip_requirements=[f"{name}=={version(name)}" for name in needed],
        )
