"""The engine on native DeepSpeed: ZeRO 0 to 3, optimizer offload, over gloo or NCCL.

Weights are float32 for every precision, as in the accelerate engine: autocast computes in bf16 or fp16, and DeepSpeed
partitions optimizer state, gradients and weights. Its own bf16 and fp16 modes cast the whole model and are not used.
Checkpoints are the accelerate engine's: whole tensors, so that either engine and any number of ranks resume them.
"""

from __future__ import annotations

import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esol.base.errors import CheckpointError, first_line
from esol.config import EngineConfig
from esol.data.samples import Batch
from esol.engines.base import StepResult
from esol.engines.deepspeed_config import deepspeed_config
from esol.engines.ranks import Ranks, wants_cpu, weighted_mean
from esol.engines.states import STATE, on_host, read_state
from esol.training.task import Task

_SLOTS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}  # per weight; AdamW's step is one number


class DeepSpeedEngine(Ranks):
    """esol.engines.base.Engine on deepspeed.initialize. LaunchError where the started processes do not form the job."""

    def __init__(self, config: EngineConfig, seed: int) -> None:
        super().__init__(config, seed)
        cpu, threads = wants_cpu(), self._set_threads()
        if cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
        self.device = torch.device("cpu") if cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if not cpu:
            torch.cuda.set_device(self.device)
        alone: dict[str, Any] = (
            {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        )
        try:
            with self._bounded():
                dist.init_process_group("gloo" if cpu else "nccl", timeout=self._timeout, **alone)
        except (RuntimeError, ValueError) as error:
            raise self._no_job(first_line(error)) from error
        with _quiet():
            import deepspeed

            if cpu:  # else it compiles an operator that gloo does without, and waits without end where that was killed
                vars(deepspeed.ops)["__compatible_ops__"] = defaultdict(bool)
            deepspeed.init_distributed(dist_init_required=False)
        self._deepspeed: Any = deepspeed
        torch.set_num_threads(threads)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._check_world()
        self._settle()
        self._engine: Any = None

    def prepare(self, task: Task, optimizer: torch.optim.Optimizer, clip_norm: float = 0.0) -> None:
        """See base.Engine."""
        if self._engine is not None:
            self._engine.destroy()
        self._task, self._clip_norm = task, clip_norm
        self._kind = "adamw" if isinstance(optimizer, torch.optim.AdamW) else "sgd"
        self._learning = [p for group in optimizer.param_groups for p in group["params"]]
        self._group_sizes = [len(group["params"]) for group in optimizer.param_groups]
        self._zero = self._config.deepspeed.zero
        task.train()
        module = _Autocast(task.to(self.device), self)
        with _quiet(), _local_rank():
            self._engine, self._optimizer, _, _ = self._deepspeed.initialize(
                model=module, optimizer=optimizer, config=deepspeed_config(self._config.deepspeed, clip_norm)
            )
        self._scale = LossScale(self._config.precision == "fp16")
        self._step = 0

    def train_step(
        self, microbatches: Sequence[Batch], lr: float, stop: bool = False, writing: bool = False
    ) -> StepResult:
        """See base.Engine."""
        self._begin_step()
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        weights = [batch.get("weight", 1.0) for batch in microbatches]
        if self._zero:
            self._optimizer.loss_scaler.cur_scale = self._scale.value  # its backward multiplies, its step divides
        with self._contact("gradients of the other ranks"):
            outputs = []
            for i, (batch, weight) in enumerate(zip(microbatches, weights, strict=True)):
                self._engine.set_gradient_accumulation_boundary(i == len(microbatches) - 1)
                losses, report = self._engine(self._moved(batch))
                loss = losses["loss"].float() * weight / len(microbatches)
                self._engine.backward(loss if self._zero else loss * self._scale.value)
                outputs.append({name: value.detach().float() for name, value in {**report, **losses}.items()})
            each = torch.stack([output["loss"] for output in outputs])
            asked = [torch.full((), flag, device=self.device) for flag in (stop, writing)]
            flags = torch.stack([~each.isfinite().all(), *asked]).float()
            if self.world_size > 1:
                dist.all_reduce(flags, dist.ReduceOp.MAX)
            bad_loss, any_stop, any_writing = flags.tolist()
            if bad_loss:
                self._diverged(microbatches, each)
            norm, applied = self._update_partitions() if self._zero else self._update_whole()
        if not applied and not self._scale.dynamic:
            self._diverged(microbatches, each)
        self._scale.update(applied)
        means = weighted_mean(outputs, weights)
        return StepResult(means, norm, skipped=not applied, stop=bool(any_stop), writing=bool(any_writing))

    def _update_whole(self) -> tuple[float, bool]:
        """ZeRO 0: the gradients are whole and averaged. The global norm, and whether weights changed."""
        gradients = [p.grad for p in self._learning if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients) / self._scale.value
        value = float(norm)  # a wait for the GPU, as in train_step
        finite = math.isfinite(value)
        if finite:
            if self._scale.value != 1:
                torch._foreach_div_(gradients, self._scale.value)
            if self._clip_norm:
                nn.utils.clip_grads_with_norm_(self._learning, self._clip_norm, norm)
            self._engine.step()
        self._engine.zero_grad()
        return value, finite

    def _update_partitions(self) -> tuple[float, bool]:
        """ZeRO 1 to 3: DeepSpeed's step checks for overflow, clips and updates."""
        self._engine.step()
        if self._optimizer.overflow:
            return math.inf, False
        return float(self._engine.get_global_grad_norm()), True

    def _whole_state(self) -> dict[str, Any] | None:
        model, optimizer = self._whole_model(), self._whole_optimizer()  # all ranks take part
        if not self.is_main:
            return None
        return {"model": model, "optimizer": optimizer, "scaler": self._scale.state_dict()}

    def load(self, folder: Path, step: int) -> None:
        """See base.Engine."""
        state = read_state(folder / STATE)
        try:
            self._set_model(state["model"])
            self._set_optimizer(state["optimizer"])
            if self._scale.dynamic:
                self._scale.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{folder / STATE} does not fit this model and optimizer: {error}") from error
        self._step = step

    def model_state_dict(self) -> dict[str, Tensor]:
        """See base.Engine."""
        return self._whole_model()

    def close(self) -> None:
        """See base.Engine."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def _gathered(self, change: bool = False) -> Iterator[None]:
        """Inside, the task's parameters are whole; change: what the main rank writes into them stays."""
        if self._zero < 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(self._task.parameters()), 0 if change else None):
            yield

    def _whole_model(self) -> dict[str, Tensor]:
        with self._gathered():
            return {
                name: value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype, copy=True)
                for name, value in self._task.state_dict().items()
            }

    def _set_model(self, values: dict[str, Tensor]) -> None:
        with self._gathered(change=True):
            self._task.load_state_dict(values)
        if self._zero in (1, 2):
            self._optimizer.refresh_fp32_params()
        elif self._zero == 3:
            names = {id(p): name for name, p in self._task.named_parameters()}
            for parameter in self._learning:
                value = values[names[id(parameter)]].to(self.device, torch.float32)
                self._deepspeed.utils.safe_set_full_fp32_param(parameter, value)

    def _whole_optimizer(self) -> dict[str, Any]:
        """As torch's optimizer over whole parameters would save itself."""
        if not self._zero:
            return on_host(self._optimizer.state_dict())
        inner, state = self._optimizer.optimizer, {}
        if any(inner.state.values()):
            self._link()
            step = next((s["step"] for s in inner.state.values() if "step" in s), None)
            for index, parameter in enumerate(self._learning):
                found = {slot: self._slot(parameter, slot) for slot in _SLOTS[self._kind]}
                state[index] = {slot: value.cpu() for slot, value in found.items() if value is not None}
                if step is not None:
                    state[index]["step"] = torch.tensor(float(step))  # a tensor of its own: it is counted up in place
        groups, first = [], 0
        for group, size in zip(inner.param_groups, self._group_sizes, strict=True):
            groups.append(
                {k: v for k, v in group.items() if k != "params"} | {"params": list(range(first, first + size))}
            )
            first += size
        return {"state": state, "param_groups": groups}

    def _set_optimizer(self, saved: dict[str, Any]) -> None:
        if not self._zero:
            self._optimizer.load_state_dict(saved)
            return
        if not saved["state"]:
            return
        if [len(group["params"]) for group in saved["param_groups"]] != self._group_sizes:
            raise ValueError("the optimizer's parameter groups have other sizes")
        inner = self._optimizer.optimizer
        for partition in self._partitions():
            own = inner.state[partition]
            for slot in _SLOTS[self._kind]:
                own[slot] = torch.zeros_like(partition)
            if "step" in saved["state"][0]:
                own["step"] = saved["state"][0]["step"].clone()
        self._link()
        for index, parameter in enumerate(self._learning):
            for slot in _SLOTS[self._kind]:
                value = saved["state"][index][slot].to(self.device, torch.float32)
                self._deepspeed.utils.safe_set_full_optimizer_state(parameter, value, slot)

    def _slot(self, parameter: Tensor, slot: str) -> Tensor | None:
        """One whole state tensor of a parameter; a collective."""
        return self._deepspeed.utils.safe_get_full_optimizer_state(parameter, slot)

    def _partitions(self) -> list[Tensor]:
        """The flat float32 weights of this rank."""
        if self._zero == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return list(self._optimizer.single_partition_of_fp32_groups)

    def _link(self) -> None:
        """ZeRO 1 and 2 link parameters to their state once, after the first group's first step: too early for SGD."""
        if self._zero in (1, 2):
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()


