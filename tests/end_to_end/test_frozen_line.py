"""research/frozen_line.py gives the pipeline's numbers, or the ablations would be of something else."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.refine import unseen
from esol.data.samples import Batch
from esol.ops.class_maps import ClassMaps
from esol.pipeline import config_file
from esol.pipeline.cam import trained_heads
from esol.stages.decide import DecideTask
from esol.stages.expand import ExpandTask, expansion
from esol.stages.shrink import ShrinkTask
from research import chains
from research.ablations import CONTROLS, POINTS, Found, read
from research.frozen_line import REACH, Evidence, FrozenLine
from research.variants import FieldPerClass, Further


@pytest.fixture(scope="module")
def line(one: Path, tmp_path_factory: pytest.TempPathFactory) -> FrozenLine:
    config = config_file.load(str(one / "resolved.yaml"), [f"run_dir={one}"])
    return FrozenLine(
        config, trained_heads(config, 5, until="classify").net, tmp_path_factory.mktemp("features"), steps=4
    )


def test_decide_expand_and_shrink_learn_what_they_learn_in_the_pipeline(line: FrozenLine, one: Path) -> None:
    config = line.config
    first = DecideTask(line.net, config.decide)
    line.train(first, config.decide, 4)
    for name, value in load_file(one / "decide/model.safetensors").items():
        torch.testing.assert_close(first.handover.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    task = ExpandTask(line.net, config.expand, trained_heads(config, 5, until="decide")["decide"])
    line.train(task, config.expand, 4)
    own, theirs = task.handover.state_dict(), load_file(one / "expand/model.safetensors")
    assert theirs["offset.conv.weight"].abs().max() > 0
    for name, value in theirs.items():
        torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-7)
    second = ShrinkTask(line.net, task.handover, config.shrink)
    line.train(second, config.shrink, 4)
    for name, value in load_file(one / "shrink/model.safetensors").items():
        torch.testing.assert_close(second.handover.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_maps_score_what_localize_says(line: FrozenLine, one: Path) -> None:
    heads = trained_heads(line.config, 5)
    decision, expansion, shrinkage = (heads[source] for source in ("decide", "expand", "shrink"))
    results = json.loads((one / "results.json").read_text())["localize"]
    nets_of = {"cam": (), "decide": (decision,), "expand": (None, expansion), "shrink": (None, expansion, shrinkage)}
    for source, nets in nets_of.items():
        best = line.score(line.net, *nets).curve.best()
        assert 100 * best.miou == pytest.approx(results[f"{source}_miou"], abs=0.02)
        assert best.threshold == pytest.approx(results[f"{source}_threshold"], abs=0.011)


def test_every_chain_of_the_ablations_trains_and_scores(line: FrozenLine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_of = chains.steps_of
    monkeypatch.setattr(chains, "steps_of", lambda own: min(1, steps_of(own)))
    monkeypatch.setattr(chains, "total_steps", lambda *_: 1)
    for name, chain in {**CONTROLS, **{name: c for point in POINTS.values() for name, c in point.items()}}.items():
        state = chains.State(copy.deepcopy(line.net))
        for step in (make(line.config) for make in chain):
            step.train(line, state)
        counts = line.score(state.net, state.decision, state.expansion, state.shrinkage).curve.counts
        assert counts.sum() > 0, name


def test_a_second_round_climbs_the_loss_of_shrinkage_by_the_offsets_alone(line: FrozenLine, one: Path) -> None:
    heads = trained_heads(line.config, 5)
    expansion, shrinkage = heads["expand"], heads["shrink"]
    before = copy.deepcopy(expansion.state_dict())
    task = Further(line.net, expansion, shrinkage, line.config.expand)
    batch: Batch = {
        "image": torch.from_numpy(line.crops[0].copy()).view(torch.float32),
        "labels": line.labels[0],
        "key": [],
    }
    task.absence = line.absence
    start = float(task(batch)[0]["loss"].detach())
    line.train(task, line.config.expand, 4)
    assert float(task(batch)[0]["loss"].detach()) < start
    changed = {name for name, value in expansion.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"offset.conv.weight", "offset.conv.bias"}


def test_a_field_per_class_starts_as_the_expansion_and_learns_from_its_own_class(line: FrozenLine, one: Path) -> None:
    decision = trained_heads(line.config, 5, until="decide")["decide"]
    task = FieldPerClass(line.net, replace(line.config.expand, classes="present"), decision)
    plain = expansion(decision, line.config.expand)
    x = torch.rand(2, line.net.backbone.channels, 6, 7)
    torch.testing.assert_close(task.handover.class_maps(task.handover.features(x)), plain.class_maps(plain.features(x)))
    labels = torch.tensor([[0.0, 1, 0, 0, 0]]).repeat(2, 1)
    task({"image": x, "labels": labels, "key": []})[0]["loss"].backward()
    moved = [bool(own.offset.conv.weight.grad.any()) for own in task.handover.each]
    assert moved == [False, True, False, False, False]


def test_unseen_photos_are_those_with_masks_that_scored_nothing(one: Path, tmp_path: Path) -> None:
    def line(split: str) -> FrozenLine:
        config = config_file.load(str(one / "resolved.yaml"), [f"run_dir={one}", f"data.score_split={split}"])
        return FrozenLine(config, trained_heads(config, 5, until="classify").net, tmp_path / split, 0)

    own, other = line("val"), line("train")  # masks are made for train
    assert unseen(own.config, own.index).tolist() == own.index.split("train").tolist()
    assert not len(unseen(other.config, other.index))
    counts = own.score_unseen(own.net).counts
    assert counts.sum() > 0
    np.testing.assert_array_equal(counts, other.score(other.net).curve.counts)


def test_reach_counts_objects_and_background_by_distance_from_the_peak() -> None:
    truth = np.zeros((8, 8), np.uint8)
    truth[:, :4] = 1  # 32 pixels: an object size of 5.66
    truth[0, 7] = 255
    cam = torch.zeros(1, 8, 8)
    cam[0, 0, 0] = 1
    own = torch.where(torch.from_numpy(truth == 1), 0.8, 0.3)[None]
    maps = [ClassMaps(torch.tensor([0]), (8, 8), ((full, True),)) for full in (cam, own)]
    evidence = Evidence.empty(2)
    evidence.update(truth, *maps)
    assert evidence.reach.sum((0, 2)).tolist() == [32, 31]  # void is neither
    near = np.hypot(*np.indices((8, 8))) <= REACH[0] * np.sqrt(32)
    assert evidence.reach[0].sum(1).tolist() == [int((near & (truth == 1)).sum()), int((near & (truth == 0)).sum())]
    found = read(evidence)
    assert found.reached(0.5)[0].tolist() == [100, 0]
    assert found.reached(0.1)[-2].tolist() == [100, 100]


def test_precision_and_recall_are_read_between_thresholds() -> None:
    thresholds = np.array([0, 0.5, 0.9], np.float32)
    found = Found(0, 0.5, np.array([40.0, 60, 80]), np.array([90.0, 70, 20]), 0, np.zeros((3, 6, 2)), thresholds)
    assert found.recall_at_precision(70) == pytest.approx(45)
    assert found.precision_at_recall(80) == pytest.approx(50)
    assert found.recall_at(0.5) == 70
    assert found.precision_at(0.9) == 80
