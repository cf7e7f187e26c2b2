"""Chains of steps behind a trained CAM network, trained and scored on remembered features (frozen_line.py)."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from benchmarks.main_line import of_seed, run
from benchmarks.refine import unseen
from esol.base.schema import fingerprint
from esol.config import Config, Duration, TrainConfig
from esol.data.index import Index
from esol.models.cam_net import CamNet
from esol.models.heads import Decision, Expansion, Shrinkage
from esol.ops.metrics import ThresholdCurve
from esol.pipeline import config_file
from esol.pipeline.cam import new_net, trained_heads
from esol.pipeline.training import total_steps
from esol.stages.classify import ClassifyTask
from esol.stages.decide import DecideTask
from esol.stages.expand import ExpandTask, expansion
from esol.stages.shrink import ShrinkTask
from research.frozen_line import Evidence, FrozenLine, plan_of
from research.variants import FieldPerClass, Following, Further, Readout, Regions


@dataclass
class State:
    """What a chain has trained so far; maps come from the last network that is there."""

    net: CamNet
    decision: Decision | None = None
    expansion: Expansion | None = None
    shrinkage: Shrinkage | None = None
    losses: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))  # of expand's steps

    @property
    def nets(self) -> tuple[nn.Module | None, ...]:
        """As FrozenLine.score takes them."""
        return self.net, self.decision, self.expansion, self.shrinkage


@dataclass(frozen=True)
class Step:
    """A step of a chain under one config.

    settings: all that it follows from, for fingerprint; train: moves a state, in so many steps.
    """

    settings: list[Any]
    train: Callable[[FrozenLine, State], None]
    steps: int


Chain = tuple[Callable[[Config], Step], ...]


def classify(channels: int) -> Callable[[Config], Step]:
    """The CAM network anew, with so many outputs of W1, on the remembered crops; 0 = no W1."""

    def make(config: Config) -> Step:
        steps = total_steps(config.classify, "classify", plan_of(config, Index.load(config.data.root)))

        def train(line: FrozenLine, state: State) -> None:
            model = replace(config.model, kernel_channels=channels)
            net = new_net(replace(config, model=model), line.net.num_classes, pretrained=False)
            net.backbone = line.net.backbone
            state.net = net
            line.train(ClassifyTask(net, config.classify), config.classify, steps)

        return Step(["classify", config.classify, channels], train, steps)

    return make


def longer(config: Config) -> Step:
    """W1 and V go on with classify's settings for as many steps as all stages behind it have together."""
    steps = sum(steps_of(own) for own in (config.decide, config.expand, config.shrink))

    def train(line: FrozenLine, state: State) -> None:
        line.train(ClassifyTask(_learning(state.net), config.classify), config.classify, steps)

    return Step(["longer", config.classify, steps], train, steps)


def decide(**fields: Any) -> Callable[[Config], Step]:
    """The pipeline's decide."""

    def make(config: Config) -> Step:
        own = replace(config.decide, **fields)

        def train(line: FrozenLine, state: State) -> None:
            task = DecideTask(state.net, own)
            line.train(task, own, steps_of(own))
            state.decision = task.handover

        return Step(["decide", own], train, steps_of(own))

    return make


def expand(regions: int | None = None, maps_clip: float | None = None, **fields: Any) -> Callable[[Config], Step]:
    """The pipeline's expand; regions: of Regions, None = the image; maps_clip: of the maps, None = that of the loss."""

    def make(config: Config) -> Step:
        own = replace(config.expand, **fields)

        def train(line: FrozenLine, state: State) -> None:
            start = (state.net, own, state.decision)
            task = ExpandTask(*start) if regions is None else Regions(*start, regions)
            state.losses = line.train(task, own, steps_of(own))
            state.expansion = task.handover
            if maps_clip is not None:
                state.expansion.clip = maps_clip

        return Step(["expand", own, regions, maps_clip], train, steps_of(own))

    return make


def expand_each(**fields: Any) -> Callable[[Config], Step]:
    """expand with an offset field for every class: see Fields."""

    def make(config: Config) -> Step:
        own = replace(config.expand, **fields)

        def train(line: FrozenLine, state: State) -> None:
            task = FieldPerClass(state.net, own, state.decision)
            line.train(task, own, steps_of(own))
            state.expansion = task.handover  # type: ignore[assignment]  # an Expansion to whoever asks it for maps

        return Step(["expand each", own], train, steps_of(own))

    return make


def shrink(**fields: Any) -> Callable[[Config], Step]:
    """The pipeline's shrink."""

    def make(config: Config) -> Step:
        own = replace(config.shrink, **fields)

        def train(line: FrozenLine, state: State) -> None:
            assert state.expansion is not None
            task = ShrinkTask(state.net, state.expansion, own)
            line.train(task, own, steps_of(own))
            state.shrinkage = task.handover

        return Step(["shrink", own], train, steps_of(own))

    return make


def further(config: Config) -> Step:
    """A second round of expand, behind a shrink: see Further. The shrink that follows starts anew."""
    own = config.expand

    def train(line: FrozenLine, state: State) -> None:
        assert state.expansion is not None
        assert state.shrinkage is not None
        line.train(Further(state.net, state.expansion, state.shrinkage, own), own, steps_of(own))

    return Step(["further", own], train, steps_of(own))


