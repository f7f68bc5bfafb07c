"""The plugin keeps ovforge's contract, and whole pipelines run with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import ovforge
import pytest
from ovforge import testing
from ovforge.errors import ConfigError, InputError

import ovforge_my_plugin


@pytest.fixture
def pipeline(tmp_path: Path) -> ovforge.Pipeline:
    return make(tmp_path, labels=("cat", "dog", "bird"))


def make(folder: Path, **options: object) -> ovforge.Pipeline:
    """Return a pipeline with a small model, four numbers to three classes; nothing need be installed for it."""
    testing.small_bundle().save(folder / "model")
    plugins = ovforge.Plugins(found=())
    plugins.register(ovforge_my_plugin, "my-plugin")
    task = ovforge.Use("my-plugin", **options)
    device = ovforge.Use("cpu", precision="f32")
    return ovforge.Pipeline(task, source=folder / "model", device=device, plugins=plugins, cache=None)


def test_contract(pipeline: ovforge.Pipeline) -> None:
    testing.check_plugin(ovforge_my_plugin)
    testing.check_task(ovforge_my_plugin, "my-plugin", pipeline.task)


def test_the_label_is_that_of_the_largest_output(pipeline: ovforge.Pipeline, tmp_path: Path) -> None:
    features = (1.0, -2.0, 0.5, 3.0)
    result = pipeline(features)
    scores = testing.run(testing.small_model(), {"x": np.array([features], np.float32)})["y"][0]
    assert result.label == ("cat", "dog", "bird")[scores.argmax()]
    expected = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(list(result.probabilities.values()), expected, atol=1e-5)
    (file,) = result.save(tmp_path / "label.json")
    assert json.loads(file.read_text())["label"] == result.label
    assert pipeline.task.compare(result, result) == 1
    assert pipeline.task.compare(result, pipeline((-9.0, 0.0, 0.0, 0.0))) < 1


def test_what_does_not_fit_is_refused(pipeline: ovforge.Pipeline, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes 4 numbers, not 2"):
        pipeline((1.0, 2.0))
    with pytest.raises(ConfigError, match="3 classes, not 1"):
        make(tmp_path / "other", labels=("cat",))((1.0, 2.0, 3.0, 4.0))
