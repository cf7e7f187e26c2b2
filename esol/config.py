"""Configuration: one nested frozen dataclass per concern, read from YAML, checked, and written back resolved.

Every field below is a key of the YAML files in configs/; `--set a.b=value` overrides one. Unknown keys, wrong types and
values out of range stop with the full path of the key. Types, ranges and units stand at the field.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from esol.base.errors import ConfigError
from esol.base.schema import build, key

MAIN_LINE = ("classify", "decide", "expand", "shrink", "localize", "seed_masks")
PSA = ("psa_labels", "psa", "psa_masks")
IRN = ("irn_labels", "irn", "irn_mean", "irn_masks")
SEGMENT = ("segment", "evaluate")
WALKS = ("psa_masks", "irn_masks")
VOTERS = ("seed_masks", *WALKS)
VOTE = ("vote_masks",)
MASK_STAGES = (*VOTERS, *VOTE)

Auto = Literal["auto"]  # found from each photo's own maps


@dataclass(frozen=True)
class DataConfig:
    """Where the shards are and how an image becomes a training crop (as IRN: long side, then crop)."""

    root: str = key(path=True, runtime=True)  # folder or URL that holds index.json; its content counts, not its place
    train_split: str = key("train")
    mask_split: str = key("train")  # what maps and pseudo masks are made for; affinity networks learn from it
    score_split: str = key("train")  # has masks; maps and pseudo masks are made for it as well and scored on it
    eval_split: str = key("val")  # what evaluate predicts, and scores where it has masks
    long_side: tuple[int, int] = key((320, 640), low=16, high=8192, unit="pixels")  # drawn uniformly
    crop: int = key(512, low=16, high=4096, unit="pixels")
    damaged: Literal["error", "skip"] = key("error")
    workers: int = key(2, low=0, high=256, unit="processes per rank", runtime=True)
    cache: str = key("", path=True, runtime=True)  # folder for shards read from a URL; "" = ~/.cache/esol

    def check(self, where: str) -> None:
        if self.long_side[0] > self.long_side[1]:
            raise ConfigError(f"{where}.long_side = {list(self.long_side)}: the first must not exceed the second")


@dataclass(frozen=True)
class BackboneConfig:
    """A feature network and what it starts from."""

    backbone: str = key("resnet50")  # resnet50, resnet101, resnet101-caffe, small, or timm:<name>
    weights: str = key("", path=True, runtime=True)  # .safetensors, .pth; "" = download; "none" = random
    pretrained_on: str = key("ImageNet", runtime=True)  # what the weights come from, named beside every score
    output_stride: Literal[8, 16, 32] = key(16)
    freeze: Literal["none", "stem", "all"] = key("stem")  # stem: stem and first two stages (IRN); batch norm always


@dataclass(frozen=True)
class ModelConfig(BackboneConfig):
    """The classification network. kernel_channels 0 is the plain CAM network: classifier straight on the backbone."""

    kernel_channels: int = key(256, low=0, high=8192, unit="channels")  # of W1, the expansion sampler's kernel


@dataclass(frozen=True)
class TrainConfig:
    """How a training stage learns; each stage extends it."""

    duration: str = key("5 epochs")  # "5 epochs", "6000 images", "400 steps", "5 epochs, 6000 to 200000 images"
    global_batch: int = key(16, low=1, high=65536, unit="images per optimizer step, over all ranks")
    optimizer: Literal["sgd", "adamw"] = key("sgd")
    lr: float = key(0.1, low=0, high=100)  # for a step of lr_batch images
    lr_batch: int = key(16, low=1, high=65536, unit="images that lr is for; another global_batch scales it")
    momentum: float = key(0.9, low=0, high=1)  # IRN's real momentum is 1e-4 (RECIPES, quirk)
    weight_decay: float = key(1e-4, low=0, high=1)
    poly_power: float = key(0.9, low=0, high=10)  # 0 = constant
    warmup: int = key(0, low=0, high=1_000_000, unit="steps")
    clip_norm: float = key(0.0, low=0, high=1e6)  # 0 = off

    def check(self, where: str) -> None:
        Duration.parse(self.duration, f"{where}.duration")

    @property
    def step_lr(self) -> float:
        """The learning rate of a step of global_batch images: in proportion to them (AdamW: to their square root)."""
        more = self.global_batch / self.lr_batch
        return self.lr * (more if self.optimizer == "sgd" else math.sqrt(more))


@dataclass(frozen=True)
class LabelConfig(TrainConfig):
    """Training on image-level labels."""

    balance: bool = key(True)  # no class weighs more for being one of few, or rare; false: mean over the classes (IRN)


@dataclass(frozen=True)
class ClassifyConfig(LabelConfig):
    """The CAM network on image-level labels."""

    duration: str = key("5 epochs, 6400 to 400000 images")
    head_lr: float = key(10.0, low=0, high=1000, unit="times lr, for W1 and the classifier")


@dataclass(frozen=True)
class DecideConfig(LabelConfig):
    """W1 and V trained on with an area term that makes each position of a class map all or nothing; ours."""

    duration: str = key("6240 images")
    lr: float = key(0.02, low=0, high=100)
    area: float = key(1.0, low=0, high=1000)  # lambda, weight of the area loss
    clip: float = key(0.3, low=0, high=1)  # beta of feature clipping, in the loss and in the maps; 0 = off


@dataclass(frozen=True)
class ExpandConfig(LabelConfig):
    """The expansion sampler: offsets that maximise the classification loss (paper, section Expansion)."""

    duration: str = key("1600 images")  # the loss has no upper bound: duration, lr and alpha are one budget
    lr: float = key(0.05, low=0, high=100)
    momentum: float = key(0.0, low=0, high=1)  # with it all offsets run one way and the maps shift
    poly_power: float = key(0.0, low=0, high=10)
    alpha: float = key(1.0, low=0, high=1000)  # weight of the inverse loss
    classes: Literal["all", "present"] = key("all")  # whose loss is maximised
    bound: float = key(1.0, low=0, high=64, unit="feature-grid pixels")  # r in r*tanh(o/r); 0 = free offsets
    clip: float = key(0.2, low=0, high=1)  # beta of feature clipping; 0 = off
    game: bool = key(False)  # W1 and V minimise while the offsets maximise


@dataclass(frozen=True)
class ShrinkConfig(LabelConfig):
    """The shrinkage sampler: offsets (and kernel) that keep the classification and lose area."""

    duration: str = key("2400 images")
    lr: float = key(0.005, low=0, high=100)
    area: float = key(1.0, low=0, high=1000)  # lambda, weight of the area loss
    clip: float = key(0.1, low=0, high=1)  # beta of feature clipping before shrinkage; 0 = off
    bound: float = key(1.0, low=0, high=64, unit="feature-grid pixels")
    kernel: Literal["identity", "copy", "box"] = key("box")  # where W2 starts
    learn_kernel: bool = key(True)
    learn_classifier: bool = key(True)
    area_term: Literal["mean", "max", "decide"] = key("mean")  # of the normalised maps: see esol/training/losses.py


@dataclass(frozen=True)
class LocalizeConfig:
    """Class maps of the trained stages, scored as seeds, and written as shards that mirror the input."""

    scales: tuple[float, ...] = key((0.5, 1.0, 1.5, 2.0), low=0.1, high=8)
    long_side: int = key(0, low=0, high=8192, unit="pixels")  # of scale 1; 0 = the image's own
    flip: bool = key(True)
    write: Literal["auto", "last", "cam", "decide", "expand", "shrink"] = key("auto")  # whose maps later stages get
    batch: int = key(1, low=1, high=1024, unit="images of one size")

    def check(self, where: str) -> None:
        if not self.scales:
            raise ConfigError(f"{where}.scales is empty: give at least one, such as [1.0]")


@dataclass(frozen=True)
class CrfConfig:
    """Dense CRF with a Gaussian and a bilateral kernel; the values here are IRN's."""

    iterations: int = key(10, low=0, high=1000)  # 0 = no CRF
    gaussian_sxy: float = key(3.0, low=0.1, high=1000, unit="pixels")
    gaussian_compat: float = key(3.0, low=0, high=1000)
    bilateral_sxy: float = key(50.0, low=0.1, high=10_000, unit="pixels")
    bilateral_srgb: float = key(5.0, low=0.1, high=1000, unit="grey levels")
    bilateral_compat: float = key(10.0, low=0, high=1000)


