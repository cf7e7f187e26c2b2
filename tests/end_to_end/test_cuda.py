"""The same numbers on a GPU as on the CPU; skipped where there is none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_dense_crf import PARAMETERS, energies, photo
from tiny import PLAIN, STAGES, TRAINING, launch
from torch import Tensor

from esol.models.sampler import deform_conv
from esol.ops.dense_crf import DenseCrf
from esol.ops.pairs import boundary_affinity, feature_affinity, pair_offsets
from esol.ops.random_walk import random_walk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OPERATORS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "sampler": (deform_conv, ((2, 8, 13, 17), (4, 8, 3, 3), (2, 18, 13, 17))),
    "boundary affinity": (lambda edge: boundary_affinity(edge.sigmoid(), 5), ((2, 23, 31),)),
    "feature affinity": (lambda features: feature_affinity(features, 5), ((2, 16, 23, 31),)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_and_their_gradients(name: str) -> None:
    function, shapes = OPERATORS[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in shapes]
    upstream = torch.randn(function(*inputs).shape)
    found = []
    for device in ("cpu", "cuda"):
        own = [x.to(device).requires_grad_() for x in inputs]
        value = function(*own)
        gradients = torch.autograd.grad(value, own, upstream.to(device))
        found.append([t.detach().cpu() for t in (value, *gradients)])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4 * float(here.abs().max()))


def test_random_walk() -> None:
    torch.manual_seed(0)
    sizes = [(47, 62), (30, 41), (62, 47), (1, 1)]
    maps = [torch.rand(count, *size) for count, size in enumerate(sizes, 1)]
    affinity = [torch.rand(len(pair_offsets(5)), *size) for size in sizes]
    here = random_walk(maps, affinity, 5, 10, [256, 100, 30, 1])
    there = random_walk([own.cuda() for own in maps], [own.cuda() for own in affinity], 5, 10, [256, 100, 30, 1])
    for want, got in zip(here, there, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", PARAMETERS)
def test_dense_crf(kind: str) -> None:
    labels, kernels = PARAMETERS[kind]
    sizes = [(120, 160), (90, 131), (1, 1)]
    images, sets = [photo(*size) for size in sizes], [energies(labels, *size) for size in sizes]
    crf = DenseCrf(*(image.cuda() for image in images), **kernels)
    together = crf.infer([energy.cuda() for energy in sets], photos=[0, 1, 2])
    for image, energy, found in zip(images, sets, together, strict=True):
        here = DenseCrf(image, **kernels).infer([energy])[0]
        alone = DenseCrf(image.cuda(), **kernels).infer([energy.cuda()])[0]
        for there in (alone.cpu(), found.cpu()):
            assert float((here.argmax(0) == there.argmax(0)).float().mean()) > 0.999
            assert float((here - there).abs().mean()) < 1e-4


@pytest.fixture(scope="module")
def on_the_cpu(config: Path) -> dict[str, Any]:
    done = launch(PLAIN, config, "--set", "run_dir=runs/cpu", "--set", "tracking.uri=none", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    return json.loads((config.parent / "runs/cpu/results.json").read_text())


@pytest.mark.parametrize(("precision", "off"), [("fp32", 0.01), ("bf16", 0.15)])
def test_the_whole_line(config: Path, on_the_cpu: dict[str, Any], precision: str, off: float) -> None:
    name = f"runs/gpu-{precision}"
    settings = (f"run_dir={name}", f"engine.precision={precision}", "tracking.uri=none")
    done = launch(PLAIN, config, *(part for text in settings for part in ("--set", text)))
    assert done.returncode == 0, done.stderr
    results = json.loads((config.parent / name / "results.json").read_text())
    assert list(results) == STAGES
    for stage in TRAINING:
        assert results[stage]["peak_cuda_memory_mib"] > 0
        assert results[stage]["loss"] == pytest.approx(on_the_cpu[stage]["loss"], rel=off), stage
    for source in ("cam", "decide", "expand", "shrink"):
        key = f"{source}_miou"
        assert results["localize"][key] == pytest.approx(on_the_cpu["localize"][key], abs=100 * off)
