"""`esol export`: a run's DeepLab for other programs: safetensors, torch.export, ONNX, an MLflow model, a model card."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from esol.base.errors import EsolError
from esol.base.files import atomic_write
from esol.base.strangers import content, printable
from esol.deploy.model import load_network
from esol.deploy.model_card import model_card
from esol.models.deeplab import DeepLab
from esol.models.regrid import pad_to_grid
from esol.pipeline import records
from esol.pipeline.model_file import describe, write_model
from esol.pipeline.weights import WEIGHTS
from esol.tracking.mlflow_model import save_mlflow_model

TOLERANCE = 1e-3  # largest difference of a probability between ONNX Runtime and PyTorch
_EXAMPLE, _OTHERS = (2, 60, 91), ((1, 96, 129), (3, 33, 50))  # photos, height, width


class Graph(nn.Module):
    """What leaves PyTorch: the network at one scale, for photos of any size.

    The photo's last row and column are repeated up to the next size of the network's grid, and cut off again; `predict`
    resizes by these few pixels instead, and adds scales, the mirror image and the CRF.
    """

    def __init__(self, net: DeepLab) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) RGB -> probabilities (B, L, H, W), background first."""
        padded = pad_to_grid(image, self.net.backbone.stride)
        size = (padded.shape[2], padded.shape[3])
        logits = F.interpolate(self.net(padded).float(), size, mode="bilinear", align_corners=True)
        rows, columns = (torch.arange(n, device=image.device) for n in image.shape[2:])  # as in pad_to_grid: no slices
        return logits[:, :, rows][:, :, :, columns].softmax(1)


def export(run_dir: Path, out: Path) -> None:
    """Writes the model of a run's finished segment stage into a new or empty folder, whole or not at all.

    EsolError where there is no such model or folder, or where an exported graph does not agree with PyTorch.
    """
    if not records.is_run(run_dir):
        raise EsolError(f"{run_dir} is no run directory: give the run_dir of a run with a finished segment stage")
    net, info = load_network(run_dir)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise EsolError(f"--out {out}: choose a new or an empty folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise EsolError(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    try:
        write_model(folder / WEIGHTS, net.state_dict(), info)
        atomic_write(folder / "config.json", json.dumps(describe(info), indent=1) + "\n")
        checks = _export_graphs(net, folder)
        print("MLflow model ...", flush=True)
        save_mlflow_model(folder / "mlflow", folder / WEIGHTS)
        copy_picture(run_dir, folder)
        atomic_write(folder / "README.md", model_card(run_dir, info, checks, (folder / "evaluate.png").exists()))
        folder.chmod(0o755)  # mkdtemp keeps others out
        os.replace(folder, out)
    except OSError as error:
        raise EsolError(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def copy_picture(run_dir: Path, folder: Path) -> None:
    """Copies the run's picture, as pixels: a link in its place could lead to any other file, and is left out."""
    picture = run_dir / "pictures" / "evaluate.png"
    if not picture.exists():
        return
    try:
        if not picture.resolve().is_relative_to(run_dir.resolve()):
            raise ValueError("it is a link that leads out of the run")
        with Image.open(io.BytesIO(content(picture)), formats=["PNG"]) as sheet:
            sheet.convert("RGB").save(folder / picture.name)
    except Exception as error:  # Pillow raises whatever a damaged file leads its parsers to
        print(f"{picture} is left out: {printable(str(error))}")


def _export_graphs(net: DeepLab, folder: Path) -> dict[str, str]:
    """Writes model.pt2 and, where ONNX is installed, model.onnx; file -> how it compares with PyTorch, in words."""
    graph, fixed = Graph(net).eval(), Graph(_with_fixed_padding(net)).eval()
    generator = torch.Generator().manual_seed(0)
    photos = [
        torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
        for count, height, width in (_EXAMPLE, *_OTHERS)
    ]
    print("torch.export ...", flush=True)
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)  # with bounds of ours it finds networks at fault
    with torch.no_grad():
        try:
            program = torch.export.export(fixed, (photos[0],), dynamic_shapes={"image": free})
            for part in program.graph_module.modules():
                for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
                    node.meta.pop("stack_trace", None)  # the places of files on this machine, in pt2 and onnx alike
        except Exception as error:  # what a network does that cannot be traced raises anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"model.pt2 and model.onnx are left out, torch.export cannot trace this network: {reason:.200}")
            return {}
        torch.export.save(program, folder / "model.pt2")
        loaded = torch.export.load(folder / "model.pt2").module()
        checks = {"model.pt2": _compare("model.pt2", graph, loaded, photos)}
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        print(f'model.onnx is left out, {", ".join(missing)} is missing: pip install -e ".[onnx]"')
        return checks
    print("ONNX ...", flush=True)
    checks["model.onnx"] = _export_onnx(program, graph, photos, folder / "model.onnx")
    return checks


def _with_fixed_padding(net: DeepLab) -> DeepLab:
    """A copy whose convolutions no longer pad by the size of what they get, as timm's tf_* networks do.

    On the network's grid, whose sides are a multiple of the stride plus one at every stage, that padding is always
    (kernel - 1) * dilation in all; what depends on the size cannot be written by torch.export.
    """
    net = copy.deepcopy(net)
    for parent in list(net.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Conv2d) and type(module).__name__ == "Conv2dSame":
                setattr(parent, name, _padded(module))
    return net


def _padded(convolution: nn.Conv2d) -> nn.Module:
    """Padding that is no even number, a kernel of 2 by 2 has it, has its larger half behind."""
    sides = [(k - 1) * d for k, d in zip(convolution.kernel_size, convolution.dilation, strict=True)]
    made = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size,  # type: ignore[arg-type]
        convolution.stride,  # type: ignore[arg-type]
        tuple(side // 2 for side in sides),  # type: ignore[arg-type]
        convolution.dilation,  # type: ignore[arg-type]
        convolution.groups,
        convolution.bias is not None,
    )
    made.load_state_dict(convolution.state_dict())
    return nn.Sequential(nn.ZeroPad2d((0, sides[1] % 2, 0, sides[0] % 2)), made) if any(s % 2 for s in sides) else made


def _export_onnx(program: torch.export.ExportedProgram, graph: Graph, photos: list[Tensor], path: Path) -> str:
    import onnxruntime

    torch.onnx.export(
        program,
        dynamo=True,
        f=path,
        input_names=["image"],
        output_names=["probabilities"],
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {"image": image.numpy()})[0]))

    return _compare("model.onnx", graph, run, photos)


@torch.no_grad()
def _compare(name: str, graph: Graph, other: Callable[[Tensor], Tensor], photos: list[Tensor]) -> str:
    """Largest difference of a probability, in words; EsolError where it is more than TOLERANCE."""
    worst = max(float((graph(photo) - other(photo)).abs().max()) for photo in photos)
    if not worst <= TOLERANCE:
        raise EsolError(
            f"{name} differs from PyTorch by {worst:.2g}, allowed is {TOLERANCE}: please report this network"
        )
    sizes = ", ".join("x".join(map(str, photo.shape)) for photo in photos)
    return f"probabilities within {worst:.1g} of PyTorch's on random photos of {sizes}"
