"""The model card of an exported model, written from what its run left behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esol.base.errors import CheckpointError
from esol.base.strangers import markdown
from esol.config import Config, PredictionConfig
from esol.pipeline import records
from esol.pipeline.cam import cam_stages
from esol.pipeline.model_file import ModelInfo
from esol.pipeline.records import Manifest
from esol.report.tables import per_class, summary
from esol.stages.segment import SegmentConfig

FILES = {
    "model.safetensors": "weights; the header says how to build the network (esol.load_model)",
    "config.json": "the header again, for people",
    "model.pt2": "torch.export: uint8 photos (B, 3, H, W), RGB, sides of at least 9 -> probabilities (B, labels, H, W)",
    "model.onnx": "the same for ONNX Runtime: `image` -> `probabilities`",
    "mlflow": "MLflow model: a photo's bytes -> its mask (base64 of a PNG) and class shares (JSON)",
}


def model_card(run_dir: Path, info: ModelInfo, checks: Mapping[str, str], pictured: bool) -> str:
    """Markdown: use, data, recipe, initial weights, numbers per class, limits.

    checks: exported graph -> how it compares with PyTorch; pictured: whether evaluate.png lies beside the card.
    """
    found, manifest = records.finished(run_dir), records.need(run_dir, "segment")
    name, config = markdown(run_dir.resolve().name), manifest.ran_with
    stale = records.outdated(run_dir)
    if stale:
        raise CheckpointError(f"{run_dir} is not of one piece: {'; '.join(stale)}. Run it to its end, then export it")
    learned, evaluated = manifest.results, found.get("evaluate")
    source = (
        "true masks"
        if info.masks == "truth"
        else f"pseudo masks ({markdown(info.masks)}) that image-level labels led to"
    )
    parts = [
        f"# {name}: DeepLab-v2 on {info.backbone}\n\n"
        f"Labels every pixel of a photo as background or one of {len(info.classes)} classes: "
        f"{', '.join(map(markdown, info.classes))}. It learned from {source}. Written by `esol export` from the run "
        f"{name}, finished {markdown(manifest.finished)}.",
        "![photos of the evaluation split, predictions, truth](evaluate.png)" if pictured else "",
        f"## Use\n\n{_usage(checks, info.evaluate)}",
        f"## Data\n\n{_data(config, manifest, learned, evaluated)}",
        f"## Recipe\n\n{_recipe(config, info, manifest)}",
        f"## Numbers\n\n{_numbers(found, evaluated)}",
        f"## Limits\n\n{_limits(info, evaluated)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _usage(checks: Mapping[str, str], test: PredictionConfig) -> str:
    graphs = ("model.pt2", "model.onnx")
    rows = [f"| {name} | {about} |" for name, about in FILES.items() if name in checks or name not in graphs]
    files = "\n".join(["| file | what it is |", "|---|---|", *rows])
    notes = [
        "    esol predict . photos/ --out predictions",
        "    export UVICORN_LIMIT_CONCURRENCY=64  # more requests at once are answered 503\n"
        "    mlflow models serve -m mlflow --env-manager local --host 127.0.0.1 --port 5001",
        "`esol predict` and the MLflow model make larger photos as large as those it learned from, and use scales "
        f"{', '.join(f'{scale:g}' for scale in test.scales)}{', the mirror image' if test.flip else ''}"
        f"{' and the dense CRF' if test.crf.iterations else ''}. `esol predict --fast` and requests with "
        '`"params": {"fast": true}` take one scale, no mirror image and no CRF. The graphs (pt2, onnx) are the network '
        "at one scale.",
    ]
    return "\n\n".join([files, *notes, *(f"{name}: {text}." for name, text in checks.items())])


def _data(config: Config, manifest: Manifest, learned: dict[str, Any], evaluated: Manifest | None) -> str:
    lines = [
        # its name alone: the card goes to others, whom the folders of this machine do not concern
        f"- shard set {markdown(Path(config.data.root).name)}, content hash "
        f"{markdown(manifest.consumed.get('data', '')[:16])}",
        f"- segment learned from {learned.get('photos', 'the')} photos of the split {markdown(config.data.mask_split)}",
    ]
    if own := [stage.name for stage in cam_stages() if stage.name in config.stages]:
        lines.append(f"- {', '.join(own)} learned from the image-level labels of {markdown(config.data.train_split)}")
    if evaluated:
        about = evaluated.results
        where = markdown(about.get("split", "?"))
        lines.append(f"- evaluated on {about.get('photos', '?')} photos of the split {where}")
    return "\n".join(lines)


def _recipe(config: Config, info: ModelInfo, manifest: Manifest) -> str:
    own = config.section(SegmentConfig)
    versions = ", ".join(markdown(f"{name} {number}") for name, number in manifest.versions.items())
    lines = [
        f"- stages: {' -> '.join(config.stages)}",
        f"- segment: {own.duration}, {own.global_batch} photos a step, {own.optimizer}, learning rate {own.step_lr:g}, "
        f"ASPP times {own.head_lr:g}, crop {own.crop}, scale {own.scale[0]:g} to {own.scale[1]:g}, dilations "
        f"{', '.join(map(str, info.rates))}, {'class-balanced ' if own.balance else ''}cross entropy",
        f"- initial weights: {markdown(info.initial_weights)}",
        f"- seed {config.seed}, {info.precision}, {manifest.world_size} process(es), {versions}",
    ]
    return "\n".join(lines)


def _numbers(found: Mapping[str, Manifest], evaluated: Manifest | None) -> str:
    parts = [summary(found)]
    if evaluated and evaluated.last_scores:
        last = "with the CRF" if "crf" in evaluated.scores else "without a CRF"
        parts.append(f"DeepLab by class, {last}, in percent:\n\n{per_class(evaluated.last_scores)}")
    else:
        parts.append("DeepLab itself was not scored: no evaluation on a split with masks.")
    return "\n\n".join(parts)


def _limits(info: ModelInfo, evaluated: Manifest | None) -> str:
    lines = [
        "- It knows no other class: everything else is background, or the class that looks most like it.",
        f"- It learned from photos of about {info.photo_side} pixels: larger ones are made smaller before it looks at "
        "them, so that thin and small things get lost.",
    ]
    if info.masks != "truth":
        lines.append(
            "- Nobody drew the masks that it learned from. What always appears together with a class (rails with "
            "trains) may be taken for it, and parts without which the class can be told may be missing."
        )
    classes = evaluated.last_scores.classes if evaluated and evaluated.last_scores else {}
    found = {name: classes[name]["iou"] for name in info.classes if "iou" in classes.get(name, {})}
    if found:
        worst = min(found, key=lambda name: found[name])
        lines.append(f"- Weakest class: {markdown(worst)}, IoU {found[worst]:.1f}.")
    if evaluated and (absent := [name for name in info.classes if name not in found]):
        lines.append(f"- Not scored, for want of truth: {', '.join(map(markdown, absent))}.")
    lines.append("- The numbers hold for the split named above; nothing was measured on other photos.")
    return "\n".join(lines)
