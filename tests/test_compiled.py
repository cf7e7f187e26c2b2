"""Compiled steps against eager ones, by every kind of task; on a GPU: end_to_end/test_cuda.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distributed import compiled_task
from distributed.ranks import run_ranks
from torch._dynamo.utils import counters

from esol.base.errors import ConfigError
from esol.base.schema import build, fingerprint
from esol.config import EngineConfig
from esol.engines import compiled, make_engine

KINDS = ("classify", "expand", "psa", "irn", "segment")
STEPS = 5


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is compiled is traced and differentiated, but run by PyTorch: there is no compiler to wait for."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    counters.clear()
    yield
    torch.compiler.reset()


def assert_same(eager: dict[str, Any], other: dict[str, Any]) -> None:
    """Losses and weights within 1e-5 of one another, under the same names."""
    torch.testing.assert_close(other["losses"], eager["losses"], rtol=1e-5, atol=1e-5)
    assert list(other["state"]) == list(eager["state"])
    for name, value in eager["state"].items():
        torch.testing.assert_close(other["state"][name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_train_like_eager_ones_and_are_compiled_once(quick: None, kind: str) -> None:
    # gradients of psa and irn are made of signs: in float32 the last digit turns one of 600,000 differences, and more
    # in every step behind it (two steps in float32 are compared below)
    change = torch.nn.Module.double if kind in ("psa", "irn") else None
    eager = compiled_task.train(kind, "off", STEPS, change)
    assert not counters["stats"]
    blocks = compiled_task.train(kind, "blocks", STEPS, change)
    assert_same(eager, blocks)
    assert blocks["graphs"][1] > 0
    assert blocks["graphs"][1:] == [blocks["graphs"][1]] * (STEPS - 1)
    assert not counters["graph_break"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*lru_cache")
def test_whole_tasks_are_one_graph(quick: None, kind: str) -> None:
    """What engine.compile = graph gives to the GPU; here PyTorch runs it."""

    def whole(task: torch.nn.Module) -> None:
        compiled.ready()
        task.compile(backend="aot_eager", fullgraph=True, dynamic=False)

    one = compiled_task.train(kind, "off", 2, whole)
    assert_same(compiled_task.train(kind, "off", 2), one)
    assert one["graphs"] == [1, 1]


def test_code_of_the_real_compiler(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    found = compiled.blocks
    monkeypatch.setattr(compiled, "blocks", lambda net: found(net)[:1])  # each is half a minute of g++
    assert_same(compiled_task.train("classify", "off", STEPS), compiled_task.train("classify", "blocks", STEPS))


def test_two_ranks_of_compiled_blocks_train_like_two_of_eager_ones() -> None:
    eager, blocks = (
        run_ranks(2, compiled_task.train, "irn", how, 3, None, None, None, "aot_eager", bound=200)
        for how in ("off", "blocks")
    )
    for one, other in zip(eager, blocks, strict=True):
        assert one.exitcode == other.exitcode == 0, one.output + other.output
        assert_same(one.result, other.result)
        assert other.result["graphs"][0] > 0


def test_a_compiled_task_goes_on_where_an_eager_one_stopped(quick: None, tmp_path: Path) -> None:
    unbroken = compiled_task.train("classify", "off", 4)
    compiled_task.train("classify", "off", 2, leave=tmp_path)
    resumed = compiled_task.train("classify", "blocks", 4, start=tmp_path)
    assert_same(unbroken | {"losses": unbroken["losses"][2:]}, resumed)


def test_only_blocks_are_compiled_and_a_network_without_any_says_so(caplog: pytest.LogCaptureFixture) -> None:
    task = compiled_task.task("segment", "timm:test_resnet")
    names = {module: name for name, module in task.named_modules()}
    found = [names[block] for block in compiled.blocks(task)]
    assert found == [f"handover.backbone.body.net.layer{i}.0" for i in (1, 2, 3, 4)]
    compiled.compile_task(compiled_task.task("segment", "small"), "blocks")
    assert "has no repeated blocks" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile": "blocks", "name": "deepspeed"}, r"engine\.compile = blocks.*take engine\.name = accelerate"),
        ({"compile": "graph", "micro_batch": 4}, r"engine\.compile = graph.*leave engine\.micro_batch at 0"),
    ],
)
def test_what_cannot_be_compiled_is_said_when_the_config_is_read(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(EngineConfig, settings, "engine")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_graphs_without_a_gpu_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"engine\.compile = graph .* on the CPU: take engine\.compile = blocks"):
        make_engine(build(EngineConfig, {"compile": "graph"}), seed=0)


def test_off_is_a_word_in_yaml_too() -> None:
    assert build(EngineConfig, yaml.safe_load("compile: off")).compile == "off"


def test_a_run_may_be_resumed_with_another_setting() -> None:
    kinds: Callable[[str], EngineConfig] = lambda how: build(EngineConfig, {"compile": how})  # noqa: E731
    assert fingerprint(kinds("off")) == fingerprint(kinds("blocks"))
