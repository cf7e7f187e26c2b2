"""The engine on Hugging Face accelerate: one process, or DistributedDataParallel over gloo or NCCL.

accelerate starts the process group, places and wraps the model. Autocast and loss scaling are torch's own, because
accelerate trains in float32 without a word when it is asked for fp16 on a CPU.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch import Tensor, nn

from esol.base.errors import CheckpointError, ConfigError, LaunchError, first_line
from esol.config import EngineConfig
from esol.data.samples import Batch
from esol.engines.base import StepResult
from esol.engines.compiled import compile_task
from esol.engines.ranks import Ranks, wants_cpu, weighted_mean
from esol.engines.states import STATE, on_host, read_state
from esol.training.task import Task


class AccelerateEngine(Ranks):
    """esol.engines.base.Engine on accelerate. LaunchError where the started processes do not form the job."""

    def __init__(self, config: EngineConfig, seed: int) -> None:
        super().__init__(config, seed)
        cpu, threads = wants_cpu(), self._set_threads()
        with self._bounded():
            self._accelerator = self._start(cpu)
        torch.set_num_threads(threads)
        self.rank = self._accelerator.process_index
        self.world_size = self._accelerator.num_processes
        self.device = torch.device("cpu") if cpu else self._accelerator.device
        self._check_world()
        self._graphs = config.compile == "graph"
        if self._graphs and self.device.type != "cuda":
            raise ConfigError(
                "engine.compile = graph records CUDA graphs and this job computes on the CPU: take engine.compile = "
                "blocks, or off"
            )
        kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if self._accelerator.distributed_type not in kinds:
            raise LaunchError(
                f"accelerate was configured for {self._accelerator.distributed_type.value}, but engine.name = "
                "accelerate is plain data parallelism: take --engine deepspeed, or give accelerate launch "
                "--config_file one of launch/*.yaml"
            )
        self._settle()
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")

    def _start(self, cpu: bool) -> Accelerator:
        env = os.environ
        if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env and not env.keys() & _WORLD_VARIABLES:
            raise LaunchError(
                "accelerate launch was asked for several processes but started one (it does so with --cpu): "
                "use accelerate launch --config_file launch/cpu.yaml --num_processes N"
            )
        try:
            return Accelerator(
                cpu=cpu,
                mixed_precision="no",
                kwargs_handlers=[
                    InitProcessGroupKwargs(timeout=self._timeout),
                    DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=False),
                ],
            )
        except (RuntimeError, ValueError) as error:
            raise self._no_job(first_line(error)) from error

    def prepare(self, task: Task, optimizer: torch.optim.Optimizer, clip_norm: float = 0.0) -> None:
        """See base.Engine."""
        self._accelerator.free_memory()  # it keeps every model it has wrapped, the former stage's too
        self._task, self._optimizer, self._clip_norm = task, optimizer, clip_norm
        self._learning = [p for group in optimizer.param_groups for p in group["params"]]
        task.train()
        if self.device.type == "cuda":  # activations are channels_last: else every convolution copies its weights
            task.to(memory_format=torch.channels_last)
        for parameter in self._learning if self.world_size > 1 else ():
            if parameter.shape[2:] == (1, 1):
                parameter.register_hook(partial(_with_strides, parameter.stride()))
        compile_task(task, self._config.compile)
        with warnings.catch_warnings():  # accelerate knows no other name for it yet
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            self._module: nn.Module = self._accelerator.prepare_model(task)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self._config.precision == "fp16")
        self._step = 0

    def train_step(
        self, microbatches: Sequence[Batch], lr: float, stop: bool = False, writing: bool = False
    ) -> StepResult:
        """See base.Engine."""
        self._begin_step()
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        self._optimizer.zero_grad(set_to_none=True)
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        weights = [batch.get("weight", 1.0) for batch in microbatches]
        with self._contact("gradients of the other ranks"):
            outputs = [
                self._backward(batch, share=weight / len(microbatches), last=i == len(microbatches) - 1)
                for i, (batch, weight) in enumerate(zip(microbatches, weights, strict=True))
            ]
            self._scaler.unscale_(self._optimizer)
            gradients = [p.grad for p in self._learning if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)  # of averaged gradients: the same on every rank
            losses = torch.stack([output["loss"] for output in outputs])
            asked = [torch.full((), flag, device=self.device) for flag in (stop, writing)]
            flags = torch.stack([~losses.isfinite().all(), *asked]).float()
            if self.world_size > 1:
                dist.all_reduce(flags, dist.ReduceOp.MAX)
        bad_loss, any_stop, any_writing, grad_norm = torch.cat(
            [flags, norm.float().reshape(1)]
        ).tolist()  # the step's one wait for the GPU
        if bad_loss:
            self._diverged(microbatches, losses)
        finite = math.isfinite(grad_norm)
        if not finite and not self._scaler.is_enabled():
            self._diverged(microbatches, losses)
        if finite:
            if self._clip_norm:
                nn.utils.clip_grads_with_norm_(self._learning, self._clip_norm, norm)
            self._scaler.step(self._optimizer)
        self._scaler.update()
        means = weighted_mean(outputs, weights)
        return StepResult(means, grad_norm, skipped=not finite, stop=bool(any_stop), writing=bool(any_writing))

    def _backward(self, batch: Batch, share: float, last: bool) -> dict[str, Tensor]:
        """Adds one micro-batch's gradients; ranks exchange them with the last. Returns detached losses and report."""
        moved = self._moved(batch)
        with nullcontext() if last else self._accelerator.no_sync(self._module):
            with self.autocast():
                losses, report = self._module(moved)
            self._scaler.scale(losses["loss"].float() * share).backward()
        # A graph writes the next step's numbers where this one's are.
        return {n: value.detach().to(torch.float32, copy=self._graphs) for n, value in {**report, **losses}.items()}

    def _whole_state(self) -> dict[str, Any] | None:
        if not self.is_main:
            return None
        model, optimizer = self._task.state_dict(), self._optimizer.state_dict()
        return on_host({"model": model, "optimizer": optimizer, "scaler": self._scaler.state_dict()})

    def load(self, folder: Path, step: int) -> None:
        """See base.Engine."""
        state = read_state(folder / STATE)
        try:
            self._task.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            if self._scaler.is_enabled():
                self._scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{folder / STATE} does not fit this model and optimizer: {error}") from error
        self._step = step

    def model_state_dict(self) -> dict[str, Tensor]:
        """See base.Engine."""
        return {
            name: value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype, copy=True)
            for name, value in self._task.state_dict().items()
        }

    def close(self) -> None:
        """See base.Engine."""
        self._accelerator.free_memory()
        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(True)  # so that another engine can start in this process


def _with_strides(strides: tuple[int, ...], gradient: Tensor) -> Tensor:
    """A 1x1 convolution's gradient with its weights' strides, of which two say nothing: DDP warns where they differ."""
    return gradient.as_strided(gradient.shape, strides) if gradient.stride()[:2] == strides[:2] else gradient


_WORLD_VARIABLES = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
