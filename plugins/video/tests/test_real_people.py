"""The default tracker follows real people whom a real detector finds, whatever its threshold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import ovforge
from ovforge_video.trackers.matching import overlaps

DATA = Path(os.environ.get("OVFORGE_TEST_DATA", "../shared/data"))
SEQUENCE = DATA / "video/PETS09-S2L1"
FRAMES = 300


def idf1(truth: np.ndarray, frames: list[Any]) -> float:
    """Return IDF1 at an overlap of a half. Source: Ristani et al. 2016."""
    pairs: dict[tuple[int, int], int] = {}
    expected = given = 0
    for frame in frames:
        theirs = truth[truth[:, 0] == frame.number + 1]
        corners = np.column_stack([theirs[:, 2:4], theirs[:, 2:4] + theirs[:, 4:6]])
        for row, column in np.argwhere(overlaps(corners, frame.boxes) >= 0.5):
            key = int(theirs[row, 1]), int(frame.ids[column])
            pairs[key] = pairs.get(key, 0) + 1
        expected, given = expected + len(theirs), given + len(frame)
    people, ids = (sorted({key[side] for key in pairs}) for side in (0, 1))
    shared = np.zeros((len(people), len(ids)))
    for (person, number), count in pairs.items():
        shared[people.index(person), ids.index(number)] = count
    rows, columns = linear_sum_assignment(shared, maximize=True)
    return float(2 * shared[rows, columns].sum() / (expected + given))


@pytest.mark.skipif(not SEQUENCE.is_dir(), reason=f"{SEQUENCE} is not there (OVFORGE_TEST_DATA)")
@pytest.mark.parametrize(("threshold", "least"), [(0.35, 0.58), (0.5, 0.62)])
def test_real_people_keep_their_numbers_at_each_threshold(tmp_path: Path, threshold: float, least: float) -> None:
    (tmp_path / "nanodet.json").write_text(json.dumps({
        "input_preproc": [{"params": {
            "resize": "no-aspect-ratio", "color_space": "BGR", "scale": 1.0, "mean": [103.53, 116.28, 123.675],
            "std": [57.375, 57.12, 58.395],
        }}],
        "output_postproc": [{"converter": "nanodet", "labels": ["person", *(f"other {n}" for n in range(79))]}],
    }))  # fmt: skip
    config = {
        "task": {"use": "video"},
        "load": {
            "source": str(DATA.resolve() / "models/nanodet.xml"),
            "use": "model-proc",
            "proc": str(tmp_path / "nanodet.json"),
        },
        "device": {"use": "cpu", "hint": "throughput"},
        "input": {"video": str(SEQUENCE.resolve() / "vtest.avi"), "text": "person", "threshold": threshold},
    }
    pipe = ovforge.Pipeline.from_config(ovforge.PipelineConfig.of(config), cache=None)
    result: Any = pipe(video=str(SEQUENCE.resolve() / "vtest.avi"), end=(FRAMES - 0.5) / 10, threshold=threshold)
    frames: list[Any] = list(result.run())
    assert len(frames) == FRAMES
    truth = np.loadtxt(SEQUENCE / "gt.txt", delimiter=",")
    truth = truth[(truth[:, 6] != 0) & (truth[:, 0] <= FRAMES)]
    assert idf1(truth, frames) >= least
