"""A stage whose code gives another result has another version, so that what its earlier code made is made again.

golden.json has each stage's version and a few numbers of what it makes of the tiny run. Where one differs, raise the
stage's `version` in esol/stages and record again:

    ESOL_RECORD_GOLDEN=1 python -m pytest tests/end_to_end/test_versions.py
"""

import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from esol.data.index import Index
from esol.data.reader import ShardReader
from esol.pipeline.config_file import load
from esol.pipeline.registry import table

# rounds share the sections of segment and evaluate, and their code; the tiny run has none
STAGES = {name: stage for name, stage in table().items() if not stage.shares}

GOLDEN = Path(__file__).with_name("golden.json")
# of the root mean square of weights, of a map's range, of all pixels: processors and numbers of ranks differ by less
WEIGHTS, MAPS, MASKS = 3e-4, 2e-3, 5e-4


def numbers(folder: Path) -> list[float]:
    """Eight projections of a network's weights; the mean of every class map; the share of each label in all masks."""
    if (folder / "model.safetensors").exists():
        state = load_file(folder / "model.safetensors")
        flat = np.concatenate([state[key].ravel().astype(np.float64) for key in sorted(state)])
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (8, len(flat)))
        scale = np.sqrt(np.mean(flat**2) * len(flat))
        return (signs @ flat / scale).tolist()
    reader = ShardReader(Index.load(str(folder)))
    (member,) = reader.index.members.keys() - {"seen.npz"}  # which is for people
    samples = [BytesIO(reader.read(ordinal, member)) for ordinal in range(len(reader.index))]
    if member.endswith(".png"):
        labels = np.concatenate([np.asarray(Image.open(sample)).ravel() for sample in samples])
        return (np.bincount(labels, minlength=256)[[0, 1, 2, 3, 4, 5, 255]] / labels.size).tolist()
    return [float(mean) / 255 for sample in samples for mean in np.load(sample)["full"].mean((1, 2))]


def differs(stage: str, ours: list[float], golden: list[float]) -> bool:
    made = STAGES[stage].produces
    tolerance = WEIGHTS if "model.safetensors" in made else MAPS if stage == "localize" else MASKS
    return len(ours) != len(golden) or not np.allclose(ours, golden, rtol=0, atol=tolerance)


def changed_without_a_version(
    ours: dict[str, dict[str, Any]], golden: dict[str, dict[str, Any]], reads: dict[str, tuple[str, ...]]
) -> list[str]:
    """Stages whose numbers changed though their version and what they read did not."""
    moved: set[str] = set()
    found = []
    for name, own in ours.items():
        was = golden.get(name)
        if was is None or own["version"] != was["version"] or set(reads[name]) & moved:
            moved.add(name)
        elif differs(name, own["numbers"], was["numbers"]):
            moved.add(name)
            found.append(name)
    return found


def test_a_changed_output_has_a_new_version(config: Path, one: Path) -> None:
    ours = {n: {"version": s.version, "numbers": [round(x, 5) for x in numbers(one / n)]} for n, s in STAGES.items()}
    if os.environ.get("ESOL_RECORD_GOLDEN"):
        lines = (f"{json.dumps(n)}: {json.dumps(own)}" for n, own in ours.items())
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    golden = json.loads(GOLDEN.read_text())
    settings = load(config)
    reads = {name: stage.consumes(settings) for name, stage in STAGES.items()}
    found = changed_without_a_version(ours, golden, reads)
    assert not found, f"{', '.join(found)}: other results; raise the version in esol/stages, then: {__doc__}"
    old = [name for name, own in ours.items() if own["version"] != golden.get(name, {}).get("version")]
    assert not old, f"golden.json has another version of {', '.join(old)}: {__doc__}"


@pytest.mark.parametrize("stage", ["classify", "localize", "irn_masks"])
def test_the_check_sees_a_small_change_and_names_its_stage_alone(one: Path, config: Path, stage: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    reads = {name: stage.consumes(load(config)) for name, stage in STAGES.items()}
    behind = [stage, *(name for name in STAGES if stage in reads[name])]
    changed = {n: {**own, "numbers": [x + 0.01 * (n in behind) for x in own["numbers"]]} for n, own in golden.items()}
    assert changed_without_a_version(changed, golden, reads) == [stage]
    changed[stage]["version"] += 1
    assert changed_without_a_version(changed, golden, reads) == []
