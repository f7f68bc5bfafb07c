"""The detector that ships: its size, what it finds on scenes that training has not seen, and transformers' numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import ovforge
import ovforge_grounding_dino
from ovforge.cache import Cache
from ovforge.cli import app
from ovforge.errors import InputError
from ovforge.pipeline import Pipeline

PACKAGE = Path(ovforge_grounding_dino.__file__).parent
DATA = Path(__file__).parent / "data"
TRUTH = json.loads((DATA / "scenes" / "truth.json").read_text())
LIMIT = 12_000_000


def open_model(cache: Path, **stages: Any) -> Pipeline:
    device = ovforge.Use("cpu", precision="f32")
    return Pipeline("detect", source=ovforge_grounding_dino.EMBEDDED_MODEL, device=device, cache=Cache(cache), **stages)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return open_model(tmp_path_factory.mktemp("embedded"))


def mean_average_precision(pipe: Pipeline) -> float:
    """Return mAP at an overlap of 0.5 over the held-out scenes, all names asked for at once."""
    import supervision
    from supervision.metrics import MeanAveragePrecision

    metric = MeanAveragePrecision()
    for file, things in TRUTH["scenes"].items():
        found = pipe(DATA / "scenes" / file, text=TRUTH["names"], threshold=0.01).detections[0]
        wanted = np.array([thing["box"] for thing in things], np.float32).reshape(-1, 4)
        kinds = np.array([TRUTH["names"].index(thing["name"]) for thing in things], int)
        predicted = supervision.Detections(xyxy=found.boxes, confidence=found.scores, class_id=found.classes)
        metric.update(predicted, supervision.Detections(xyxy=wanted, class_id=kinds))
    return float(metric.compute().map50)


def test_it_is_small_and_brings_its_card_and_notice() -> None:
    files = [path for path in (PACKAGE / "model").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT
    assert {"README.md", "NOTICE"} <= {path.name for path in files}


def test_it_finds_what_is_in_scenes_that_training_has_not_seen(pipe: Pipeline) -> None:
    seen = {thing["name"] for things in TRUTH["scenes"].values() for thing in things}
    assert len(seen) >= 40
    assert mean_average_precision(pipe) >= 0.7


def test_the_demo(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    result = CliRunner().invoke(app, ["detect", "--demo", "-o", str(output), "--cache", str(tmp_path / "cache")])
    assert result.exit_code == 0, result.output
    coco = json.loads(output.read_text())
    names = {category["id"]: category["name"] for category in coco["categories"]}
    found = sorted(names[each["category_id"]] for each in coco["annotations"])
    assert {"balloon", "car", "cloud", "dog", "horse", "house", "sun", "tree"} <= set(found)


def test_without_pictures_it_names_the_demo() -> None:
    result = CliRunner().invoke(app, ["detect"])
    assert result.exit_code != 0
    assert isinstance(result.exception, InputError)
    assert "--demo" in str(result.exception.hint)
