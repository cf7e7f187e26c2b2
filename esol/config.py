"""The sections of a config that belong to no stage, and what stages' own sections build on.

Every field is a key of the YAML files in configs/; `--set a.b=value` overrides one. Types, ranges and units stand at
the field. A stage's section stands in the stage's own file, and pipeline/config_file.py reads them all.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from esol.base.errors import ConfigError
from esol.base.schema import key
from esol.base.urls import secret_in

Auto = Literal["auto"]  # found from each photo's own maps
Section = TypeVar("Section")


@dataclass(frozen=True)
class DataConfig:
    """Where the shards are and how an image becomes a training crop (as IRN: long side, then crop)."""

    root: str = key(path=True, runtime=True)  # folder or URL that holds index.json; its content counts, not its place
    train_split: str = key("train")  # whose labels classify, decide, expand and shrink learn from
    mask_split: str = key("train")  # what maps and pseudo masks are made for; affinity networks learn from it
    score_split: str = key("train")  # has masks; maps and pseudo masks are made for it as well and scored on it
    eval_split: str = key("val")  # what evaluate predicts, and scores where it has masks
    long_side: tuple[int, int] = key((320, 640), low=16, high=8192, unit="pixels")  # drawn uniformly
    crop: int = key(512, low=16, high=4096, unit="pixels")  # side of the square training crops of these stages
    # what a photo that cannot be read does: end the run, or be counted and replaced
    damaged: Literal["error", "skip"] = key("error")
    # that read and crop photos beside training
    workers: int = key(2, low=0, high=256, unit="processes per rank", runtime=True)
    cache: str = key("", path=True, runtime=True)  # folder for shards read from a URL; "" = ~/.cache/esol
    # features of crops that RUN/features may hold for the stages behind a frozen backbone (model.freeze = all)
    features: float = key(0.0, low=0, high=1_000_000, unit="GiB; 0 = they are computed each time", runtime=True)

    def check(self, where: str) -> None:
        if self.long_side[0] > self.long_side[1]:
            raise ConfigError(f"{where}.long_side = {list(self.long_side)}: the first must not exceed the second")


@dataclass(frozen=True)
class BackboneConfig:
    """A feature network and what it starts from."""

    backbone: str = key("resnet50")  # resnet50, resnet101, resnet101-caffe, small, or timm:<name>
    weights: str = key("", path=True, runtime=True)  # .safetensors, .pth; "" = download; "none" = random
    pretrained_on: str = key("ImageNet", runtime=True)  # what the weights come from, named beside every score
    # pixels of the photo for each feature; 8 sees finer, and costs four times as much
    output_stride: Literal[8, 16, 32] = key(16)
    # what does not learn: stem is the stem and the first two stages (as IRN has it), or half of a ViT's blocks; body is
    # all but the last stage, or the last quarter of the blocks
    freeze: Literal["none", "stem", "body", "all"] = key("stem")


@dataclass(frozen=True)
class ModelConfig(BackboneConfig):
    """The classification network. kernel_channels 0 is the plain CAM network: classifier straight on the backbone."""

    kernel_channels: int = key(256, low=0, high=8192, unit="channels")  # of W1, the expansion sampler's kernel


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


@dataclass(frozen=True)
class TrainConfig:
    """How a training stage learns; each stage extends it."""

    duration: str = key("5 epochs")  # "5 epochs", "6000 images", "400 steps", "5 epochs, 6000 to 200000 images"
    # photos that one step learns from
    global_batch: int = key(16, low=1, high=65536, unit="images per optimizer step, over all ranks")
    optimizer: Literal["sgd", "adamw"] = key("sgd")  # the rule by which a step changes the weights
    lr: float = key(0.1, low=0, high=100)  # for a step of lr_batch images
    # what lr is for
    lr_batch: int = key(16, low=1, high=65536, unit="images that lr is for; another global_batch scales it")
    momentum: float = key(0.9, low=0, high=1)  # IRN's real momentum is 1e-4
    weight_decay: float = key(1e-4, low=0, high=1)  # pull of the weights towards zero
    poly_power: float = key(0.9, low=0, high=10)  # 0 = constant
    warmup: int = key(0, low=0, high=1_000_000, unit="steps")  # during which the rate rises from zero
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
class CrfConfig:
    """Dense CRF with a Gaussian and a bilateral kernel; the values here are IRN's."""

    iterations: int = key(10, low=0, high=1000)  # 0 = no CRF
    gaussian_sxy: float = key(3.0, low=0.1, high=1000, unit="pixels")  # reach of the kernel that smooths
    gaussian_compat: float = key(3.0, low=0, high=1000)  # weight of that kernel
    bilateral_sxy: float = key(50.0, low=0.1, high=10_000, unit="pixels")  # reach of the kernel that follows colours
    bilateral_srgb: float = key(5.0, low=0.1, high=1000, unit="grey levels")  # how alike two colours have to be for it
    bilateral_compat: float = key(10.0, low=0, high=1000)  # weight of that kernel


