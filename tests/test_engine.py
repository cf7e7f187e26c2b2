"""One process of AccelerateEngine against plain PyTorch; several processes: distributed/."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed.toy import CONFIG, Toy, batch, batches
from torch import nn

from esol.base.errors import CheckpointError, DivergenceError, LaunchError
from esol.config import EngineConfig
from esol.engines import make_engine
from esol.engines.accelerate_engine import _with_strides
from esol.engines.base import Engine
from esol.training.optim import build_optimizer


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Makes an engine with a prepared task: start(task, precision) -> engine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engines = []

    def make(task: Toy | None = None, precision: str = "fp32", clip_norm: float = 0.0) -> Engine:
        engine = make_engine(EngineConfig(precision=precision, threads=1), seed=3)  # type: ignore[arg-type]
        engines.append(engine)
        task = task or Toy()
        engine.prepare(task, build_optimizer(task, CONFIG), clip_norm)
        return engine

    yield make
    for engine in engines:
        engine.close()


class Scaled(Toy):
    """The toy with its loss multiplied, so that gradients leave fp16's range."""

    factor = 1.0

    def forward(self, batch):
        losses, report = super().forward(batch)
        return {"loss": losses["loss"] * self.factor}, report


def test_steps_equal_plain_pytorch(start) -> None:
    torch.manual_seed(0)
    task = Toy()
    plain = Toy()
    plain.load_state_dict(task.state_dict())
    engine = start(task, clip_norm=0.05)
    groups = [
        {"params": plain.body.parameters(), "weight_decay": CONFIG.weight_decay},
        {"params": plain.head.parameters(), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=CONFIG.momentum)
    for step in range(5):
        result = engine.train_step([batch(step, 0, 4), batch(step, 4, 4)], lr=0.1)
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.1, 1.0
        optimizer.zero_grad()
        losses, report = plain(batch(step, 0, 8))
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], 0.05)
        optimizer.step()
        assert norm > 0.05  # so that clipping was at work
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert result.losses["loss"].item() == pytest.approx(losses["loss"].item(), rel=1e-5)
        assert result.losses["mean_label"].item() == pytest.approx(report["mean_label"].item())
        assert not result.skipped
        assert not result.losses["loss"].requires_grad
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(engine.model_state_dict()[name], value, rtol=0, atol=1e-6)


def test_micro_batches_of_other_sizes_step_like_the_whole_batch(start) -> None:
    weights = []
    for sizes in ((7,), (3, 2, 2)):
        torch.manual_seed(0)
        engine = start()
        for step in range(3):
            parts = [batch(step, sum(sizes[:i]), size) for i, size in enumerate(sizes)]
            for part, size in zip(parts, sizes, strict=True):
                part["weight"] = len(sizes) * size / 7
            losses = engine.train_step(parts, lr=0.1).losses
            weights.append(engine.model_state_dict() | losses)
    for whole, parts in zip(weights[:3], weights[3:], strict=True):
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_learns_close_to_float32(start, precision: str, dtype: torch.dtype) -> None:
    ends = {}
    for name in ("fp32", precision):
        torch.manual_seed(0)
        task = Toy()
        seen: list[torch.dtype] = []
        task.head.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.dtype))
        engine = start(task, name)
        losses = [engine.train_step([batch(0, 0, 8)], lr=0.05).losses["loss"] for _ in range(30)]
        assert set(seen) == {dtype if name == precision else torch.float32}
        assert {loss.dtype for loss in losses} == {torch.float32}
        assert all(value.dtype == torch.float32 for value in engine.model_state_dict().values())
        ends[name] = losses[-1].item()
        assert losses[-1] < losses[0]
    assert ends[precision] == pytest.approx(ends["fp32"], rel=0.02)


@pytest.mark.parametrize("has", [True, False])
def test_auto_is_bf16_where_there_is_hardware_for_it_and_bf16_without_it_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has: bool
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("esol.engines.ranks.cpu_has_bf16", lambda: has)
    for precision, expected in (("auto", torch.bfloat16 if has else None), ("bf16", torch.bfloat16), ("fp32", None)):
        engine = make_engine(EngineConfig(precision=precision, threads=1), seed=3)  # type: ignore[arg-type]
        with engine.autocast():
            found = torch.nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype
        engine.close()
        assert engine.kind is expected
        assert found == (expected or torch.float32)
    warned = [record.getMessage() for record in caplog.records if "engine.precision = bf16" in record.getMessage()]
    assert len(warned) == (0 if has else 1)