@dataclass(frozen=True)
class SaliencyConfig:
    """Saliency maps as background cue of the mask stages (DRS): background = 1 - saliency instead of a threshold."""

    source: Literal["none", "shards", "folder", "spectral-residual"] = key("none")  # the last: a classical stand-in
    folder: str = key("", path=True, runtime=True)  # KEY.png, 8-bit gray, for source folder; its content counts
    floor: float = key(0.2, low=0, high=1)  # class scores below it count as 0
    conflict: float = key(0.9, low=0, high=1)  # void where more than two channels exceed it

    def check(self, where: str) -> None:
        if (self.source == "folder") != bool(self.folder):
            raise ConfigError(f"{where}.folder: give it with {where}.source = folder, and only then")


@dataclass(frozen=True)
class MaskConfig:
    """How scores become pseudo masks: background where no class score is above the threshold, then the CRF."""

    threshold: float | Auto = key("auto", low=0, high=1)
    crf: CrfConfig = field(default_factory=CrfConfig)
    unary: Literal["hard", "soft"] = key("hard")  # what the CRF starts from: the mask, or the scores as probabilities
    certainty: float = key(0.7, low=0.01, high=0.99, unit="probability of a hard label")


@dataclass(frozen=True)
class SeedMasksConfig(MaskConfig):
    """Seeds as pseudo masks, without any affinity; a score is the class map."""