@dataclass(frozen=True)
class MapsConfig:
    """How class maps are made of a photo."""

    # at which maps are made; they are added up
    scales: tuple[float, ...] = key((0.5, 1.0, 1.5, 2.0), low=0.1, high=8, unit="times the photo's size")
    long_side: int = key(0, low=0, high=8192, unit="pixels")  # of scale 1; 0 = the photo's own
    flip: bool = key(True)  # the mirror image as well

    def check(self, where: str) -> None:
        if not self.scales:
            raise ConfigError(f"{where}.scales is empty: give at least one, such as [1.0]")


@dataclass(frozen=True)
class PredictionConfig:
    """How DeepLab predicts the mask of a photo."""

    # at which the network looks at a photo
    scales: tuple[float, ...] = key((0.5, 0.75, 1.0, 1.25, 1.5), low=0.1, high=8, unit="times the photo's size")
    flip: bool = key(True)  # the mirror image as well
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

    threshold: float | Auto = key("auto", low=0, high=1)  # what a score must exceed; auto: each photo's own
    crf: CrfConfig = field(default_factory=CrfConfig)
    unary: Literal["hard", "soft"] = key("hard")  # what the CRF starts from: the mask, or the scores as probabilities
    certainty: float = key(0.7, low=0.01, high=0.99, unit="probability of a hard label")  # of a label in unary = hard


@dataclass(frozen=True)
class WalkConfig(MaskConfig):
    """The random walk of PSA and IRN, and how its result becomes masks."""

    radius: int = key(5, low=2, high=64, unit="grid pixels")  # of the pixels that a step of the walk reaches
    beta: float = key(10.0, low=0.01, high=1000)  # power of the affinities
    steps: int | Auto = key("auto", low=1, high=65536)  # auto: in proportion to the grid; PSA and IRN have 256
    alpha: float | Auto = key("auto", low=0, high=1000)  # background (1 - best)^alpha that walks along; PSA has 16


@dataclass(frozen=True)
class CropConfig(TrainConfig):
    """Training on crops of photo and label map."""

    scale: tuple[float, float] = key((1.0, 1.0), low=0.1, high=8, unit="times the photo's size")  # drawn uniformly
    crop: int = key(448, low=16, high=4096, unit="pixels")  # side of the square training crops

    def check(self, where: str) -> None:
        super().check(where)
        if self.scale[0] > self.scale[1]:
            raise ConfigError(f"{where}.scale = {list(self.scale)}: the first must not exceed the second")


