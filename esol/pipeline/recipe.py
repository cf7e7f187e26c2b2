"""The config that `esol auto` writes: what these photos, this machine and this time ask for, with reasons."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from esol.base.errors import ConfigError, WeightsError
from esol.base.machine import cores

_MAPS = ("classify", "decide", "expand", "shrink", "localize")
_MASKS = ("seed_masks", "psa_labels", "psa", "psa_masks", "irn_labels", "irn", "irn_masks", "vote_masks")
CHAIN = (*_MAPS, *_MASKS, "segment", "evaluate")
# what is left out first where the time is short: IRN gives masks that PSA's mostly beat, Shrinkage maps that the judge
# mostly passes over, and DeepLab learns from masks that are there by then
OPTIONAL = (("irn_labels", "irn", "irn_masks", "vote_masks"), ("shrink",), ("segment", "evaluate"))


@dataclass(frozen=True)
class Machine:
    """What the run can count on."""

    gpu: bool
    cores: int

    @property
    def words(self) -> str:
        """For people."""
        return "a GPU" if self.gpu else f"{self.cores} CPU core{'s' if self.cores > 1 else ''}"


@dataclass(frozen=True)
class Initial:
    """Initial weights: backbone as configs name it, file "" where the hub has it."""

    backbone: str
    file: str


@dataclass(frozen=True)
class _Published:
    """Published weights: their file's name, and where their hub's library keeps it: variable, default, place below."""

    backbone: str
    file: str
    kept: tuple[str, str, str]

    @property
    def cached(self) -> bool:
        """Whether it was downloaded before."""
        variable, default, below = self.kept
        return (Path(os.environ.get(variable, Path.home() / default)) / below).exists()


_SMALL = _Published(
    "timm:tf_efficientnet_lite0",
    "tf_efficientnet_lite0.safetensors",
    ("HF_HOME", ".cache/huggingface", "hub/models--timm--tf_efficientnet_lite0.in1k"),
)
_LARGE = _Published(
    "resnet50", "resnet50-0676ba61.pth", ("TORCH_HOME", ".cache/torch", "hub/checkpoints/resnet50-0676ba61.pth")
)


def this_machine(device: str) -> Machine:
    """The machine, found without torch, which takes seconds to load; device: auto, cpu or cuda."""
    gpu = bool(shutil.which("nvidia-smi")) and Path("/dev/nvidia0").exists()
    if device == "cuda" and not gpu:
        raise ConfigError("--device cuda: this machine shows no NVIDIA GPU; leave the option out to run on the CPU")
    on_gpu = gpu and device != "cpu"
    return Machine(on_gpu, cores())


def find_weights(machine: Machine) -> Initial:
    """A small backbone for a CPU, ResNet-50 for a GPU: a file in $ESOL_WEIGHTS, else the hub's.

    WeightsError, within two seconds, where there is neither.
    """
    folder = os.environ.get("ESOL_WEIGHTS", "")
    wanted = [_LARGE, _SMALL] if machine.gpu else [_SMALL]
    for one in wanted:
        if folder and (Path(folder) / one.file).is_file():
            return Initial(one.backbone, str((Path(folder) / one.file).absolute()))
    if wanted[0].cached or _reachable(_hub(machine)):
        return Initial(wanted[0].backbone, "")
    raise WeightsError(
        f"there are no initial weights: {wanted[0].file} is not in the folder that the variable ESOL_WEIGHTS names "
        f"({folder or 'it is not set'}), and its hub cannot be reached. Put the file there, or connect to the internet"
    )


def _hub(machine: Machine) -> str:
    if machine.gpu:
        from torchvision.models import ResNet50_Weights

        return urlsplit(ResNet50_Weights.IMAGENET1K_V1.url).hostname or ""
    from huggingface_hub import constants  # what HF_ENDPOINT says, else its own

    return urlsplit(constants.ENDPOINT).hostname or ""


def _reachable(host: str, seconds: float = 1.0) -> bool:
    """Whether a host takes connections; a look-up that hangs counts as no."""
    answers: list[bool] = []

    def look() -> None:
        try:
            socket.create_connection((host, 443), seconds).close()
            answers.append(True)
        except OSError:
            answers.append(False)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(seconds + 0.3)
    return answers == [True]


@dataclass(frozen=True)
class Photos:
    """What the shards hold: photos to learn from, their long side in the middle, photos by split, any masks."""

    count: int
    side: int
    splits: Mapping[str, int]
    masks: bool

    @property
    def evaluated(self) -> str:
        """The split that DeepLab is to predict: one that nothing learns from, where there is one."""
        return next((name for name in ("val", "test") if name in self.splits), "train")


def config_text(
    run_dir: Path,
    photos: Photos,
    machine: Machine,
    initial: Initial,
    stages: Sequence[str],
    shares: tuple[float, float],
    reason: str,
) -> str:
    """The YAML of a run.

    stages: which; shares: of the usual training, of maps and walks and of DeepLab; reason: of both, in words.
    """
    share, deeplab = shares
    side = max(64, min(photos.side, 448 if machine.gpu else 320))
    low = max(48, round(0.7 * side / 16) * 16)
    crop = max(64, low // 16 * 16)
    batch, half = min(16, photos.count), min(8, photos.count)
    model = [f"backbone: {initial.backbone}", *([f"weights: {json.dumps(initial.file)}"] if initial.file else [])]
    masks = "they have masks, so every stage is scored" if photos.masks else "without masks the judge ranks the stages"

    def images(usual: int, least: int) -> int:
        return max(least, round(share * usual / 100) * 100)

    scales = "0.5, 1.0, 1.5, 2.0" if machine.gpu else "1.0, 1.5" if share > 0.7 else "1.0"
    lines = [
        "# Written by `esol auto`. Change a line and run the same command again: only what it touches is made anew.",
        "# docs/config.md has every key, docs/maps.md which to turn when maps are too wide or too tight.",
        f"run_dir: {json.dumps(str(run_dir))}",
        f"# {reason}",
        f"stages: [{', '.join(stages)}]",
        "data:",
        f"  root: {json.dumps(str(run_dir / 'shards'))}",
        f"  eval_split: {photos.evaluated}  # {_of_split(photos.evaluated, photos)}",
        f"  long_side: [{low}, {side}]  # {photos.count} photos, whose long side is {photos.side} pixels in the middle",
        f"  crop: {crop}  # pixels; {masks}",
        f"  workers: {2 if machine.gpu else 1}  # processes that read photos beside training",
        *([] if machine.gpu else ["  features: 4  # GiB for what the frozen network makes of photos, gone at the end"]),
        "model:",
        *(f"  {line}" for line in model),
        "  freeze: stem  # the machine has a GPU" if machine.gpu else "  freeze: all  # on a CPU only the head learns",
        "classify:",
        f'  duration: "{max(1, round(4 * share))} epochs, {images(3200, 1600)} to 200000 images"',
        f"  global_batch: {batch}  # images a step",
        f"  lr: {0.02 if machine.gpu else 0.05}",
        f"  head_lr: {10 if machine.gpu else 1}",
        f"decide: {{duration: {images(3200, 1600)} images, global_batch: {batch}}}",
        f"expand: {{duration: {images(1600, 1200)} images, global_batch: {batch}}}",
        f"shrink: {{duration: {images(2400, 1200)} images, global_batch: {batch}}}",
        f"localize: {{scales: [{scales}], long_side: {side}}}",
        f"psa: {{duration: {images(2000, 1000)} images, global_batch: {half}, crop: {crop}}}",
        f"irn: {{duration: {images(1600, 800)} images, global_batch: {batch}, lr_batch: 16, crop: {crop}}}",
        "segment:",
        f"  model: {{{', '.join(model)}, freeze: {'stem' if machine.gpu else 'body'}}}",
        f"  duration: {round(deeplab * (32000 if machine.gpu else 4000) / 100) * 100} images",
        f"  global_batch: {half}",
        "  lr_batch: 8",
        "  lr: 0.001",
        "  head_lr: 2",
        f"  crop: {crop + 1}",
        "  scale: [0.75, 1.5]",
        "  inputs: [1.0]",
        f"evaluate: {{scales: [{'0.75, 1.0, 1.25' if share >= 1 else '1.0'}]}}",
        "engine: {precision: auto}",
    ]
    return "\n".join(lines) + "\n"


def _of_split(name: str, photos: Photos) -> str:
    if name == "train":
        return "DeepLab predicts the photos that it learned from, for there is no split val or test"
    return f"{photos.splits[name]} photos that nothing learns from"