@dataclass(frozen=True)
class WalkConfig(MaskConfig):
    """The random walk of PSA and IRN, and how its result becomes masks."""

    radius: int = key(5, low=2, high=64, unit="grid pixels")
    beta: float = key(10.0, low=0.01, high=1000)  # power of the affinities
    steps: int | Auto = key("auto", low=1, high=65536)  # auto: in proportion to the grid; PSA and IRN have 256
    alpha: float | Auto = key("auto", low=0, high=1000)  # background (1 - best)^alpha that walks along; PSA has 16


@dataclass(frozen=True)
class PsaLabelsConfig:
    """PSA's label synthesis: the CRF on class maps with a low and a high background."""

    alpha_low: float | Auto = key("auto", low=0, high=1000)  # background (1 - best)^alpha; a class here is foreground
    alpha_high: float | Auto = key("auto", low=0, high=1000)  # and background here is background; the rest is void
    crf: CrfConfig = field(default_factory=lambda: CrfConfig(bilateral_sxy=80.0, bilateral_srgb=13.0))


@dataclass(frozen=True)
class CropConfig(TrainConfig):
    """Training on crops of photo and label map."""

    scale: tuple[float, float] = key((1.0, 1.0), low=0.1, high=8, unit="times the photo's size")  # drawn uniformly
    crop: int = key(448, low=16, high=4096, unit="pixels")

    def check(self, where: str) -> None:
        super().check(where)
        if self.scale[0] > self.scale[1]:
            raise ConfigError(f"{where}.scale = {list(self.scale)}: the first must not exceed the second")


@dataclass(frozen=True)
class PairConfig(CropConfig):
    """What PSA and IRN share: pairs of pixels within a radius."""

    radius: int = key(5, low=2, high=64, unit="grid pixels")


