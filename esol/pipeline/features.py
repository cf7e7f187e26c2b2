"""The features of a frozen backbone, kept in the run directory for the stages and runs that see the same crops."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from esol.base.schema import fingerprint
from esol.data.features import FeatureStore, clear, used
from esol.data.samples import Batch
from esol.models.backbones import Backbone
from esol.pipeline.context import Context
from esol.training.head import CamTask
from esol.training.task import Task

FEATURES = "features"  # below the run directory
_FORM = 1  # of the numbers that make features what they are: raised when the code computes others


def kept_features(context: Context, task: Task) -> FeatureStore | None:
    """The store of the task's features, which it fills; None where nothing is to be kept. A collective.

    Only a backbone of which nothing learns in this stage has features that stay. What is in the folder and was made by
    another backbone, from other crops or other data, is removed.
    """
    gib, engine = context.config.data.features, context.engine
    if not gib or not isinstance(task, CamTask) or any(p.requires_grad for p in task.net.backbone.parameters()):
        return None
    backbone = task.net.backbone.to(engine.device)
    stamp, folder = _stamp(context, backbone), context.run_dir / FEATURES
    if engine.is_main:
        (folder / stamp).mkdir(parents=True, exist_ok=True)
        clear(folder, stamp)
    engine.barrier("the folder of features")
    crop = context.config.data.crop
    with torch.no_grad(), engine.autocast():
        features = backbone(torch.zeros(1, 3, crop, crop, dtype=torch.uint8, device=engine.device))
    room = int((gib * 2**30 - used(folder / stamp)) / engine.world_size)
    _, *shape = features.shape
    store = FeatureStore(folder / stamp, (shape[0], shape[1], shape[2]), features.dtype, room)

    @torch.compiler.disable  # a disk is nothing to compile
    def keep(batch: Batch, x: Tensor) -> None:
        if not batch.get("skipped"):  # others stand in for damaged samples there
            store.add(batch["crop"], x)

    task.keep = keep
    return store


def _stamp(context: Context, backbone: Backbone) -> str:
    """What the features follow from."""
    config, weights = context.config, hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        weights.update(name.encode())
        weights.update(value.cpu().contiguous().numpy().tobytes())
    crops = (config.seed, config.data.crop, list(config.data.long_side), context.index.hash)
    how = (context.precision, context.engine.device.type, torch.__version__)
    return fingerprint(_FORM, config.model, weights.hexdigest(), crops, how)
