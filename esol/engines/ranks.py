"""What the engines share: a process's place in its job, collectives that end, autocast, random state, files."""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from esol.base import exits
from esol.base.errors import DivergenceError, LaunchError, LostRankError, first_line
from esol.base.machine import cores, cpu_has_bf16
from esol.config import EngineConfig
from esol.data.samples import Batch
from esol.engines.base import Engine, gather_text
from esol.engines.environment import allow_connections, check_environment, given
from esol.engines.states import STATE, write_state
from esol.engines.watchdog import Watchdog

_LOG = logging.getLogger(__name__)
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_PATIENCE = timedelta(days=30)  # of waits that the watchdog bounds
_GRACE = 10  # seconds: torch says itself, and better, what it waited for in vain, where it can
_NOTICE = 10  # seconds after which a process says whom it waits for: the variables may be another job's leftovers


def wants_cpu() -> bool:
    """Whether a job computes on the CPU: no GPU is there, or its launcher says so."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return asked or not torch.cuda.is_available()


def precision_of(name: str, device: torch.device) -> torch.dtype | None:
    """The type that matrix products are computed in, of an engine.precision; None for float32.

    None as well where this machine has no hardware for the type: a ResNet-50 takes seven times as long in bf16 as in
    float32 on a processor with AVX2 alone (docs/running.md).
    """
    name = "bf16" if name == "auto" else name
    has = {"bf16": cpu_has_bf16(), "fp16": False} if device.type == "cpu" else {
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False), "fp16": True
    }  # fmt: skip
    return DTYPES[name] if has.get(name, False) else None


class Ranks(Engine):
    """The part of esol.engines.base.Engine that does not depend on how a model is trained.

    A child calls _set_threads, starts its process group, sets rank, world_size and device, and calls _settle.
    """

    def __init__(self, config: EngineConfig, seed: int) -> None:
        if not dist.is_initialized():
            check_environment()
            allow_connections()
        self._config, self._seed = config, seed
        self._host: Any = None  # the group for values on the CPU
        self._patient: Any = None  # the same under a watchdog, whose waits it bounds
        self._timeout = timedelta(minutes=config.timeout)
        self._watchdog: Watchdog | None = None
        self._step = 0  # optimizer steps of this stage, those before a checkpoint too

    def _set_threads(self) -> int:
        """Gives this process its share of the cores; launchers put 1 into OMP_NUM_THREADS."""
        threads = self._config.threads or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        return threads

    def _settle(self) -> None:
        """What is left to do once the process group stands."""
        self.is_main = self.rank == 0
        # small agreements go over gloo even between GPUs: its waits are bounded and end in an error, not in an abort
        if self.world_size > 1 and dist.get_backend() != "gloo":
            self._host = dist.new_group(backend="gloo", timeout=self._timeout)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means float32; whoever wants speed takes bf16
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        if self.device.type == "cpu":  # costs nothing here; on CUDA it forbids operators without a deterministic form
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        seed_all(self._seed, self.device)  # the same on all ranks: they build the same model
        asked = self._config.precision
        slow = asked != "fp32" and self.any(precision_of(asked, self.device) is None)
        self.kind = DTYPES[asked if asked != "auto" else "fp32" if slow else "bf16"]
        if slow and asked != "auto" and self.is_main:
            _LOG.warning(
                "engine.precision = %s, for which a machine of this job has no hardware: it can take many times as "
                "long as float32. Set engine.precision to auto",
                asked,
            )

    def _no_job(self, reason: str) -> LostRankError:
        return LostRankError(
            f"the processes did not form a job within {self._config.timeout:g} minutes (engine.timeout); "
            f"this one was given {given()}. {reason}"
        )

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        """Inside, torch's store is asked: it waits without end for a machine that is gone without a farewell."""

        def leave() -> None:
            print(f"error: {self._no_job('The store of the job does not answer')}", file=sys.stderr, flush=True)
            os._exit(exits.note(exits.LOST))

        def say() -> None:
            print(f"waiting for the other processes of the job; this one was given {given()}", file=sys.stderr)

        bound = threading.Timer(self._timeout.total_seconds() + _GRACE, leave)
        notice = threading.Timer(_NOTICE, say)
        for timer in (bound, notice):
            timer.daemon = True
            timer.start()
        try:
            yield
        finally:
            bound.cancel()
            notice.cancel()

    def _check_world(self) -> None:
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world_size != asked:
            raise LaunchError(
                f"WORLD_SIZE={asked}, but the engine sees {self.world_size} process(es): start with torchrun or "
                "accelerate launch and a file of launch/, so that RANK, LOCAL_RANK and MASTER_ADDR are set too"
            )

    def _begin_step(self) -> None:
        """Random numbers of a step follow from seed, rank and step: no checkpoint holds any, for no number of ranks."""
        mixed = np.random.SeedSequence((self._seed, self.rank, self._step)).generate_state(1, np.uint64)
        seed_all(int(mixed[0] >> np.uint64(1)), self.device)
        self._step += 1

    def _moved(self, batch: Batch) -> Batch:
        """The batch on the device."""
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }  # type: ignore[return-value]

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
        return nullcontext() if self.kind is None else torch.autocast(self.device.type, self.kind)

    def reduce(self, values: Tensor, op: Literal["mean", "sum", "max"]) -> Tensor:
        """See base.Engine."""
        result = values.clone()
        if self.world_size > 1:
            with self._contact(f"a {op} over all ranks", self._is_patient(values)):
                kind = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
                dist.all_reduce(result, kind, group=self._group(values))
        return result / self.world_size if op == "mean" else result

    def gather(self, values: Tensor) -> list[Tensor]:
        """See base.Engine."""
        results = [torch.empty_like(values) for _ in range(self.world_size)]
        if self.world_size == 1:
            return [values.clone()]
        with self._contact("values of all ranks", self._is_patient(values)):
            dist.all_gather(results, values.contiguous(), group=self._group(values))
        return results

    def any(self, flag: bool) -> bool:
        """See base.Engine."""
        return bool(self.reduce(torch.tensor([float(flag)]), "max"))

    def barrier(self, waiting_for: str) -> None:
        """See base.Engine."""
        if self.world_size > 1:
            group, bound = self._host, self._timeout
            if self._watchdog is not None:
                group, bound = self._patient, _PATIENCE
            with self._contact(waiting_for, self._watchdog is not None):
                dist.monitored_barrier(group, bound, wait_all_ranks=True)

    @contextmanager
    def watched(self, folder: Path) -> Iterator[None]:
        """See base.Engine."""
        if not self._config.stall:
            yield
            return
        store = dist.distributed_c10d._get_default_store() if self.world_size > 1 else None
        with self._bounded():
            if self.world_size > 1 and self._patient is None:
                # Ranks whose work differs by more than engine.timeout are no lost peers: the watchdog knows whether
                # they move. One whose process is gone closes its connections, which ends any wait at once.
                self._patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
            watchdog = Watchdog(self.rank, self.world_size, store, folder, 60 * self._config.stall)
        self.barrier("the watchdogs of all ranks")
        self._watchdog = watchdog
        watchdog.start()
        try:
            yield
        finally:
            self._watchdog = None
            watchdog.stop()

    def beat(self, doing: str) -> None:
        """See base.Engine."""
        if self._watchdog is not None:
            self._watchdog.beat(doing)

    def _group(self, values: Tensor) -> Any:
        if self._is_patient(values):
            return self._patient
        return self._host if values.device.type == "cpu" else None

    def _is_patient(self, values: Tensor) -> bool:
        return self._watchdog is not None and values.device.type == "cpu"

    @contextmanager
    def _contact(self, waiting_for: str, patient: bool = False) -> Iterator[None]:
        """Turns a lost peer into a LostRankError that names what was waited for; patient: the watchdog bounds it."""
        try:
            with self._watchdog.waiting(waiting_for) if self._watchdog is not None else nullcontext():
                yield
        except RuntimeError as error:
            lost = isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) or any(
                word in str(error) for word in ("gloo", "Gloo", "monitoredBarrier", "Connection closed", "timed out")
            )
            if not lost or self.world_size == 1:
                raise
            bound = f"{self._config.timeout:g} minutes, engine.timeout"
            if patient:
                bound = f"{self._config.stall:g} minutes without any progress, engine.stall"
            raise LostRankError(
                f"rank {self.rank} lost its peers while waiting for {waiting_for} (at most {bound}): see the output of "
                f"the other ranks. {first_line(error)}"
            ) from error

    def snapshot(self) -> Callable[[Path], list[Path]] | None:
        """See base.Engine."""
        state = self._whole_state()
        if state is None:
            return None
        copied = torch.cuda.Event() if self.device.type == "cuda" else None
        if copied is not None:  # the steps that follow stand behind the copy in the GPU's queue: they need not wait
            copied.record()

        def write(folder: Path) -> list[Path]:
            if copied is not None:
                copied.synchronize()
            write_state(folder / STATE, state)
            return [folder / STATE]

        return write

    def _whole_state(self) -> dict[str, Any] | None:
        """On the main rank a copy of model, optimizer and scaler that no step changes; a collective."""
        raise NotImplementedError


def seed_all(seed: int, device: torch.device) -> None:
    """Seeds every generator of this process and its device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of device: 130 us instead of 1
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def weighted_mean(outputs: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Each entry of the micro-batches' losses and reports times their weights, averaged."""
    pairs = list(zip(outputs, weights, strict=True))
    return {name: torch.stack([output[name] * weight for output, weight in pairs]).mean() for name in outputs[0]}
