"""Things that leave and come back, told apart by an embedding, with any tracker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ovforge.errors import ConfigError
from ovforge_video.frame import Frame
from ovforge_video.options import ReidentifyOptions
from ovforge_video.reidentify import Identities, Reidentifier

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def embedder(folder: Path, gray: float = 1.0, **output: Any) -> Path:
    """Write a model whose embedding is the mean colour of a picture, less this share of its gray."""
    pixels = ops.parameter([1, 3, 4, 4], np.float32, name="image")
    means = ops.reduce_mean(pixels, np.array([2, 3]), False)
    apart = ops.subtract(means, ops.multiply(ops.reduce_mean(means, np.array([1]), True), np.float32(gray)))
    path = folder / "embed.xml"
    ov.save_model(ov.Model([apart], [pixels], "embed"), path, compress_to_fp16=False)
    path.with_suffix(".json").write_text(json.dumps({"output_postproc": [{"attribute_name": "look", **output}]}))
    return path


def frame(number: int, things: dict[int, str], seconds: float | None = None, left: int = 5) -> Frame:
    """Return a frame with things of these colours, by the tracker's numbers, side by side."""
    picture = np.full((40, 200, 3), 90, np.uint8)
    boxes = []
    for place, colour in enumerate(things.values()):
        x = left + 40 * place
        picture[5:35, x : x + 20] = COLOURS[colour]
        boxes.append((x, 5, x + 20, 35))
    count = len(things)
    return Frame(
        "s", number, number / 10 if seconds is None else seconds, (200, 40),
        np.array(boxes, np.float32).reshape(-1, 4), np.full(count, 0.9, np.float32), np.zeros(count, np.int64),
        np.array(list(things), np.int64), np.ones(count, np.bool_), ["thing"], picture=picture,
    )  # fmt: skip


@pytest.fixture
def identities(tmp_path: Path) -> Any:
    return lambda **options: Identities(Reidentifier(ReidentifyOptions(model=embedder(tmp_path), **options)))


def test_things_that_come_back_have_their_numbers_and_others_have_not(identities: Any) -> None:
    known = identities(memory=5)
    assert known(frame(0, {1: "red", 2: "green"})).ids.tolist() == [1, 2]
    assert known(frame(1, {2: "green"})).ids.tolist() == [2]
    back = known(frame(2, {2: "green", 3: "blue", 7: "red"}))
    assert back.ids.tolist() == [1, 2, 3]  # in their order, each with its own box
    reds = back.picture[20, back.boxes[:, 0].astype(int) + 10, 0].tolist()
    assert reds == [COLOURS[colour][0] for colour in ("red", "green", "blue")]
    assert known(frame(3, {})).ids.tolist() == []
    assert known(frame(4, {9: "blue"}, seconds=4.0)).ids.tolist() == [3]
    assert known(frame(5, {10: "red"}, seconds=9.0)).ids.tolist() == [4]  # forgotten after five seconds


def test_one_number_is_never_given_twice(identities: Any) -> None:
    known = identities()
    known(frame(0, {1: "red"}))
    known(frame(1, {}))
    assert known(frame(2, {2: "red", 3: "red"})).ids.tolist() == [1, 2]
    assert sorted(known(frame(3, {1: "red", 2: "red", 3: "red"})).ids.tolist()) == [1, 2, 3]  # the tracker's 1 is back


def test_a_square_that_hides_keeps_its_number_in_a_run(make: Any, folder: Path, tmp_path: Path) -> None:
    pipe = make(track={"use": "sort"})
    once = {number for one in pipe(video="a.mp4", loop=3) for number in one.ids.tolist()}
    assert once == {1, 2, 3}  # it jumps back to its beginning
    model = {"model": str(embedder(tmp_path, gray=0.5))}
    result = make(track={"use": "sort"}, reidentify=model)(video="a.mp4", loop=3)
    result.save(tmp_path / "o.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert {thing["id"] for line in lines for thing in line["objects"]} == {1}
    assert result.counts["things"] == {"square": 1}
    assert result.counts["seconds"]["reidentify"] > 0


def test_what_does_not_fit_is_refused(make: Any, tmp_path: Path) -> None:
    path = embedder(tmp_path, converter="label", labels=["a", "b", "c"])
    with pytest.raises(ConfigError, match="0 embeddings, not one"):
        make(reidentify={"model": str(path)})
    with pytest.raises(ConfigError, match="without a tracker"):
        make(reidentify={"model": str(path)}, track="none")
