"""What of a task is compiled: the repeated blocks of its networks, or the whole of it as CUDA graphs."""

from __future__ import annotations

import logging
import warnings
from typing import Literal

import torch
from torch import nn

from esol.ops import pairs

_LOG = logging.getLogger(__name__)
_FORMS = 256  # of one piece of code: blocks share theirs, and each shape, and what learns, makes another
BACKEND = "inductor"  # of blocks


def compile_task(task: nn.Module, how: Literal["off", "blocks", "graph"]) -> None:
    """Compiles a task in place, so that modules, parameters and state keep their names; called when all else is set.

    Nothing is compiled before its first call. blocks: each by itself, which takes seconds for every kind of block,
    while the graph of a whole network takes minutes; heads and losses stay as they are. graph: the task's forward and
    backward, replayed by the GPU without the host, for micro-batches of one size.
    """
    if how == "off":
        return
    ready()
    if how == "graph":
        task.compile(mode="reduce-overhead", dynamic=False)
        return
    found = blocks(task)
    for block in found:
        block.compile(backend=BACKEND, dynamic=False)
    if not found:
        _LOG.warning("engine.compile = blocks: this network has no repeated blocks, so that nothing is compiled")


def ready() -> None:
    """Tells the compiler what it has to know of our code; it is loaded here, seconds in which nothing else needs it."""
    torch.compiler.reset()  # what a stage before this one compiled is in nobody's way then
    torch._dynamo.config.recompile_limit = _FORMS
    torch._dynamo.config.optimize_ddp = False  # it refuses graphs with gradients of our own, such as those of pairs
    torch.compiler.assume_constant_result(pairs.ways)
    warnings.filterwarnings("ignore", message=".*lru_cache", module="torch._dynamo")  # all of ours are pure


def blocks(net: nn.Module) -> list[nn.Module]:
    """The modules with layers of their own that stand in a row (nn.Sequential), but no rows and none inside another."""
    found = []
    for child in net.children():
        row = isinstance(net, nn.Sequential) and not isinstance(child, nn.Sequential)
        found += [child] if row and any(child.children()) else blocks(child)
    return found