@dataclass(frozen=True)
class PairConfig(CropConfig):
    """What PSA and IRN share: pairs of pixels within a radius."""

    radius: int = key(5, low=2, high=64, unit="grid pixels")  # within which two pixels are a pair


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

    # who computes: PyTorch's data parallelism by accelerate, or DeepSpeed's ZeRO
    name: Literal["accelerate", "deepspeed"] = key("accelerate", runtime=True)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    # of matrix products; losses are always float32. auto: bf16 where every process has hardware for it, else fp32
    precision: Literal["auto", "fp32", "bf16", "fp16"] = key("fp32")
    # the repeated blocks of a network compiled, or its steps as CUDA graphs; as with threads, only last digits differ
    compile: Literal["off", "blocks", "graph"] = key("off", runtime=True)
    # how much of its share a rank computes at a time
    micro_batch: int = key(0, low=0, high=65536, unit="images per forward; 0 = the rank's whole share", runtime=True)
    # before a job ends because a rank does not answer
    timeout: float = key(30.0, low=0.1, high=1440, unit="minutes a collective may wait", runtime=True)
    # before a job ends because a rank stands still
    stall: float = key(
        20.0, low=0, high=1440, unit="minutes at one step or photo that end the job; 0 = never", runtime=True
    )
    # of each process
    threads: int = key(0, low=0, high=1024, unit="CPU threads per rank; 0 = cores / local ranks", runtime=True)

    def check(self, where: str) -> None:
        if self.compile != "off" and self.name == "deepspeed":
            raise ConfigError(
                f"{where}.compile = {self.compile}: DeepSpeed's hooks stand in compiled code's way, so leave it off or "
                f"take {where}.name = accelerate"
            )
        if self.compile == "graph" and self.micro_batch:
            raise ConfigError(
                f"{where}.compile = graph: a graph has all images of a rank's step, so leave {where}.micro_batch at 0 "
                f"or take {where}.compile = blocks"
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """When training state is saved. A signal or the end of a stage saves as well."""

    every: int = key(500, low=1, high=1_000_000, unit="steps", runtime=True)  # between two saved states
    keep: int = key(2, low=1, high=1000, unit="checkpoints", runtime=True)  # how many saved states stay


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow; metrics.jsonl in the run directory is always written."""

    uri: str = key("", path=True, runtime=True)  # "" = sqlite:///<runs folder>/mlflow.db; "none" = no MLflow
    experiment: str = key("esol", runtime=True)  # the name in MLflow under which runs stand
    # how often values are logged
    every: int = key(10, low=1, high=100_000, unit="steps between logged values", runtime=True)
    # the page to look at, RUN/report.html; of more photos it shows so many, evenly spread
    page: int = key(10000, low=0, high=100000, unit="photos in report.html; 0 = no page", runtime=True)
    # how many photos a stage's picture shows
    pictures: int = key(12, low=0, high=64, unit="overlay pictures per stage", runtime=True)

    def check(self, where: str) -> None:
        secret, bare = secret_in(self.uri)
        if secret == "a password" and self.uri.startswith("http"):
            raise ConfigError(
                f"{where}.uri = {bare!r} was given with a password, which would be written into the run's files: take "
                "it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )


@dataclass(frozen=True)
class Config:
    """A whole run: `run_dir` holds everything that it writes. A run's own config has a section for every stage, too."""

    run_dir: str = key(path=True, runtime=True)  # the folder that everything is written to
    seed: int = key(0, low=0, high=2**31 - 1)  # of initial weights, crops and the order of photos
    plugins: tuple[str, ...] = key((), runtime=True)  # modules that add stages, networks, ..., such as my_package.stage
    stages: tuple[str, ...] = key((), runtime=True)  # which stages the run has; their order is fixed
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def check(self, where: str) -> None:
        if "://" in self.run_dir or not self.run_dir.strip():
            raise ConfigError(
                f"run_dir = {secret_in(self.run_dir)[1]!r}: it must be a local folder, where files can be locked and "
                "renamed; shards may be behind a URL. Set it to a folder, and copy the finished run to the URL"
            )

    def section(self, kind: type[Section]) -> Section:
        """The one section of this class, or of a class that is made from it; KeyError where it is not exactly one."""
        found = [value for spec in fields(self) if isinstance(value := getattr(self, spec.name), kind)]
        if len(found) != 1:
            raise KeyError(f"{len(found)} sections are a {kind.__name__}")
        return found[0]

    def named(self, name: str) -> Any:
        """The section of that name."""
        return getattr(self, name)
