"""Every tracker keeps the contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import ovforge_video
from ovforge import testing
from ovforge.model import Boxes
from ovforge_video.trackers.oc_sort import OcSort
from ovforge_video.trackers.options import OcSortOptions

TRACKERS = [each.name for each in ovforge_video.ovforge_trackers()]


def test_the_plugin_keeps_its_contract() -> None:
    testing.check_plugin(ovforge_video)


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize("per_class", [False, True])
def test_every_tracker_keeps_its_contract(name: str, per_class: bool) -> None:
    testing.check_tracker(ovforge_video, name, {"per_class": per_class})


def followed(name: str, boxes: Sequence[tuple[float, ...] | None], **options: Any) -> list[list[int]]:
    """Return the numbers in each picture of one thing, which is where `boxes` say, or not found."""
    described = testing.extension(ovforge_video, "tracker", name)
    tracker = described.create(described.options_model()(**options), 0.5)
    seen = []
    for number, box in enumerate(boxes):
        found = Boxes.none()
        if box is not None:
            found = Boxes(np.array([box], np.float32), np.full(1, 0.9, np.float32), np.zeros(1, np.int64))
        seen.append(tracker.update(found, np.zeros((200, 400, 3), np.uint8), number / 25).ids.tolist())
    return seen


def walk(number: float) -> tuple[float, ...]:
    """Return a box that goes to the right until picture 12, and back from there, behind something."""
    left = 20 + 6 * min(number, 24 - number)
    return left, 50, left + 30, 110


def test_oc_sort_finds_again_what_turned_while_it_was_hidden() -> None:
    boxes = [None if 10 <= number < 16 else walk(number) for number in range(24)]
    assert {number for ids in followed("sort", boxes, hits=1) for number in ids} == {1, 2}
    assert {number for ids in followed("oc-sort", boxes) for number in ids} == {1}


def test_what_comes_back_is_where_an_even_way_would_have_brought_it() -> None:
    """A thing that was hidden has the motion of one that was seen all along an even way."""
    hidden, seen = OcSort(OcSortOptions(hits=1), 0.5), OcSort(OcSortOptions(hits=1), 0.5)
    for number in range(25):
        end = 5.0 if number <= 9 else 10.0 if number >= 19 else 5.0 + (number - 9) / 2  # it slows down, out of sight
        box = np.array([(end * min(number, 9), 2 * end, end * min(number, 9) + 30, 60 + end)], np.float32)
        found = Boxes(box, np.full(1, 0.9, np.float32), np.zeros(1, np.int64))
        seen.update(found, None, number / 25)
        hidden.update(Boxes.none() if 9 < number < 19 else found, None, number / 25)
    for tracker in (hidden, seen):
        assert tracker._things.ids.tolist() == [1]
    np.testing.assert_allclose(hidden._things.motion.mean, seen._things.motion.mean, rtol=1e-5)
    np.testing.assert_allclose(hidden._things.motion.spread, seen._things.motion.spread, rtol=1e-4)


def test_oc_sort_lets_direction_decide_between_equal_overlaps() -> None:
    crossing = [((100 + 4 * n, 100, 130 + 4 * n, 160), (160 - 4 * n, 100, 190 - 4 * n, 160)) for n in range(14)]
    described = testing.extension(ovforge_video, "tracker", "oc-sort")
    tracker = described.create(described.options_model()(hits=1), 0.5)
    for number, pair in enumerate(crossing):
        found = Boxes(np.array(pair, np.float32), np.full(2, 0.9, np.float32), np.zeros(2, np.int64))
        tracks = tracker.update(found, None, number / 25)
    assert tracks.ids[np.argsort(tracks.rows)].tolist() == [1, 2]