@dataclass(frozen=True)
class PsaConfig(PairConfig):
    """AffinityNet. Momentum 5e-4 is what PSA really trains with: it passes the weight decay in that place."""

    duration: str = key("8 epochs, 2000 to 100000 images")
    global_batch: int = key(8, low=1, high=65536, unit="images per optimizer step, over all ranks")
    lr_batch: int = key(8, low=1, high=65536, unit="images that lr is for; another global_batch scales it")
    momentum: float = key(5e-4, low=0, high=1)
    weight_decay: float = key(5e-4, low=0, high=1)
    head_lr: float = key(10.0, low=0, high=1000, unit="times lr, for the new layers; biases twice that of their part")


@dataclass(frozen=True)
class PsaMasksConfig(WalkConfig):
    """Walk on AffinityNet's affinities; a score is a class over class + background."""

    beta: float = key(8.0, low=0.01, high=1000)  # power of the affinities


@dataclass(frozen=True)
class IrnLabelsConfig:
    """IRN's label synthesis: the CRF on hard seeds at a high and at a low threshold."""

    foreground: float | Auto = key("auto", low=0, high=1)  # a class at this threshold is that class; IRN has 0.30
    background: float | Auto = key("auto", low=0, high=1)  # background at both is background; the rest void; IRN: 0.05
    certainty: float = key(0.7, low=0.01, high=0.99, unit="probability of a hard label")
    crf: CrfConfig = field(default_factory=CrfConfig)


@dataclass(frozen=True)
class IrnConfig(PairConfig):
    """IRNet. Momentum 1e-4 is what IRN really trains with: it passes the weight decay in that place."""

    duration: str = key("3 epochs, 2000 to 100000 images")
    global_batch: int = key(32, low=1, high=65536, unit="images per optimizer step, over all ranks")
    lr_batch: int = key(32, low=1, high=65536, unit="images that lr is for; another global_batch scales it")
    momentum: float = key(1e-4, low=0, high=1)
    scale: tuple[float, float] = key((0.5, 1.5), low=0.1, high=8, unit="times the photo's size")  # drawn uniformly
    crop: int = key(512, low=16, high=4096, unit="pixels")
    radius: int = key(10, low=2, high=64, unit="grid pixels")
    displacement_lr: float = key(10.0, low=0, high=1000, unit="times lr, for the displacement branch")


@dataclass(frozen=True)
class IrnMasksConfig(WalkConfig):
    """Walk of the class maps, boundaries taken out, on IRNet's affinities; alpha 0: no background walks (IRN)."""


@dataclass(frozen=True)
class SegmentConfig(CropConfig):
    """DeepLab-v2 on masks; the values are its public codes' for VOC and a start from ImageNet."""

    masks: Literal["auto", "vote_masks", "irn_masks", "psa_masks", "seed_masks", "truth"] = key("auto")
    model: BackboneConfig = field(default_factory=lambda: BackboneConfig("resnet101", output_stride=8, freeze="none"))
    rates: tuple[int, ...] = key((6, 12, 18, 24), low=1, high=256, unit="grid pixels, dilation of ASPP's branches")
    duration: str = key("30000 steps")
    global_batch: int = key(10, low=1, high=65536, unit="images per optimizer step, over all ranks")
    lr_batch: int = key(10, low=1, high=65536, unit="images that lr is for; another global_batch scales it")
    lr: float = key(2e-4, low=0, high=100)
    weight_decay: float = key(5e-4, low=0, high=1)
    head_lr: float = key(10.0, low=0, high=1000, unit="times lr, for ASPP; its biases twice that, without decay")
    scale: tuple[float, float] = key((0.5, 2.0), low=0.1, high=8, unit="times the photo's size")  # drawn uniformly
    crop: int = key(321, low=16, high=4096, unit="pixels")
    inputs: tuple[float, ...] = key((1.0, 0.75, 0.5), low=0.1, high=4, unit="times the crop, a loss each")
    balance: bool = key(True)  # foreground's and background's means weigh the same (DSRG); ImageNet starts want it

    def check(self, where: str) -> None:
        super().check(where)
        for name in ("rates", "inputs"):
            if not getattr(self, name):
                raise ConfigError(f"{where}.{name} is empty: give at least one")
        if self.model.output_stride != 8:
            raise ConfigError(f"{where}.model.output_stride = {self.model.output_stride}: DeepLab-v2 has 8")


