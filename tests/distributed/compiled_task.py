"""Tasks of all kinds on a tiny network, and steps of them: what tests of compiled code run on one or two ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from esol.base.schema import build
from esol.config import EngineConfig, ModelConfig, TrainConfig
from esol.data.samples import Batch
from esol.engines import compiled, make_engine
from esol.models.affinity_net import AffinityNet
from esol.models.backbones import Backbone, build_backbone
from esol.models.cam_net import CamNet
from esol.models.deeplab import DeepLab
from esol.models.folded import for_training
from esol.models.irn_net import IrnNet
from esol.stages.classify import ClassifyConfig, ClassifyTask
from esol.stages.expand import ExpandConfig, ExpandTask
from esol.stages.irn import IrnConfig, IrnTask
from esol.stages.psa import PsaConfig, PsaTask
from esol.stages.segment import SegmentConfig, SegmentTask
from esol.training.optim import build_optimizer
from esol.training.task import Task

SIDE = 65


def task(kind: str, name: str = "timm:test_resnet") -> Task:
    """A task whose batch norms are folded, as the pipeline has it."""
    torch.manual_seed(0)

    def backbone(freeze: str, stride: int = 8) -> Backbone:
        options = {"backbone": name, "weights": "none", "output_stride": stride, "freeze": freeze}
        return build_backbone(build(ModelConfig, options))

    made: Task
    if kind == "classify":
        made = ClassifyTask(CamNet(backbone("none"), 4, 16), build(ClassifyConfig, {}), torch.rand(4))
    elif kind == "expand":
        made = ExpandTask(CamNet(backbone("all"), 4, 16), build(ExpandConfig, {"game": True}))
        torch.nn.init.normal_(made.handover.offset.conv.bias, std=0.3)  # type: ignore[arg-type]  # none whole
    elif kind == "psa":
        made = PsaTask(AffinityNet(backbone("none")), build(PsaConfig, {"radius": 3}))
    elif kind == "irn":
        made = IrnTask(IrnNet(backbone("all", 16)), build(IrnConfig, {"radius": 3}))
    else:
        noise = {"after": 0.2, "filter": 0.3, "doubt": "correct", "sure": [0.3, 0.25]}
        made = SegmentTask(DeepLab(backbone("none"), 5), build(SegmentConfig, {"inputs": [1.0, 0.5], "noise": noise}))
    for_training(made, None)
    return made


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(
        image=torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator),
        labels=torch.randint(0, 2, (2, 4), generator=generator).float(),
        target=torch.randint(0, 5, (2, SIDE, SIDE), dtype=torch.uint8, generator=generator),
        key=[f"{step}-0", f"{step}-1"],
        done=torch.tensor(step / 10),
    )


def train(
    kind: str,
    how: str,
    steps: int,
    change: Callable[[Task], None] | None = None,
    start: Path | None = None,
    leave: Path | None = None,
    backend: str = "",
) -> dict[str, Any]:
    """Steps on this rank's batches with engine.compile = how: losses, state, and the graphs compiled after each step.

    change: what else is done to the task; start, leave: folders to go on from, which two steps have left, and to save
    into; backend: of blocks, in a process of its own.
    """
    compiled.BACKEND = backend or compiled.BACKEND
    counters.clear()
    engine: Any = make_engine(build(EngineConfig, {"threads": 1, "timeout": 2, "compile": how}), seed=7)
    own = task(kind)
    if change is not None:
        change(own)
    engine.prepare(own, build_optimizer(own, TrainConfig(lr=0.01, momentum=0.9)), 1.0)
    if start is not None:
        engine.load(start, 2)
    losses, graphs = [], []
    for step in range(2 if start else 0, steps):
        losses.append(engine.train_step([batch(2 * step + engine.rank)], 0.01).losses["loss"])
        graphs.append(counters["stats"]["unique_graphs"])
    if leave is not None:
        write = engine.snapshot()
        if write is not None:
            write(leave)
    state = engine.model_state_dict()
    engine.close()
    return {"losses": torch.stack(losses), "state": state, "graphs": graphs}