def readout(**fields: Any) -> Callable[[Config], Step]:
    """Shrinkage's loss without its sampler: see Readout. Of the Expansion, or of the CAM network that is there."""

    def make(config: Config) -> Step:
        own = replace(config.shrink, **fields)

        def train(line: FrozenLine, state: State) -> None:
            if state.expansion is None:
                state.expansion = expansion(state.decision or state.net, config.expand)
            task = Readout(state.net, state.expansion, own)
            line.train(task, own, steps_of(own))
            state.decision = Decision(state.net, config.decide.clip)  # where an expand that follows starts
            state.decision.load_state_dict({n: getattr(state.expansion, n) for n in ("kernel", "classifier")})

        return Step(["readout", own], train, steps_of(own))

    return make


def together(config: Config) -> Step:
    """expand and shrink in the same steps, shrink's; Expansion keeps its budget alpha x steps x lr."""
    steps = steps_of(config.shrink)
    slow = replace(config.expand, alpha=config.expand.alpha * steps_of(config.expand) / steps)

    def train(line: FrozenLine, state: State) -> None:
        first = ExpandTask(state.net, slow, state.decision)
        second = Following(state.net, first.handover, config.shrink)
        line.train_together([(first, slow), (second, config.shrink)], steps)
        state.expansion, state.shrinkage = first.handover, second.handover

    return Step(["together", slow, config.shrink], train, steps)


def steps_of(config: TrainConfig) -> int:
    """Of a duration in steps or images; also none, which the pipeline has no use for."""
    if config.duration == "0 steps":
        return 0
    duration = Duration.parse(config.duration, "duration")
    if duration.unit == "epochs":
        raise SystemExit(f"duration = {config.duration}: give steps or images, chains are compared by them")
    return duration.steps(config.global_batch, 0)


def _learning(net: CamNet) -> CamNet:
    for p in (net.kernel, net.classifier):
        if p is not None:
            p.requires_grad_(True)
    return net


class Lab:
    """One seed: its classify, its remembered features, the chains that are done."""

    def __init__(self, path: str, seed: int, overrides: list[str], chains: dict[str, Chain]) -> None:
        overrides = [*overrides, "stages=[classify]", "tracking.uri=none"]
        run(path, seed, overrides, suffix="-ablations")
        self.config = config_file.load(path, of_seed(path, seed, overrides, "-ablations"))
        run_dir = Path(self.config.run_dir)
        self.folder = run_dir / "ablations"
        manifest = json.loads((run_dir / "classify/manifest.json").read_text())
        self.stamp = [manifest["fingerprint"], list(self.config.localize.scales), self.config.data.score_split]
        self._seed = seed
        self._index = Index.load(self.config.data.root)
        self._chains = {name: [make(self.config) for make in chain] for name, chain in chains.items()}
        self._line: FrozenLine | None = None
        self._states: dict[str, State] = {}

    @property
    def line(self) -> FrozenLine:
        if self._line is None:
            net = trained_heads(self.config, len(self._index.classes), until="classify").net
            steps = max((step.steps for chain in self._chains.values() for step in chain), default=0)
            folder = self.folder / f"features-{fingerprint(self.stamp, steps)}"
            self._line = FrozenLine(self.config, net, folder, steps)
        return self._line

    def close(self) -> None:
        """Gives the disk back: 10 GB a seed."""
        self._line, self._states = None, {}
        for folder in self.folder.glob("features-*"):
            shutil.rmtree(folder)

    def evidence(self, name: str) -> Evidence:
        """Of one of the chains, on score_split."""
        kept = self._kept(name, "", self._score)
        return Evidence.of(kept["counts"], kept["reach"], kept["losses"])

    def others(self, name: str) -> ThresholdCurve | None:
        """The same chain's curve on the photos that are unseen, if there are any."""
        if not len(unseen(self.config, self._index)):
            return None
        curve = ThresholdCurve(len(self._index.classes))
        curve.add(self._kept(name, f"-{self.config.data.mask_split}", self._score_unseen)["counts"])
        return curve

    def _score(self, state: State) -> dict[str, NDArray[Any]]:
        evidence = self.line.score(*state.nets)
        return {"counts": evidence.curve.counts, "reach": evidence.reach, "losses": state.losses}

    def _score_unseen(self, state: State) -> dict[str, NDArray[Any]]:
        return {"counts": self.line.score_unseen(*state.nets).counts}

    def _kept(self, name: str, suffix: str, score: Callable[[State], dict[str, NDArray[Any]]]) -> dict[str, Any]:
        """What score says of a chain; what is there, under everything that it follows from, is not done again."""
        steps = self._chains[name]
        path = self.folder / f"{self._key(steps)}{suffix}.npz"
        if not path.exists():
            begun = time.monotonic()
            found = score(self._state(steps))
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, **found)
            print(f"seed {self._seed}, {name}{suffix}: {time.monotonic() - begun:.0f} s", flush=True)
        with np.load(path) as stored:
            return dict(stored)

    def _key(self, steps: list[Step]) -> str:
        return fingerprint(self.stamp, *(part for step in steps for part in step.settings))

    def _state(self, steps: list[Step]) -> State:
        """Trained by these steps; chains that begin alike share what they have in common."""
        if not steps:
            return State(self.line.net.requires_grad_(False))
        key = self._key(steps)
        if key not in self._states:
            state = copy.deepcopy(self._state(steps[:-1]))
            steps[-1].train(self.line, state)
            state.net.requires_grad_(False)
            self._states[key] = state
        return self._states[key]
