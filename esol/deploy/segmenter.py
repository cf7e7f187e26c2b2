"""A trained DeepLab, ready to predict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from esol.base.errors import CheckpointError
from esol.config import BackboneConfig, PredictionConfig
from esol.models.backbones import build_backbone
from esol.models.deeplab import DeepLab
from esol.pipeline import store
from esol.pipeline.model_file import ModelInfo, read_info
from esol.pipeline.weights import WEIGHTS


def load_network(place: str | Path) -> tuple[DeepLab, ModelInfo]:
    """The network, in eval mode on the CPU, of a run directory, an exported folder or a .safetensors file.

    A run directory predicts as its evaluate stage did, before that has run as segment's header says. CheckpointError
    where there is no such model.
    """
    place = Path(place)
    run = store.is_run(place)
    older = run and store.made_by_another_version(place / "segment")  # its weights and header are as they were
    segment = store.need(place, "segment") if run and not older else None
    path = place / "segment" / WEIGHTS if run else place / WEIGHTS if place.is_dir() else place
    info = read_info(path)
    evaluated = store.read_manifest(place / "evaluate") if run else None
    if segment and evaluated and evaluated.consumed["segment"] == segment.output:
        info = replace(info, evaluate=evaluated.ran_with.section(PredictionConfig))
    model = BackboneConfig(info.backbone, output_stride=8, freeze="all")
    net = DeepLab(build_backbone(model, pretrained=False), len(info.classes) + 1, info.rates)
    try:
        net.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    return net.eval(), info
