"""Every tracker keeps the contract."""

from __future__ import annotations

import pytest

import ovforge_video
from ovforge import testing

TRACKERS = [each.name for each in ovforge_video.ovforge_trackers()]


def test_the_plugin_keeps_its_contract() -> None:
    testing.check_plugin(ovforge_video)


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize("per_class", [False, True])
def test_every_tracker_keeps_its_contract(name: str, per_class: bool) -> None:
    testing.check_tracker(ovforge_video, name, {"per_class": per_class})
