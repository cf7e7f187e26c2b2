"""Native DeepSpeed against accelerate: same losses and weights, each other's checkpoints, any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from ranks import run_ranks

from esol.base.errors import ConfigError, LaunchError
from esol.base.schema import build
from esol.config import DeepSpeedConfig, EngineConfig
from esol.engines import make_engine
from esol.engines.deepspeed_config import deepspeed_config

ALL = (0, 1, 2, 3)
BOUND = 120  # seconds
LAUNCH = Path(__file__).parents[2] / "launch"


def drill(count: int, *args: Any) -> dict[int, tuple[list[tuple[float, float]], dict[str, torch.Tensor]]]:
    """What rank 0 found."""
    outcomes = run_ranks(count, toy.drill, *args, bound=BOUND)
    for outcome in outcomes:
        assert outcome.exitcode == 0, outcome.output
    return outcomes[0].result


def assert_equal(found: Any, expected: Any) -> None:
    """Losses, gradient norms and weights to 1e-6."""
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=0, atol=1e-6)
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-6)


def test_without_deepspeed_the_engine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esol.engines.find_spec", lambda name: None)
    with pytest.raises(LaunchError, match="deepspeed is not installed here: pip install deepspeed, or leave "):
        make_engine(EngineConfig(name="deepspeed"), seed=0)


@pytest.mark.parametrize("count", [1, 2])
def test_five_float32_steps_are_the_same_on_both_engines(tmp_path: Path, count: int) -> None:
    expected = drill(count, "accelerate", (0,), tmp_path)[0]
    assert max(norm for _, norm in expected[0]) > 0.05
    found = drill(count, "deepspeed", ALL, tmp_path)
    for zero in ALL:
        assert_equal(found[zero], expected)
        theirs, ours = (
            torch.load(tmp_path / name / "state.pt", weights_only=True)["optimizer"]
            for name in ("accelerate0", f"deepspeed{zero}")
        )
        assert ours["state"].keys() == theirs["state"].keys()
        for index, slots in theirs["state"].items():
            for slot, value in slots.items():
                torch.testing.assert_close(ours["state"][index][slot], value, rtol=0, atol=1e-6)


def test_a_vit_learns_the_same_on_both_engines_and_on_two_ranks() -> None:
    """DistributedDataParallel would not take a parameter that the features do not depend on."""
    found = {
        (name, zero, count): run_ranks(count, toy.vit_steps, name, zero, bound=BOUND)
        for name, zero, count in (("accelerate", 0, 1), ("accelerate", 0, 2), ("deepspeed", 1, 1), ("deepspeed", 3, 2))
    }
    expected = found["accelerate", 0, 1][0].result
    for outcomes in found.values():
        assert all(outcome.exitcode == 0 for outcome in outcomes), outcomes[0].output
        for key, value in expected.items():
            torch.testing.assert_close(outcomes[0].result[key], value, rtol=0, atol=1e-5)


def test_ten_images_on_three_ranks_step_as_on_one(tmp_path: Path) -> None:
    """Shares of 4, 3 and 3 images, in micro-batches of 2 and 2, 2 and 1, 2 and 1."""
    same = (None, "sgd", "fp32", None, 10)
    expected = drill(1, "accelerate", (0,), tmp_path / "one", *same)[0]
    found = drill(3, "deepspeed", ALL, tmp_path / "three", *same)
    for zero in ALL:
        assert_equal(found[zero], expected)


@pytest.mark.parametrize(
    ("precision", "extra"),
    [
        ("bf16", {"json": str(LAUNCH / "deepspeed-fast-network.json")}),
        ("fp32", {"json": str(LAUNCH / "deepspeed-small-memory.json"), "offload": True}),
    ],
    ids=["bf16", "offload"],
)
def test_what_changes_no_result(tmp_path: Path, precision: str, extra: dict[str, Any]) -> None:
    expected = drill(2, "accelerate", (0,), tmp_path, None, "sgd", precision)[0]
    zeros = (1, 2, 3)
    found = drill(2, "deepspeed", zeros, tmp_path, None, "sgd", precision, extra)
    for zero in zeros:
        assert_equal(found[zero], expected)


def test_either_engine_goes_on_from_the_others_checkpoint_on_another_number_of_ranks(tmp_path: Path) -> None:
    """AdamW, whose state has two tensors a weight and a step; the parity test has SGD's momentum."""
    drill(2, "accelerate", (0,), tmp_path / "first", None, "adamw")
    expected = drill(2, "accelerate", (0,), tmp_path / "unbroken", tmp_path / "first/accelerate0", "adamw")[0]
    drill(2, "deepspeed", (0, 1, 3), tmp_path / "first", None, "adamw")
    moved = drill(1, "deepspeed", ALL, tmp_path / "moved", tmp_path / "first/accelerate0", "adamw")
    for zero in ALL:
        assert_equal(moved[zero], expected)
    for source in ("deepspeed0", "deepspeed1", "deepspeed3"):
        back = drill(1, "accelerate", (0,), tmp_path / f"back-{source}", tmp_path / "first" / source, "adamw")[0]
        assert_equal(back, expected)


