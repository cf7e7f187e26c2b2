"""What benchmarks.fuzz does to run directories that a stranger sent, and how it tells what they got away with.

Each case takes a small finished run (class maps, masks, a DeepLab and its evaluation, notes for MLflow), makes it
hostile in one way, and does with it what people do: reads its state, reports, writes its page, exports its masks,
predicts a photo and writes the model's card. Reported: one of them refuses it, in words. Harmless: all of them say what
they said of the whole run. Valid: they say something else, which is what the files say now. A miss is a byte outside
the run and the outputs that has changed, a file of outside that is inside an output, or a control character or markup
of the stranger's on a terminal, page or card.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.fuzz_kinds import Rng, any_bytes, exchange, make_set, remove_node, replace_node, shift_number

SECRET = "THE-SECRET-OF-ANOTHER-FOLDER"
PHOTOS = 3
MARKUP = "<img src=x onerror=alert(1)>"
TEXTS = (MARKUP, "</script><script>alert(1)</script>", "\x1b]0;owned\x07\x1b[31m", "../../outside", "/etc/passwd",
         "a\nb", "\u202egnp.exe", "\ud800", "$HOME", "x" * 10_000, "|", "[a](javascript:alert(1))")  # fmt: skip
SIGNS = {
    "terminal": ("\x1b", "\x07"),
    **dict.fromkeys(("html", "md", "xml"), (MARKUP, "<script>alert", "\x1b", "\x07")),
}
"""What must not be in a text as it stands, by its kind."""
VALUES: tuple[Any, ...] = (*TEXTS, 10**30, -1, 1e308, float("nan"), float("inf"), [[]] * 50, {"a": {"b": []}}, None)
Change = Callable[[Path, Rng], Any]


@cache
def whole(folder: Path) -> Path:
    """A shard set, and a run of it whose stages have finished, in a folder of their own; made once by a process."""
    from esol.config import DataConfig
    from esol.data.index import Index, write_index
    from esol.data.reader import ShardReader
    from esol.data.samples import encode_mask, write_mirror_shard
    from esol.pipeline.records import FORMAT, MANIFEST, Manifest, file_hash
    from esol.pipeline.registry import config_type, table
    from esol.pipeline.scores import Scores
    from esol.stages.segment import SegmentConfig

    root = folder / f"whole-{os.getpid()}"
    all_of_them = ShardReader(Index.load(make_set(root / "set")))
    members = all_of_them.index.members
    photos = (
        {"__key__": f"k{i}", **{ext: all_of_them.read(i, ext) for ext, rows in members.items() if rows[i, 0] >= 0}}
        for i in range(PHOTOS)
    )
    record = write_mirror_shard(root / "shards", "shard-000000.tar", photos)
    write_index(root / "shards", all_of_them.index.classes, {"train": [0, 1], "val": [2]}, [record])
    shutil.rmtree(root / "set")
    index = Index.load(root / "shards")
    reader, run = ShardReader(index), root / "run"
    data = DataConfig(root=str(root / "shards"), eval_split="val", mask_split="train", score_split="val")
    stages = ("classify", "localize", "seed_masks", "segment", "evaluate")
    config = config_type()(run_dir=str(run), data=data, stages=stages, segment=SegmentConfig(masks="seed_masks"))
    drawn = np.zeros((40, 56), np.uint8)
    drawn[5:30, 10:40] = 1

    def masks(i: int) -> dict[str, bytes]:
        return {"mask.png": encode_mask(drawn)}

    def maps(i: int) -> dict[str, bytes]:
        buffer = io.BytesIO()
        own = np.flatnonzero(reader.labels(i))
        np.savez_compressed(buffer, classes=own, full=np.zeros((len(own), 40, 56), np.uint8))
        return {"maps.npz": buffer.getvalue()}

    for name, members in {"localize": maps, "seed_masks": masks, "evaluate": masks}.items():
        samples = ({"__key__": str(key), **members(i)} for i, key in enumerate(index.keys))
        record = write_mirror_shard(run / name, "shard-000000.tar", samples)
        write_index(run / name, index.classes, index.splits, [record])
    (run / "segment").mkdir()
    _write_model(run / "segment" / "model.safetensors", index.classes)
    score = asdict(Scores("val", 50.0, 60.0, 70.0, 0.5, {"body_recall": 3.0}, {"fish": {"iou": 4.0, "recall": 5.0}}))
    results: dict[str, dict[str, Any]] = {
        "localize": {"write": "cam", "cam_judge": 1.5},
        "seed_masks": {"judge": 1.4, "lost": 3.0, "split": "val", "initial_weights": "random"},
        "segment": {"loss": 0.5, "photos": 9, "masks": "seed_masks"},
        "evaluate": {"photos": 3, "split": "val", "masks": "seed_masks", "judge": 1.3, "initial_weights": "random"},
    }
    makes, outputs = ("maps", "masks", "model", "predictions"), {"data": index.hash}
    for place, (name, own) in enumerate(results.items()):
        files = {p.name: {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in sorted((run / name).iterdir())}
        scored = {"cam" if name == "localize" else "plain": score} if name != "segment" else {}
        manifest = Manifest(
            name, place, makes[place], table()[name].version, "f", {}, dict(outputs), files, own | {"seconds": 3.0},
            {"scores": scored, "last": "plain"}, json.loads(json.dumps(asdict(config))), 1, {"torch": "2"}, "2026",
        )  # fmt: skip
        outputs[name] = manifest.output
        (run / name / MANIFEST).write_text(json.dumps({"format": FORMAT, **asdict(manifest)}))
    curve = [{"threshold": t / 10, "miou": 10.0 * t, "recall": 50.0, "precision": 40.0} for t in range(5)]
    (run / "localize" / "curves.json").write_text(json.dumps({"cam": curve}))
    (run / "evaluate" / "confusion.json").write_text(json.dumps(np.eye(len(index.classes) + 1, dtype=int).tolist()))
    lines = [{"time": 1.0 + i, "stage": "segment", "step": i, "metrics": {"loss": 1 / (i + 1)}} for i in range(6)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "mlflow.json").write_text(
        json.dumps({"uri": "beside the runs", "offset": 0, "identity": "", "parent": "abc", "stages": {}})
    )
    (run / "pictures").mkdir()
    Image.new("RGB", (64, 48), "teal").save(run / "pictures" / "evaluate.png")
    (root / "photos").mkdir()
    (root / "photos" / "one.jpg").write_bytes(reader.image(0))
    (root / "outside").mkdir()
    (root / "outside" / "secret").write_text(SECRET)
    return root


def _write_model(path: Path, classes: tuple[str, ...]) -> None:
    import torch

    from esol.config import BackboneConfig, CrfConfig, PredictionConfig
    from esol.models.backbones import build_backbone
    from esol.models.deeplab import DeepLab
    from esol.pipeline.model_file import ModelInfo, write_model

    torch.manual_seed(0)
    net = DeepLab(build_backbone(BackboneConfig("small", "none", output_stride=8)), len(classes) + 1, (6, 12))
    evaluate = PredictionConfig(scales=(1.0,), flip=False, crf=CrfConfig(iterations=0))
    write_model(path, net.state_dict(), ModelInfo(classes, "small", (6, 12), evaluate, 56, "seed_masks", "random"))


# Damage.


def _one(run: Path, pattern: str, rng: Rng) -> Path:
    found = sorted(run.glob(pattern))
    return found[int(rng.integers(len(found)))]


def of_file(pattern: str, change: Callable[[bytes, Rng], bytes], run: Path, rng: Rng) -> None:
    path = _one(run, pattern, rng)
    path.write_bytes(change(path.read_bytes(), rng))


def hostile(data: bytes, rng: Rng) -> bytes:
    """A value, or a key, becomes what a stranger would put there; of JSON, or of JSON lines."""
    head, _, rest = data.partition(b"\n")
    tree = json.loads(head if rest else data)
    places = list(_places(tree))
    node, key = places[int(rng.integers(len(places)))]
    if isinstance(node, dict) and rng.random() < 0.3:
        node[TEXTS[int(rng.integers(len(TEXTS)))]] = node.pop(key)
    else:
        node[key] = VALUES[int(rng.integers(len(VALUES)))]
    return json.dumps(tree).encode() + (b"\n" + rest if rest else b"")


def _places(node: Any) -> list[tuple[Any, Any]]:
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, child in list(inside) for place in [(node, key), *_places(child)]]


def odd_text(data: bytes, rng: Rng) -> bytes:
    texts = (b"[" * 10**6, b"[]", b"null", b"", b"\xff\xfe", b"1e999", b"9" * 5000, b'{"a":' * 50_000, b'{"format": 1}')
    return texts[int(rng.integers(len(texts)))]


def of_header(change: Callable[[bytes, Rng], bytes], data: bytes, rng: Rng) -> bytes:
    """Changes what the header of a safetensors file says of the network, and writes its length anew."""
    size = struct.unpack("<Q", data[:8])[0]
    tree = json.loads(data[8 : 8 + size])
    if rng.random() < 0.6:
        tree["__metadata__"]["esol"] = change(tree["__metadata__"]["esol"].encode(), rng).decode(errors="replace")
        text = json.dumps(tree).encode()
    else:
        text = change(json.dumps(tree).encode(), rng)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def header_length(data: bytes, rng: Rng) -> bytes:
    size = int(rng.choice(np.array([0, 1, 2**20, 2**30, 2**62], np.uint64)))
    return struct.pack("<Q", size) + data[8:]


def linked(run: Path, rng: Rng) -> None:
    """A file, or the folder of a stage, becomes a link to what is outside, or to what never ends."""
    files = [path for path in sorted(run.rglob("*")) if path.name != "manifest.json" or rng.random() < 0.3]
    path = files[int(rng.integers(len(files)))]
    outside = run.parent / "outside"
    targets = (outside / "secret", outside, outside / "nowhere", Path("/dev/zero"), Path("/dev/null"), path)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(targets[int(rng.integers(len(targets)))])


def piped(run: Path, rng: Rng) -> None:
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    path = files[int(rng.integers(len(files)))]
    path.unlink()
    os.mkfifo(path)


def planted(run: Path, rng: Rng) -> None:
    """Files that are written later stand there already, as links to outside or with scripts of the stranger's."""
    names = ("report.html", "report.html.tmp", "draw_first.csv", "report_files", "report_files/photos-0000.js")
    path = run / names[int(rng.integers(len(names)))]
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".js":
        path.write_text(f"ESOL.add(...[]);{MARKUP}")
    else:
        path.symlink_to(run.parent / "outside" / ("" if path.name == "report_files" else "secret"))


