"""The model card of an exported model, written from what its run left behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esol.base.errors import CheckpointError
from esol.config import Config, EvaluateConfig
from esol.deploy.segmenter import ModelInfo
from esol.pipeline import store
from esol.report.tables import per_class, summary

FILES = {
    "model.safetensors": "weights; the header says how to build the network (esol.deploy.segmenter.load_model)",
    "config.json": "the header again, for people",
    "model.pt2": "torch.export: uint8 photos (B, 3, H, W), RGB, sides of at least 9 -> probabilities (B, labels, H, W)",
    "model.onnx": "the same for ONNX Runtime: `image` -> `probabilities`",
    "mlflow": "MLflow model: a photo's bytes -> its mask (base64 of a PNG) and class shares (JSON)",
}


def model_card(run_dir: Path, info: ModelInfo, checks: Mapping[str, str], pictured: bool) -> str:
    """Markdown: use, data, recipe, initial weights, numbers per class, limits.

    checks: exported graph -> how it compares with PyTorch; pictured: whether evaluate.png lies beside the card.
    """
    results, manifest = store.results(run_dir), store.need(run_dir, "segment")
    name, config = run_dir.resolve().name, manifest.ran_with
    stale = store.outdated(run_dir)
    if stale:
        raise CheckpointError(f"{run_dir} is not of one piece: {'; '.join(stale)}. Run it to its end, then export it")
    learned, scores = results["segment"], results.get("evaluate", {})
    source = "true masks" if info.masks == "truth" else f"pseudo masks ({info.masks}) that image-level labels led to"
    parts = [
        f"# {name}: DeepLab-v2 on {info.backbone}\n\n"
        f"Labels every pixel of a photo as background or one of {len(info.classes)} classes: "
        f"{', '.join(info.classes)}. It learned from {source}. Written by `esol export` from the run {name}, finished "
        f"{manifest.finished}.",
        "![photos of the evaluation split, predictions, truth](evaluate.png)" if pictured else "",
        f"## Use\n\n{_usage(checks, info.evaluate)}",
        f"## Data\n\n{_data(config, manifest, learned, scores)}",
        f"## Recipe\n\n{_recipe(config, info, manifest)}",
        f"## Numbers\n\n{_numbers(results, scores)}",
        f"## Limits\n\n{_limits(info, scores)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _usage(checks: Mapping[str, str], test: EvaluateConfig) -> str:
    graphs = ("model.pt2", "model.onnx")
    rows = [f"| {name} | {about} |" for name, about in FILES.items() if name in checks or name not in graphs]
    files = "\n".join(["| file | what it is |", "|---|---|", *rows])
    notes = [
        "    esol predict . photos/ --out predictions",
        "    mlflow models serve -m mlflow --env-manager local --host 127.0.0.1 --port 5001",
        "`esol predict` and the MLflow model make larger photos as large as those it learned from, and use scales "
        f"{', '.join(f'{scale:g}' for scale in test.scales)}{', the mirror image' if test.flip else ''}"
        f"{' and the dense CRF' if test.crf.iterations else ''}. The graphs (pt2, onnx) are the network at one scale.",
    ]
    return "\n\n".join([files, *notes, *(f"{name}: {text}." for name, text in checks.items())])


def _data(config: Config, manifest: store.Manifest, learned: dict[str, Any], scores: dict[str, Any]) -> str:
    lines = [
        f"- shard set {config.data.root}, content hash {manifest.consumed['data'][:16]}",
        f"- segment learned from {learned.get('photos', 'the')} photos of the split {config.data.mask_split}",
    ]
    if own := [stage for stage in ("classify", "decide", "expand", "shrink") if stage in config.stages]:
        lines.append(f"- {', '.join(own)} learned from the image-level labels of {config.data.train_split}")
    if scores:
        lines.append(f"- evaluated on {scores['photos']} photos of the split {scores['split']}")
    return "\n".join(lines)


def _recipe(config: Config, info: ModelInfo, manifest: store.Manifest) -> str:
    own = config.segment
    versions = ", ".join(f"{name} {number}" for name, number in manifest.versions.items())
    lines = [
        f"- stages: {' -> '.join(config.stages)}",
        f"- segment: {own.duration}, {own.global_batch} photos a step, {own.optimizer}, learning rate {own.step_lr:g}, "
        f"ASPP times {own.head_lr:g}, crop {own.crop}, scale {own.scale[0]:g} to {own.scale[1]:g}, dilations "
        f"{', '.join(map(str, info.rates))}, {'class-balanced ' if own.balance else ''}cross entropy",
        f"- initial weights: {info.initial_weights}",
        f"- seed {config.seed}, {config.engine.precision}, {manifest.world_size} process(es), {versions}",
    ]
    return "\n".join(lines)


def _numbers(results: dict[str, dict[str, Any]], scores: dict[str, Any]) -> str:
    parts = [summary(results)]
    if "plain_miou" in scores:
        last = "with the CRF" if "crf_miou" in scores else "without a CRF"
        parts.append(f"DeepLab by class, {last}, in percent:\n\n{per_class(scores)}")
    else:
        parts.append("DeepLab itself was not scored: no evaluation on a split with masks.")
    return "\n\n".join(parts)


def _limits(info: ModelInfo, scores: dict[str, Any]) -> str:
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
    found = {name: iou for name in info.classes if (iou := scores.get(f"iou_{name}")) is not None}
    if found:
        worst = min(found, key=lambda name: found[name])
        lines.append(f"- Weakest class: {worst}, IoU {found[worst]:.1f}.")
    if scores and (absent := [name for name in info.classes if name not in found]):
        lines.append(f"- Not scored, for want of truth: {', '.join(absent)}.")
    lines.append("- The numbers hold for the split named above; nothing was measured on other photos.")
    return "\n".join(lines)
