"""`ovforge video --demo`: the detector that ships follows emoji over a photograph, by text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ovforge.cli import app
from ovforge_video.demo import COUNT, _places


def test_the_demo_follows_each_thing_by_its_name(tmp_path: Path) -> None:
    pytest.importorskip("ovforge_grounding_dino")
    said = ["video", "--demo", "--end", "2.5", "--interval", "5", "-q"]
    done = CliRunner().invoke(app, [*said, "-o", str(tmp_path / "o.jsonl"), "--cache", str(tmp_path / "cache")])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert len(lines) == 30
    ids: dict[str, set[int]] = {}
    for thing in (thing for line in lines for thing in line["objects"]):
        ids.setdefault(thing["label"], set()).add(thing["id"])
    assert sorted(ids) == ["ball", "balloon", "bee", "car"]
    assert sorted(number for each in ids.values() for number in each) == [1, 2, 3, 4]
    for line in lines[10:26:5]:
        places = _places(line["frame"] / COUNT)
        for thing in line["objects"]:
            x, y = places[thing["label"]]
            left, top, right, bottom = thing["box"]
            assert (left + right) / 2 == pytest.approx(x, abs=12)
            assert (top + bottom) / 2 == pytest.approx(y, abs=16)
    refused = CliRunner().invoke(app, ["video", "--demo", "a.mp4"])
    assert refused.exit_code == 1
    assert "--demo brings its clip and model" in str(refused.exception or refused.output)
