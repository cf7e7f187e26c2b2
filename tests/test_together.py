"""Stages that make several photos at once: what comes of a photo does not depend on who is beside it."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_dense_crf import photo
from torch import Tensor, nn

from esol.base.schema import build
from esol.config import BackboneConfig, CrfConfig, PredictionConfig, SaliencyConfig
from esol.models.affinity_net import AffinityNet
from esol.models.backbones import build_backbone
from esol.models.irn_net import IrnNet
from esol.ops import dense_crf, tiles
from esol.ops.dense_crf import DenseCrf
from esol.ops.segmentation import by_parts
from esol.pipeline import inference
from esol.pipeline.crew import TOGETHER, Crew
from esol.pipeline.inference import InferenceStage, Sample
from esol.stages.evaluate import Evaluate
from esol.stages.irn import IrnLabels, IrnMasks
from esol.stages.psa import PsaLabels, PsaMasks
from esol.stages.seed_masks import SeedMasks, SeedMasksConfig

SIZES = [(40, 50), (61, 33), (9, 70), (40, 50), (33, 61)]
CLASSES = [[2], [0, 1, 5], [], [4, 1], [3]]


def samples() -> list[Sample]:
    return [
        Sample(i, f"photo{i}", f"photo{i}", photo(*size, i), np.zeros(6, np.float32), None)
        for i, size in enumerate(SIZES)
    ]


class Maps:
    """Class maps as localize writes them: a blob each, the last class of a photo with several too weak to be a seed."""

    def arrays(self, ordinal: int, member: str) -> dict[str, np.ndarray]:
        (height, width), numbers = SIZES[ordinal], CLASSES[ordinal]
        generator = torch.Generator().manual_seed(ordinal)
        maps = F.interpolate(torch.rand(1, len(numbers) or 1, 4, 4, generator=generator), (height, width))[0]
        maps = maps[: len(numbers)]
        if len(numbers) > 1:
            maps[-1] *= 0.02
        grid = (-(-height // 4), -(-width // 4))
        low = F.interpolate(maps[None], grid)[0] if numbers else maps.new_zeros(0, *grid)
        return {
            "classes": np.array(numbers, np.int64),
            "full": (maps * 255).to(torch.uint8).numpy(),
            "stride4": low.numpy().astype(np.float16),
        }


def stage(kind: type[InferenceStage[Any]], device: str = "cpu", **options: Any) -> Any:
    """One without a run: its photos' maps as above, and a network that has learned nothing."""
    own = object.__new__(kind)
    config = SimpleNamespace(named=lambda name: SeedMasksConfig(), saliency=SaliencyConfig())
    engine = SimpleNamespace(device=torch.device(device), autocast=nullcontext, beat=lambda what: None)
    own.context = SimpleNamespace(engine=engine, config=config)  # type: ignore[assignment]
    own.config = build(kind.section, options, kind.name)
    own.maps = Maps()  # type: ignore[attr-defined]
    torch.manual_seed(0)
    nets: dict[type, Callable[[], nn.Module]] = {
        PsaMasks: lambda: AffinityNet(build_backbone(BackboneConfig("small", "none", output_stride=8))),
        IrnMasks: lambda: IrnNet(build_backbone(BackboneConfig("small", "none", freeze="all"))),
    }
    if kind in nets:
        own.net = nets[kind]().eval()  # type: ignore[attr-defined]
    return own


@torch.no_grad()
@pytest.mark.parametrize("unary", ["hard", "soft"])
@pytest.mark.parametrize("kind", [SeedMasks, PsaMasks, IrnMasks])
def test_masks_of_photos_made_together_are_those_made_one_by_one(kind: type[InferenceStage[Any]], unary: str) -> None:
    own = stage(kind, unary=unary)
    together = own.make(samples())
    assert any(mask.lost for mask in together)
    for sample, got in zip(samples(), together, strict=True):
        [want] = own.make([sample])
        assert torch.equal(got.scores, want.scores)
        assert (got.lost, got.classes.tolist()) == (want.lost, want.classes.tolist())
        for a, b in ((got.plain, want.plain), (got.refined, want.refined), (got.seeds, want.seeds)):
            assert np.array_equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("kind", [PsaLabels, IrnLabels])