def test_fp16_overflow_skips_the_step_until_the_scale_fits(start) -> None:
    task = Scaled()
    task.factor = 1e4
    engine = start(task, "fp16")
    skipped = []
    for _ in range(12):
        before = engine.model_state_dict()
        skipped.append(engine.train_step([batch(0, 0, 8)], lr=1e-6).skipped)
        changed = any(not torch.equal(before[name], value) for name, value in engine.model_state_dict().items())
        assert changed != skipped[-1]
    assert skipped[0]
    assert not skipped[-1]
    assert skipped == sorted(skipped, reverse=True)  # first the overflows, then none


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_loss_that_is_not_finite_names_the_samples(start, precision: str) -> None:
    task = Scaled()
    engine = start(task, precision)
    engine.train_step([batch(0, 0, 4)], lr=0.1)
    before = engine.model_state_dict()
    task.factor = float("inf")
    with pytest.raises(DivergenceError, match=r"rank 0: loss inf for samples step1-image0, step1-image1\. No weight"):
        engine.train_step([batch(1, 0, 2)], lr=0.1)
    assert all(torch.equal(before[name], value) for name, value in engine.model_state_dict().items())


def test_gradient_that_is_not_finite_stops_too(start) -> None:
    class Root(Toy):
        def forward(self, batch):
            losses, report = super().forward(batch)
            return {"loss": losses["loss"] + (self.head.weight * 0).sum().sqrt()}, report

    with pytest.raises(
        DivergenceError, match="gradient of finite losses is not finite, samples step0-image0, step0-im"
    ):
        start(Root()).train_step([batch(0, 0, 2)], lr=0.1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_save_and_load_continue_with_the_same_bits(start, tmp_path: Path, precision: str) -> None:
    def go_on(engine: Engine, stream: Iterator) -> tuple:
        losses = [engine.train_step(next(stream), lr=0.1).losses["loss"].item() for _ in range(3)]
        return losses, random.random(), np.random.rand(), torch.rand(1).item(), engine.model_state_dict()

    engine = start(Toy(noise=0.5), precision)
    stream = batches(engine, 0)
    for _ in range(4):
        engine.train_step(next(stream), lr=0.1)
    write = engine.snapshot()
    assert write is not None
    *first, weights = go_on(engine, stream)
    write(tmp_path)  # what was then, after three more steps
    engine = start(Toy(noise=0.5), precision)
    engine.load(tmp_path, 4)
    *second, again = go_on(engine, batches(engine, 4))
    assert first == second
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_load_refuses_what_does_not_fit(start, tmp_path: Path) -> None:
    engine = start()
    write = engine.snapshot()
    assert write is not None
    assert [file.name for file in write(tmp_path)] == ["state.pt"]

    class Wider(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

    with pytest.raises(CheckpointError, match=r"state\.pt does not fit this model"):
        start(Wider()).load(tmp_path, 0)
    content = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"cannot read .*state\.pt"):
        start().load(tmp_path, 0)


def test_same_seed_builds_the_same_model_and_threads_are_shared(start, monkeypatch: pytest.MonkeyPatch) -> None:
    models, threads = [], []
    for local_ranks in ("1", "2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_ranks)
        engine = make_engine(EngineConfig(), seed=5)
        models.append(Toy().state_dict())
        threads.append(torch.get_num_threads())
        engine.close()
    assert threads[1] == max(1, threads[0] // 2)
    torch.set_num_threads(1)
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_accelerate_launch_with_cpu_starts_too_few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"):  # what it sets when asked for several
        monkeypatch.setenv(name, "x")
    with pytest.raises(LaunchError, match=r"started one .*launch/cpu\.yaml"):
        make_engine(EngineConfig(), seed=0)


def test_a_small_convolutions_gradient_has_the_strides_of_its_weights() -> None:
    """Two of the four say nothing, and DDP compares all of them."""
    weight, laid = torch.empty(4, 8, 1, 1), torch.randn(4, 8, 1, 1)
    gradient = laid.as_strided(laid.shape, (8, 1, 8, 8))  # as a convolution of channels_last activations returns it
    found = _with_strides(weight.stride(), gradient)
    assert found.stride() == weight.stride()
    assert torch.equal(found, laid)
    turned = torch.randn(8, 4, 1, 1).transpose(0, 1)
    assert _with_strides(weight.stride(), turned) is turned