@dataclass(frozen=True)
class EvaluateConfig:
    """Prediction and scores of data.eval_split, with and without the CRF; `esol predict` does the same."""

    scales: tuple[float, ...] = key((0.5, 0.75, 1.0, 1.25, 1.5), low=0.1, high=8, unit="times the photo's size")
    flip: bool = key(True)
    combine: Literal["mean", "max"] = key("mean")  # of the scales' probabilities, or the highest of their logits
    crf: CrfConfig = field(
        default_factory=lambda: CrfConfig(
            gaussian_sxy=1.0, bilateral_sxy=67.0, bilateral_srgb=3.0, bilateral_compat=4.0
        )
    )

    def check(self, where: str) -> None:
        if not self.scales:
            raise ConfigError(f"{where}.scales is empty: give at least one, such as [1.0]")


@dataclass(frozen=True)
class DeepSpeedConfig:
    """What engine.name = deepspeed adds. Weights are float32 in every precision: nothing here changes results."""

    zero: Literal[0, 1, 2, 3] = key(1, runtime=True)  # partitions: 1 optimizer state, 2 gradients too, 3 weights too
    offload: bool = key(False, runtime=True)  # optimizer state in the memory of the CPU
    json: str = key("", path=True, runtime=True)  # a DeepSpeed JSON with more of its keys

    def check(self, where: str) -> None:
        if self.offload and not self.zero:
            raise ConfigError(f"{where}.offload needs {where}.zero of 1 or more")


@dataclass(frozen=True)
class EngineConfig:
    """Hardware side: which engine, numbers format, how a global batch is split."""

    name: Literal["accelerate", "deepspeed"] = key("accelerate", runtime=True)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    precision: Literal["fp32", "bf16", "fp16"] = key("fp32")
    micro_batch: int = key(0, low=0, high=65536, unit="images per forward; 0 = the rank's whole share", runtime=True)
    timeout: float = key(30.0, low=0.1, high=1440, unit="minutes a collective may wait", runtime=True)
    stall: float = key(
        20.0, low=0, high=1440, unit="minutes at one step or photo that end the job; 0 = never", runtime=True
    )
    threads: int = key(0, low=0, high=1024, unit="CPU threads per rank; 0 = cores / local ranks", runtime=True)


