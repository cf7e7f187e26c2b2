"""Exported masks in the hands of the tools that they are for: pip install -e '.[importers]' and run this file."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_export_masks import CLASSES, SIZE, by_class, overlap, write


def test_ultralytics_reads_polygons_and_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ultralytics", reason="comes with esol[importers]")
    from ultralytics.data.dataset import SemanticDataset, YOLODataset
    from ultralytics.data.utils import check_det_dataset

    monkeypatch.chdir(tmp_path)  # data.yaml is found from anywhere
    folder, mask, _ = write(tmp_path, "yolo")
    data = check_det_dataset(str(folder / "data.yaml"))
    assert data["names"] == dict(enumerate(CLASSES))
    (label,) = YOLODataset(img_path=data["train"], data=data, task="segment", augment=False).labels
    shown = [
        (int(number) + 1, (segment * (SIZE[1], SIZE[0])).tolist())
        for number, segment in zip(label["cls"].ravel(), label["segments"], strict=True)
    ]
    for number in (1, 2):
        assert overlap(by_class(shown, number), mask == number) >= 0.98
    folder, mask, _ = write(tmp_path, "ultralytics")
    data = check_det_dataset(str(folder / "data.yaml"))
    found = SemanticDataset(img_path=data["val"], data=data, task="semantic", augment=False, imgsz=SIZE[1])
    assert np.array_equal(found.load_mask(0), mask)


def test_cvats_own_library_reads_its_masks(tmp_path: Path) -> None:
    datumaro = pytest.importorskip("datumaro", reason="comes with esol[importers]")
    folder, mask, _ = write(tmp_path, "cvat")
    read = datumaro.Dataset.import_from(str(folder), "cvat")
    names = [category.name for category in read.categories()[datumaro.AnnotationType.label]]
    for item in read:
        found = np.zeros(SIZE, np.uint8)
        for part in item.annotations:
            found[np.asarray(part.image).astype(bool)] = CLASSES.index(names[part.label]) + 1
        assert np.array_equal(found, np.where(mask == 255, 0, mask))
    assert {item.id for item in read} == {"one", "two"}


def test_label_studios_own_library_accepts_config_and_predictions(tmp_path: Path) -> None:
    interface = pytest.importorskip("label_studio_sdk.label_interface", reason="comes with esol[importers]")
    folder, _, _ = write(tmp_path, "labelstudio")
    config = interface.LabelInterface((folder / "labels.xml").read_text())
    config.validate()
    for task in json.loads((folder / "tasks.json").read_text()):
        for prediction in task["predictions"]:
            assert config.validate_prediction(prediction, return_errors=True) == []