def huge(run: Path, rng: Rng) -> None:
    """A file of a terabyte, most of which is a hole: what is not read for its hash alone, and of a known size."""
    with open(_one(run, "*/*.json", rng), "r+b") as file:
        file.truncate(1 << 40)


# The commands.


@dataclass(frozen=True)
class RunKind:
    """Makes a run hostile and uses it; returns verdict and detail.

    vouched: the manifests have the hashes of what the files now hold, as a stranger who means it would write them.
    """

    change: Change
    vouched: bool = False

    def __call__(self, scratch: Path, rng: Rng) -> tuple[str, str]:
        root = Path(shutil.copytree(whole(scratch.parent), scratch / "case", symlinks=True))
        for path in (root / "run").glob("*/manifest.json"):  # the run's photos are those of the copy
            path.write_text(path.read_text().replace(str(whole(scratch.parent)), str(root)))
        self.change(root / "run", rng)
        if self.vouched and rng.random() < 0.8:
            _vouch(root / "run")
        before = _tree(root, "run", "out")
        said, refused = use(root / "run", root / "photos", root / "out")
        changed = sorted(name for name, data in _tree(root, "run", "out").items() if before.get(name) != data)
        if changed or before.keys() - _tree(root, "run", "out").keys():
            return "miss", f"written outside: {', '.join(changed)}"
        pages = [root / "run" / "report.html", *sorted((root / "out").rglob("*"))]
        pages = [path for path in pages if path.is_file() and not path.is_symlink()]
        texts = {"terminal": said} | {path.name: path.read_text(errors="replace") for path in pages}
        for place, text in texts.items():
            signs = [SECRET, *SIGNS.get(place.rpartition(".")[2], ())]
            if bad := [sign for sign in signs if sign in text]:
                return "miss", f"{bad[0]!r} in {place}: {text[max(0, text.index(bad[0]) - 60) :][:200]!r}"
        if refused:
            return "reported", refused[0][:200]
        same = said.replace(str(root), "") == _said(whole(scratch.parent))
        return ("harmless" if same else "valid"), ""