@dataclass(frozen=True)
class CheckpointConfig:
    """When training state is saved. A signal or the end of a stage saves as well."""

    every: int = key(500, low=1, high=1_000_000, unit="steps", runtime=True)
    keep: int = key(2, low=1, high=1000, unit="checkpoints", runtime=True)


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow; metrics.jsonl in the run directory is always written."""

    uri: str = key("", path=True, runtime=True)  # "" = sqlite:///<runs folder>/mlflow.db; "none" = no MLflow
    experiment: str = key("esol", runtime=True)
    every: int = key(10, low=1, high=100_000, unit="steps between logged values", runtime=True)
    pictures: int = key(12, low=0, high=64, unit="overlay pictures per stage", runtime=True)


@dataclass(frozen=True)
class Config:
    """A whole run: `run_dir` holds everything that it writes."""

    run_dir: str = key(path=True, runtime=True)
    seed: int = key(0, low=0, high=2**31 - 1)
    stages: tuple[str, ...] = key((*MAIN_LINE, *PSA, *IRN, *VOTE, *SEGMENT), runtime=True)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    decide: DecideConfig = field(default_factory=DecideConfig)
    expand: ExpandConfig = field(default_factory=ExpandConfig)
    shrink: ShrinkConfig = field(default_factory=ShrinkConfig)
    localize: LocalizeConfig = field(default_factory=LocalizeConfig)
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)
    seed_masks: SeedMasksConfig = field(default_factory=SeedMasksConfig)
    psa_labels: PsaLabelsConfig = field(default_factory=PsaLabelsConfig)
    psa: PsaConfig = field(default_factory=PsaConfig)
    psa_masks: PsaMasksConfig = field(default_factory=PsaMasksConfig)
    irn_labels: IrnLabelsConfig = field(default_factory=IrnLabelsConfig)
    irn: IrnConfig = field(default_factory=IrnConfig)
    irn_masks: IrnMasksConfig = field(default_factory=IrnMasksConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self, where: str) -> None:
        if "://" in self.run_dir or not self.run_dir.strip():
            raise ConfigError(
                f"run_dir = {self.run_dir!r}: it must be a local folder; shards may be behind a URL, a run may not"
            )
        written = self.localize.write
        if "localize" in self.stages and written not in ("auto", "last", "cam", *self.stages):
            raise ConfigError(
                f"localize.write = {written}, but stages has no {written}: add it, or set localize.write to last"
            )
        needing = [s for s in ("decide", "expand", "shrink") if s in self.stages]
        if self.model.kernel_channels == 0 and needing:
            raise ConfigError(
                f"model.kernel_channels = 0 is the plain CAM network, which {needing[0]} cannot use: "
                "set it above 0 or leave the stage out of stages"
            )


def load(source: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file, applies `a.b=value` overrides in order, checks everything; ConfigError names the key."""
    try:
        text = Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read config {source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{source} is not UTF-8 text (line {line}: {error.reason}): save it as UTF-8") from error
    try:
        tree = yaml.load(text, _Loader) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {_where(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected keys and values at the top level, got {type(tree).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {override!r}: write it as a.b=value")
        _assign(tree, key.strip(), value)
    return build(Config, tree)


def _where(error: yaml.YAMLError) -> str:
    """What is wrong and in which line, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    return problem if mark is None else f"{problem} (line {mark.line + 1}, column {mark.column + 1})"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key that is given twice is an error: of two values the later would count in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode):
                if name.value in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key {name.value} is given twice", name.start_mark
                    )
                seen.add(name.value)
        return node


def _assign(tree: dict[str, Any], key: str, value: str) -> None:
    *parents, last = key.split(".")
    node = tree
    for depth, name in enumerate(parents):
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: {'.'.join(parents[: depth + 1])} is a value, it has no keys below it")
        node = child
    try:
        node[last] = yaml.load(value, _Loader) if value.strip() else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {value!r} is not a YAML value: {_where(error)}") from error


@dataclass(frozen=True)
class Duration:
    """How long a training stage learns: so many epochs, images or steps, held within bounds in images where given."""

    count: int
    unit: Literal["epochs", "images", "steps"]
    least: int = 0
    most: int = 0  # 0 = no bound

    @classmethod
    def parse(cls, text: str, path: str) -> Duration:
        """'5 epochs', '6000 images', '400 steps' or '5 epochs, 6000 to 200000 images'; ConfigError otherwise."""
        number = r"(\d{1,12})"
        match = re.fullmatch(rf"{number} *(epoch|image|step)s?( *, *{number} *to *{number} *images)?", text.strip())
        found = [int(match[i] or 0) for i in (1, 4, 5)] if match else [0, 0, 0]
        if not match or found[0] < 1 or (match[3] and not 0 < found[1] <= found[2]):
            raise ConfigError(
                f"{path} = {text!r}: write it as '5 epochs', '6000 images', '400 steps', or with bounds as"
                " '5 epochs, 6000 to 200000 images'"
            )
        return cls(found[0], f"{match[2]}s", found[1], found[2])  # type: ignore[arg-type]

    def steps(self, global_batch: int, steps_per_epoch: int) -> int:
        """Optimizer steps of global_batch images; an epoch has steps_per_epoch of them."""
        if self.unit == "images":
            count = -(-self.count // global_batch)
        else:
            count = self.count * (steps_per_epoch if self.unit == "epochs" else 1)
        least, most = (-(-bound // global_batch) for bound in (self.least, self.most))
        return min(max(count, least), most or count)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal one."""
    plain = json.loads(json.dumps(asdict(config)))
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120)