def test_labels_of_photos_made_together_are_those_made_one_by_one(kind: type[InferenceStage[Any]]) -> None:
    own = stage(kind)
    together = own.make(samples())
    assert len({label for made in together for label in np.unique(made).tolist()}) > 3
    for sample, got in zip(samples(), together, strict=True):
        assert np.array_equal(got, own.make([sample])[0])


def test_a_gpu_gets_photos_together_and_a_cpu_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (SeedMasks, PsaMasks, IrnMasks, PsaLabels, IrnLabels, Evaluate):
        assert stage(kind, "cuda").batch == TOGETHER > 1
        assert stage(kind).batch == 1
    given: list[list[str]] = []

    class Watched(SeedMasks):
        def sample(self, ordinal: int) -> Sample:
            return samples()[ordinal]

        def make(self, some: Any) -> Any:
            given.append([sample.key for sample in some])
            return super().make(some)

        count, members = (lambda *_: {}), (lambda *_: {})  # type: ignore[assignment]

    monkeypatch.setattr(tiles, "ROOM", 4100)  # two photos of the first size, or a large one alone
    own = stage(Watched)
    found = inference._finish(own, Crew(torch.device("cpu")), range(len(SIZES)))
    assert [sample.key for sample, _, _ in found] == [f"photo{i}" for i in range(len(SIZES))]
    assert given == [["photo0", "photo1"], ["photo2", "photo3"], ["photo4"]]


@torch.no_grad()
def test_nobody_computes_edges_at_which_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds that stand in for nothing, and how sure a stage is of a mask that it has made: both are before the CRF."""
    lattices: list[int] = []
    real = DenseCrf.__init__

    def spy(self: DenseCrf, *photos: Tensor, **options: float) -> None:
        lattices.append(len(photos))
        real(self, *photos, **options)

    monkeypatch.setattr(DenseCrf, "__init__", spy)
    made = stage(SeedMasks).make(samples())
    assert lattices == [4]  # though classes are lost; one photo has no class
    assert any(mask.lost for mask in made)
    lattices.clear()
    own = stage(PsaMasks)
    made = own.make(samples())
    assert lattices == [4, sum(bool(mask.lost) for mask in made)]
    lattices.clear()
    for sample, mask in zip(samples(), made, strict=True):
        sure = own.confidence(sample, mask.refined)
        best = mask.scores.amax(0).numpy() if len(mask.scores) else np.zeros(sample.size, np.float32)
        assert np.array_equal(sure[mask.refined == 0], 1 - best[mask.refined == 0])
        for number, score in zip(mask.classes.tolist(), mask.scores.numpy(), strict=True):
            assert np.array_equal(sure[mask.refined == number + 1], score[mask.refined == number + 1])
    assert not lattices


def test_predictions_leave_out_labels_that_nobody_wants_and_do_not_depend_on_who_is_beside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As evaluate and predict make them; the third photo, too wide for one window, goes through the CRF in parts."""
    for name, value in (("SIDE", 64), ("MARGIN", 16), ("STEP", 8)):
        monkeypatch.setattr(tiles, name, value)
    images = [photo(*size, i) for i, size in enumerate([*SIZES[:2], (9, 150), SIZES[3]])]
    generator = torch.Generator().manual_seed(0)
    logits = [[4 * torch.randn(7, 6, 8, generator=generator)] for _ in images]
    for i, (own,) in enumerate(logits):
        own[i + 2] = -20  # a label that the photo lacks
    labels: list[int] = []
    real = dense_crf.mean_field

    def spy(photos: list[Tensor], unaries: list[list[Tensor]], config: CrfConfig) -> list[list[Tensor]]:
        labels.extend(len(unary) for own in unaries for unary in own)
        return real(photos, unaries, config)

    monkeypatch.setattr(dense_crf, "mean_field", spy)
    config = PredictionConfig()
    together = list(by_parts(images, logits, config))
    assert set(labels) == {6}
    alone = [(i, *one[1:]) for i, image in enumerate(images) for one in by_parts([image], [logits[i]], config)]
    assert [(i, part) for i, part, _, _ in together] == [(i, part) for i, part, _, _ in alone]
    assert len(together) > len(images)
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got[2], want[2])
        assert torch.equal(got[3], want[3])