@cache
def _said(root: Path) -> str:
    """What is said of the whole run."""
    copy = Path(shutil.copytree(root, root.parent / f"copy-{os.getpid()}"))
    for path in (copy / "run").glob("*/manifest.json"):
        path.write_text(path.read_text().replace(str(root), str(copy)))
    said, refused = use(copy / "run", copy / "photos", copy / "out")
    if refused:
        raise AssertionError(f"the whole run is refused: {refused[0]}")
    return said.replace(str(copy), "")


def _vouch(run: Path) -> None:
    from esol.base.files import sha256
    from esol.pipeline.records import Manifest

    made: dict[str, str] = {}
    for name in ("localize", "seed_masks", "segment", "evaluate"):
        tree = json.loads((run / name / "manifest.json").read_text())
        for file, about in tree["outputs"].items():
            if (path := run / name / file).is_file():
                about |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
        tree["consumed"] |= {other: output for other, output in made.items() if other in tree["consumed"]}
        (run / name / "manifest.json").write_text(json.dumps(tree))
        tree.pop("format")
        made[name] = Manifest(**tree).output


def use(run: Path, photos: Path, out: Path) -> tuple[str, list[str]]:
    """All that is printed by what people do with a run, and the errors by which some of it was refused."""
    from esol.base.errors import EsolError
    from esol.base.strangers import lines
    from esol.data.index import Index
    from esol.data.reader import ShardReader
    from esol.deploy.export import copy_picture
    from esol.deploy.export_masks import export_masks
    from esol.deploy.model import load_network
    from esol.deploy.model_card import model_card
    from esol.deploy.predict import predict
    from esol.pipeline import records
    from esol.pipeline.registry import table
    from esol.pipeline.store import Store
    from esol.report.page.page import write_page
    from esol.report.tables import aligned, results_table, short_report

    def states() -> None:
        config = records.ran_with(run, "evaluate", "segment")
        store = Store(config, table(), Index.load(config.data.root).hash)
        for name in config.stages:
            store.state(name)

    def page() -> None:
        config = records.ran_with(run, "evaluate", "segment", "seed_masks")
        index = Index.load(config.data.root)
        with contextlib.suppress(Exception):  # as job._page: nothing that befalls the page ends a run
            write_page(run, config, index, ShardReader(index), lambda doing: None)

    def masks() -> None:
        print(lines("\n".join(export_masks(run, "cvat", out / "masks"))))

    def card() -> None:
        _, info = load_network(run)
        (out / "card").mkdir()
        copy_picture(run, out / "card")
        (out / "card" / "README.md").write_text(model_card(run, info, {}, pictured=True))

    steps: tuple[Callable[[], Any], ...] = (
        lambda: print(lines(aligned(short_report(run)))),
        lambda: print(lines(results_table(run))),
        states,
        page,
        masks,
        lambda: predict(run, photos, out / "predicted"),
        card,
    )
    out.mkdir()
    said, refused = io.StringIO(), []
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        for step in steps:
            try:
                step()
            except EsolError as error:
                refused.append(str(error))
                print(lines(f"error: {error}"))
    return said.getvalue(), refused


