"""The table `stages` of python -m benchmarks: the work of training steps and of photos, beside what the machine can do.

The work of a step or photo: 2 FLOP for each multiplication of convolutions and matrix products, and the bytes that the
operators of PyTorch read and write, each operator by itself, views apart. Numpy's scoring and packing are in the time
alone. Networks and sizes are those of configs/custom-cpu.yaml, with random weights.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from benchmarks.common import CLASSES, once
from benchmarks.rows import Photos
from benchmarks.scaling_ranks import build_task, crop_of, random_batch
from esol.models.folded import for_training
from esol.models.heads import Heads
from esol.pipeline.cam import cam_stages
from esol.pipeline.context import Context
from esol.pipeline.crew import Crew
from esol.pipeline.inference import InferenceStage, _finish
from esol.stages.evaluate import Evaluate
from esol.stages.irn import IrnMasks
from esol.stages.localize import Localize
from esol.stages.psa import PsaMasks
from esol.training.optim import build_optimizer
from esol.training.task import Task

TRAINED = ("classify", "psa", "irn", "segment")
PHOTOS = 4
HEADINGS = ("stage", "of it", "GFLOP", "GB", "seconds", "TFLOP/s", "of the ceiling, %", "GB/s", "of the copy, %")


class Bytes(TorchDispatchMode):
    """Counts what the operators inside it read and write; `total` in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        if not view and "empty" not in func.__name__:  # neither touches what is stored
            self.total += sum(x.nbytes for x in tree_leaves((args, kwargs, found)) if isinstance(x, Tensor))
        return found


def counted(work: Callable[[], object]) -> tuple[int, int]:
    """FLOP and bytes of a call, of the operators that this thread dispatches."""
    own = {torch.ops.aten.convolution_backward: _backward}
    with Bytes() as moved, FlopCounterMode(display=False, custom_mapping=own) as flop:
        work()
    return flop.get_total_flops(), moved.total


def _backward(grad_shape: Any, x_shape: Any, w_shape: Any, *more: Any, **named: Any) -> int:
    """FLOP of a convolution's gradients, each as many as forward has; torch's own count forgets groups."""
    *_, transposed, _, _, wanted = more
    return conv_flop_count(x_shape, w_shape, grad_shape, transposed) * sum(wanted[:2])


def ceilings(side: int, gibibytes: float) -> dict[str, float]:
    """The most of ten tries: FLOP/s of square products by precision, and bytes/s of a copy, read and written."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, float] = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        out = torch.empty_like(a)
        found[name] = 2 * side**3 / min(once(partial(torch.matmul, a, b, out=out)) for _ in range(10))
    source = torch.ones(int(gibibytes * 2**28), device=device)
    copy = torch.zeros_like(source)
    found["copy"] = 2 * source.nbytes / min(once(partial(copy.copy_, source)) for _ in range(10))
    return found


def said(most: dict[str, float], side: int, gibibytes: float) -> str:
    """The ceilings, and how to read the table."""
    fp32, bf16, copy = (f"{most[name] / unit:.4g}" for name, unit in (("fp32", 1e12), ("bf16", 1e12), ("copy", 1e9)))
    return (
        f"Ceilings of this run: products of {side} x {side}, {fp32} TFLOP/s in float32 and {bf16} in bf16; a copy of "
        f"{gibibytes:g} GiB, {copy} GB/s read and written.\nBytes are those that every operator reads and writes: "
        "where they stay in a cache, they are faster than the copy.\n"
    )


class Kept:
    """What localize has just packed, as StageShards would read it."""

    def __init__(self, packed: dict[int, bytes]) -> None:
        self.packed = packed

    def arrays(self, ordinal: int, member: str) -> dict[str, NDArray[Any]]:
        """maps.npz of a photo."""
        with np.load(io.BytesIO(self.packed[ordinal])) as arrays:
            return dict(arrays)


def lines(photos: Photos, rounds: int, most: dict[str, float]) -> Iterator[list[object]]:
    """The lines of the table, under HEADINGS; most: the ceilings."""
    context = photos.context("custom-cpu.yaml")
    config = context.config
    peak, tasks = most[context.precision], dict[str, Task]()

    def line(name: str, what: str, work: Callable[[], object], timed: Callable[[], object], units: int) -> list[object]:
        flop, moved = (n / units for n in counted(work))
        timed()
        took = statistics.median(once(timed) for _ in range(rounds)) / units
        shares = (100 * flop / took / peak, 100 * moved / took / most["copy"])
        speeds = (f"{flop / took / 1e12:.3f}", f"{moved / took / 1e9:.1f}")
        return [name, what, flop / 1e9, moved / 1e9, took, speeds[0], shares[0], speeds[1], shares[1]]

    for name in TRAINED:
        section = config.named(name)
        tasks[name] = build_task(name, config)
        for_training(tasks[name], context.kind)
        context.engine.prepare(tasks[name], build_optimizer(tasks[name], section), section.clip_norm)
        batch = random_batch(section.global_batch, crop_of(name, config))
        step = partial(context.engine.train_step, [batch], 0.0)  # random networks run away at the recipe's rate
        yield line(name, f"a step of {len(batch['key'])} crops of {batch['image'].shape[3]}", step, step, 1)
    crew, chosen = Crew(context.engine.device), photos.ordinals[:PHOTOS]
    for stage in inference(context, tasks, chosen):
        finish = partial(_finish, stage, crew)
        groups, what = [[ordinal] for ordinal in chosen], f"a photo of {photos.side} pixels"
        alone, timed = partial(each, finish, groups), partial(side_by_side, crew, finish, groups)
        yield line(stage.name, what, alone, timed, len(chosen))


def each(finish: Callable[[Sequence[int]], object], groups: list[list[int]]) -> None:
    """One group after another, in this thread."""
    for group in groups:
        finish(group)


def side_by_side(crew: Crew, finish: Callable[[Sequence[int]], object], groups: list[list[int]]) -> None:
    """As a stage does it."""
    for _ in crew.map(finish, groups):
        pass


def inference(context: Context, tasks: dict[str, Task], ordinals: list[int]) -> Iterator[InferenceStage[Any]]:
    """The stages with the networks that steps were taken with, and the mask stages with the maps of the first one."""
    config, heads = context.config, Heads()
    for own in cam_stages():
        if own.name in config.stages:
            heads.add(own.source, own.head(config, heads, CLASSES))
    localize = Localize(context)
    localize.net, localize.written = context.ready(heads), list(heads)[-1]
    yield localize
    kept: Any = Kept({o: _finish(localize, Crew(context.engine.device), [o])[0][2]["maps.npz"] for o in ordinals})
    for stage in (PsaMasks(context), IrnMasks(context)):
        stage.maps, stage.net = kept, context.ready(tasks[stage.name.removesuffix("_masks")].handover)
        yield stage
    evaluate = Evaluate(context)
    evaluate.net, evaluate.learned = context.ready(tasks["segment"].handover), None
    yield evaluate
