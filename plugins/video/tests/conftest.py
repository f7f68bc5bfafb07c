"""Clips and a detector, made once; pipelines of the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ovforge
from clips import write_clip, write_detector


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with four clips, a.mp4 to d.mp4, and the detector."""
    made = tmp_path_factory.mktemp("video")
    write_detector(made)
    for shift, name in enumerate("abcd"):
        write_clip(made / f"{name}.mp4", 24 - shift, 3 * shift)
    return made


@pytest.fixture(scope="session")
def make(folder: Path) -> Any:
    """Return what makes a pipeline of the task with these options."""

    def pipeline(**task: Any) -> ovforge.Pipeline:
        config = {
            "task": {"use": "video", **task},
            "load": {"source": "square.xml", "use": "model-proc", "proc": "square.json"},
            "device": {"use": "cpu", "precision": "f32", "streams": 2},
            "input": {"video": "a.mp4"},
        }
        return ovforge.Pipeline.from_config(ovforge.PipelineConfig.of(config), base=folder, cache=None)

    return pipeline


@pytest.fixture(scope="session")
def pipe(make: Any) -> ovforge.Pipeline:
    return make()