def _tree(root: Path, *without: str) -> dict[str, bytes]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()]
    names = {str(path.relative_to(root)): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if name.split("/")[0] not in without}


def _of(pattern: str, change: Callable[[bytes, Rng], bytes]) -> RunKind:
    return RunKind(partial(of_file, pattern, change), vouched="manifest" not in pattern)


_MODEL = "segment/model.safetensors"
RUNS: dict[str, RunKind] = {
    "run, manifest: bytes": _of("*/manifest.json", any_bytes),
    "run, manifest: remove a field": _of("*/manifest.json", remove_node),
    "run, manifest: other type": _of("*/manifest.json", replace_node),
    "run, manifest: shift a number": _of("*/manifest.json", shift_number),
    "run, manifest: hostile": _of("*/manifest.json", hostile),
    "run, manifest: odd text": _of("*/manifest.json", odd_text),
    "run, index of a stage: hostile": _of("*/index.json", hostile),
    "run, index of a stage: exchange": _of("*/index.json", exchange),
    "run, shard of a stage: bytes": _of("*/*.tar", any_bytes),
    "run, curves and confusion: hostile": _of("*/c*.json", hostile),
    "run, curves and confusion: odd text": _of("*/c*.json", odd_text),
    "run, metrics.jsonl: bytes": _of("metrics.jsonl", any_bytes),
    "run, metrics.jsonl: hostile": _of("metrics.jsonl", hostile),
    "run, metrics.jsonl: odd text": _of("metrics.jsonl", odd_text),
    "run, picture: bytes": _of("pictures/*.png", any_bytes),
    "run, model: bytes": _of(_MODEL, any_bytes),
    "run, model: header's length": _of(_MODEL, header_length),
    "run, model: header hostile": _of(_MODEL, partial(of_header, hostile)),
    "run, model: header bytes": _of(_MODEL, partial(of_header, any_bytes)),
    "run: a link": RunKind(linked),
    "run: a pipe": RunKind(piped),
    "run: planted": RunKind(planted),
    "run: a terabyte": RunKind(huge),
}