class _Autocast(nn.Module):
    """The task with autocast inside: DeepSpeed switches off what is on around it."""

    def __init__(self, task: Task, engine: Ranks) -> None:
        super().__init__()
        self.task = task
        self._enter = engine.autocast

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with self._enter():
            return self.task(batch)


class LossScale:
    """fp16's dynamic loss scale by torch's GradScaler's rule, and in its checkpoint format; 1 where not dynamic."""

    growth_interval = 2000  # steps without overflow before it doubles

    def __init__(self, dynamic: bool) -> None:
        self.dynamic, self.value, self._tracker = dynamic, 2.0**16 if dynamic else 1.0, 0

    def update(self, applied: bool) -> None:
        """After a step: whether weights changed, that is no gradient had overflowed."""
        if not self.dynamic:
            return
        self._tracker = self._tracker + 1 if applied else 0
        if not applied:
            self.value /= 2
        elif self._tracker == self.growth_interval:
            self.value, self._tracker = self.value * 2, 0

    def state_dict(self) -> dict[str, Any]:
        if not self.dynamic:
            return {}
        numbers = {"scale": self.value, "growth_factor": 2.0, "backoff_factor": 0.5}
        return numbers | {"growth_interval": self.growth_interval, "_growth_tracker": self._tracker}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self._tracker = float(state["scale"]), int(state["_growth_tracker"])


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed tells its life at every start."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)  # that torch's optimizers are untested here is not so: tests/distributed
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _local_rank() -> Iterator[None]:
    """deepspeed.initialize asks for the variable even where no launcher has set any."""
    missing = "LOCAL_RANK" not in os.environ
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        yield
    finally:
        if missing:
            del os.environ["LOCAL_RANK"]
