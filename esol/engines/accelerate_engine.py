"""The engine on Hugging Face accelerate: one process, or DistributedDataParallel over gloo or NCCL.

accelerate starts the process group, places and wraps the model. Autocast and loss scaling are torch's own, because
accelerate trains in float32 without a word when it is asked for fp16 on a CPU.
"""

from __future__ import annotations

import io
import logging
import math
import os
import pickle
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch import Tensor, nn

from esol.config import EngineConfig
from esol.engines.base import StepResult, gather_text
from esol.errors import CheckpointError, DivergenceError, LaunchError
from esol.files import atomic_write
from esol.tasks.base import Batch, Task

_LOG = logging.getLogger(__name__)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class AccelerateEngine:
    """esol.engines.base.Engine on accelerate. LaunchError where the started processes do not form the job."""

    def __init__(self, config: EngineConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        threads = config.threads or max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        os.environ["OMP_NUM_THREADS"] = str(
            threads
        )  # launchers put 1 there; accelerate sets threads itself where it is missing
        self._accelerator = self._start(cpu)
        torch.set_num_threads(threads)
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        self.is_main = self.rank == 0
        self.device: torch.device = torch.device("cpu") if cpu else self._accelerator.device
        self._check_world()
        # small agreements go over gloo even between GPUs: its waits are bounded and end in an error, not in an abort
        self._host: Any = None
        if self.world_size > 1 and dist.get_backend() != "gloo":
            self._host = dist.new_group(backend="gloo", timeout=self._timeout)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means float32; whoever wants speed takes bf16
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        if (
            self.device.type == "cpu"
        ):  # costs nothing here; on CUDA it forbids operators that have no deterministic form
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        _seed_all(seed)  # the same on all ranks: they build the same model

    @property
    def _timeout(self) -> timedelta:
        return timedelta(minutes=self._config.timeout)

    def _start(self, cpu: bool) -> Accelerator:
        env = os.environ
        if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env and not env.keys() & _WORLD_VARIABLES:
            raise LaunchError(
                "accelerate launch was asked for several processes but started one (it does so with --cpu): "
                "use accelerate launch --config_file launch/cpu.yaml --num_processes N"
            )
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        given = " ".join(f"{name}={env.get(name, '(not set)')}" for name in names)
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
            raise LaunchError(
                f"the processes did not form a job within {self._config.timeout:g} minutes (engine.timeout); "
                f"this one was given {given}. {_first_line(error)}"
            ) from error

    def _check_world(self) -> None:
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world_size != asked:
            raise LaunchError(
                f"WORLD_SIZE={asked}, but the engine sees {self.world_size} process(es): start with torchrun or "
                "accelerate launch and a file of launch/, so that RANK, LOCAL_RANK and MASTER_ADDR are set too"
            )
        kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if self._accelerator.distributed_type not in kinds:
            raise LaunchError(
                f"accelerate was configured for {self._accelerator.distributed_type.value}, but engine.name = "
                "accelerate is plain data parallelism: give accelerate launch --config_file one of launch/*.yaml"
            )

    def prepare(self, task: Task, optimizer: torch.optim.Optimizer, clip_norm: float = 0.0) -> None:
        """See base.Engine."""
        self._accelerator.free_memory()  # it keeps every model it has wrapped, the former stage's too
        self._task, self._optimizer, self._clip_norm = task, optimizer, clip_norm
        self._learning = [p for group in optimizer.param_groups for p in group["params"]]
        task.train()
        with warnings.catch_warnings():  # accelerate knows no other name for it yet
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            self._module: nn.Module = self._accelerator.prepare_model(task)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self._config.precision == "fp16")
        _seed_all(self._seed + 1_000_003 * (self.rank + 1))

    def train_step(self, microbatches: Sequence[Batch], lr: float, stop: bool = False) -> StepResult:
        """See base.Engine."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        self._optimizer.zero_grad(set_to_none=True)
        with self._contact("gradients of the other ranks"):
            outputs = [
                self._backward(batch, share=1 / len(microbatches), last=i == len(microbatches) - 1)
                for i, batch in enumerate(microbatches)
            ]
            self._scaler.unscale_(self._optimizer)
            gradients = [p.grad for p in self._learning if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)  # of averaged gradients: the same on every rank
            losses = torch.stack([output["loss"] for output in outputs])
            flags = torch.stack([~losses.isfinite().all(), torch.tensor(stop, device=self.device)]).float()
            if self.world_size > 1:
                dist.all_reduce(flags, dist.ReduceOp.MAX)
        bad_loss, any_stop, grad_norm = torch.cat(
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
        mean = {name: torch.stack([o[name] for o in outputs]).mean() for name in outputs[0]}
        return StepResult(mean, grad_norm, skipped=not finite, stop=bool(any_stop))

    def _backward(self, batch: Batch, share: float, last: bool) -> dict[str, Tensor]:
        """Adds one micro-batch's gradients; ranks exchange them with the last. Returns detached losses and report."""
        moved = Batch(
            image=batch["image"].to(self.device, non_blocking=True),
            labels=batch["labels"].to(self.device, non_blocking=True),
            key=batch["key"],
        )
        if "target" in batch:
            moved["target"] = batch["target"].to(self.device, non_blocking=True)
        with nullcontext() if last else self._accelerator.no_sync(self._module):
            with self.autocast():
                losses, report = self._module(moved)
            self._scaler.scale(losses["loss"].float() * share).backward()
        return {name: value.detach().float() for name, value in {**report, **losses}.items()}

    def _diverged(self, microbatches: Sequence[Batch], losses: Tensor) -> None:
        """Raises on every rank with what each rank saw; called by all ranks or none, before the optimizer's step."""
        bad = [(float(loss), b["key"]) for loss, b in zip(losses, microbatches, strict=True) if not loss.isfinite()]
        texts = gather_text(self, "; ".join(f"loss {loss} for samples {', '.join(keys)}" for loss, keys in bad))
        seen = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
        if not seen:
            keys = gather_text(self, ", ".join(key for batch in microbatches for key in batch["key"]))
            seen = f"the gradient of finite losses is not finite, samples {', '.join(keys)}"
        raise DivergenceError(f"training diverged: {seen}. No weight was changed; lower lr or look at these samples")

    def autocast(self) -> AbstractContextManager[None]:
        """See base.Engine."""
        if self._config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, _DTYPES[self._config.precision])

    def reduce(self, values: Tensor, op: Literal["mean", "sum", "max"]) -> Tensor:
        """See base.Engine."""
        result = values.clone()
        if self.world_size > 1:
            with self._contact(f"a {op} over all ranks"):
                kind = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
                dist.all_reduce(result, kind, group=self._group(values))
        return result / self.world_size if op == "mean" else result

    def gather(self, values: Tensor) -> list[Tensor]:
        """See base.Engine."""
        results = [torch.empty_like(values) for _ in range(self.world_size)]
        if self.world_size == 1:
            return [values.clone()]
        with self._contact("values of all ranks"):
            dist.all_gather(results, values.contiguous(), group=self._group(values))
        return results

    def any(self, flag: bool) -> bool:
        """See base.Engine."""
        return bool(self.reduce(torch.tensor([float(flag)]), "max"))

    def barrier(self, waiting_for: str) -> None:
        """See base.Engine."""
        if self.world_size > 1:
            with self._contact(waiting_for):
                dist.monitored_barrier(self._host, self._timeout, wait_all_ranks=True)

    def _group(self, values: Tensor) -> Any:
        return self._host if values.device.type == "cpu" else None

    @contextmanager
    def _contact(self, waiting_for: str) -> Iterator[None]:
        """Turns a lost or silent peer into a LaunchError that says what was waited for."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) or any(
                word in str(error) for word in ("gloo", "Gloo", "monitoredBarrier", "Connection closed", "timed out")
            )
            if not lost or self.world_size == 1:
                raise
            raise LaunchError(
                f"rank {self.rank} lost its peers while waiting for {waiting_for} (at most {self._config.timeout:g} "
                f"minutes, engine.timeout): see the output of the other ranks. {_first_line(error)}"
            ) from error

    def save(self, folder: Path) -> None:
        """See base.Engine. OSError where a file cannot be written."""
        numpy_kind, numpy_keys, *numpy_rest = np.random.get_state(legacy=True)
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": [numpy_kind, np.asarray(numpy_keys).tolist(), *numpy_rest],
            "torch": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        _write(_rank_file(folder, self.rank), state)
        if self.is_main:
            state = {
                "model": self._task.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "scaler": self._scaler.state_dict(),
            }
            _write(folder / "state.pt", state)

    def load(self, folder: Path) -> None:
        """See base.Engine."""
        state = _read(folder / "state.pt")
        try:
            self._task.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            if self._scaler.is_enabled():
                self._scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{folder / 'state.pt'} does not fit this model and optimizer: {error}") from error
        file = _rank_file(folder, self.rank)
        if not file.exists():
            _LOG.warning(
                "%s was saved by fewer ranks: rank %d draws fresh random numbers from the seed", folder, self.rank
            )
            return
        state = _read(file)
        random.setstate(state["python"])
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if "cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)

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


_WORLD_VARIABLES = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.pt"


def _write(path: Path, state: dict[str, Any]) -> None:
    """Through memory, because torch's own writer hides why a disk refused (these models are small)."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(path, buffer.getbuffer())


def _read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot read {path}: {_first_line(error)}") from error
