"""The plugin keeps ovforge's contract, and things keep their numbers."""

from __future__ import annotations

import numpy as np
import pytest
from ovforge import testing
from ovforge.model import Boxes

import ovforge_my_plugin


def boxes(*corners: tuple[float, ...]) -> Boxes:
    count = len(corners)
    return Boxes(np.array(corners, np.float32).reshape(-1, 4), np.ones(count, np.float32), np.zeros(count, np.int64))


def test_contract() -> None:
    testing.check_plugin(ovforge_my_plugin)
    testing.check_tracker(ovforge_my_plugin, "my-plugin")


@pytest.mark.parametrize(("overlap", "expected"), [(0.3, [1]), (0.9, [2])])
def test_a_thing_keeps_its_number_as_far_as_its_boxes_overlap(overlap: float, expected: list[int]) -> None:
    described = testing.extension(ovforge_my_plugin, "tracker", "my-plugin")
    tracker = described.create(described.options_model()(overlap=overlap), 0.5)
    picture = np.zeros((40, 40, 3), np.uint8)
    tracker.update(boxes((0, 0, 10, 10)), picture, 0.0)
    assert tracker.update(boxes((2, 0, 12, 10)), picture, 0.04).ids.tolist() == expected