def test_overflow_skips_a_step_and_divergence_stops_before_one() -> None:
    for outcome in run_ranks(2, toy.deepspeed_overflow_and_divergence, bound=BOUND):
        found = outcome.result
        for zero in (0, 2, 3):
            skipped = found[f"skipped {zero}"]
            assert skipped[0]
            assert not skipped[-1]
            assert skipped == sorted(skipped, reverse=True)  # first the overflows, then none
            assert found[f"changed {zero}"] == [not s for s in skipped]
            assert found[f"scale {zero}"] == 2.0 ** (16 - sum(skipped))
            message, unchanged = found[f"loss {zero}"]
            assert "rank 1: loss inf for samples step1-image2, step1-image3" in message
            assert unchanged
            message, unchanged = found[f"gradient {zero}"]
            assert "gradient of finite losses is not finite" in message
            assert unchanged


def written(folder: Path, tree: Any) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(tree))
    return str(path)


def test_a_users_json_adds_what_ours_does_not_decide(tmp_path: Path) -> None:
    given = {
        "train_batch_size": "auto", "fp16": {"enabled": False}, "wall_clock_breakdown": True,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
    }  # fmt: skip
    config = deepspeed_config(DeepSpeedConfig(zero=2, offload=True, json=written(tmp_path, given)), clip_norm=1.5)
    assert config["wall_clock_breakdown"]
    assert config["zero_optimization"] == {
        "stage": 2, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}
    }  # fmt: skip
    assert (config["gradient_clipping"], config["train_micro_batch_size_per_gpu"]) == (1.5, 1)
    for given, kept in ((100, 100_000), (10**6, 10**6), ("auto", 100_000)):
        zero = {"zero_optimization": {"stage3_param_persistence_threshold": given}}
        third = deepspeed_config(DeepSpeedConfig(zero=3, json=written(tmp_path, zero)), 0.0)
        assert third["zero_optimization"]["stage3_param_persistence_threshold"] == kept
    assert "fp16" not in config


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"train_batch_size": 64}, r"train_batch_size contradicts <stage>\.global_batch"),
        ({"bf16": {"enabled": True}}, r"bf16 contradicts engine\.precision"),
        ({"zero_optimization": {"stage": 3}}, r"stage = 3 contradicts engine\.deepspeed\.zero = 1"),
        ({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, "offload_optimizer contradicts"),
        ([1], "must hold a JSON object"),
    ],
)
def test_contradictions_name_both_keys(tmp_path: Path, tree: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(DeepSpeedConfig(offload=True, json=written(tmp_path, tree)), 0.0)
    with pytest.raises(ConfigError, match=r"nowhere\.json cannot be read"):
        deepspeed_config(DeepSpeedConfig(json="nowhere.json"), 0.0)
    with pytest.raises(ConfigError, match=r"engine\.deepspeed\.offload needs engine\.deepspeed\.zero of 1 or more"):
        build(EngineConfig, {"deepspeed": {"zero": 0, "offload": True}}, "engine")
