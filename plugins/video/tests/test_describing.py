"""A second model on each thing: the numbers of its input, its turn, and where its results go."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ovforge.errors import ConfigError, ModelError
from ovforge_video.describing import Describer
from ovforge_video.drawing import Overlay
from ovforge_video.gst import parse_line
from ovforge_video.options import DescribeOptions, OverlayOptions

PROC: dict[str, Any] = {
    "input_preproc": [{"params": {"color_space": "RGB", "range": [0, 1], "mean": [0.1, 0.2, 0.3], "std": [0.5]}}],
    "output_postproc": [
        {"layer_name": "means", "attribute_name": "colour", "converter": "label", "method": "max", "labels": ["r", "g", "b"]},
        {"layer_name": "grey", "attribute_name": "grey", "converter": "tensor_to_text", "tensor_to_text_scale": 100},
        {"layer_name": "means", "attribute_name": "all"},
    ],
}  # fmt: skip


def classifier(folder: Path, proc: dict[str, Any] = PROC, side: int = 8) -> Path:
    """Write a model that says the mean of each channel, and of all."""
    pixels = ops.parameter([1, 3, side, side], np.float32, name="image")
    means = ops.reduce_mean(pixels, np.array([2, 3]), False)
    grey = ops.reduce_mean(means, np.array([1]), True)
    means.output(0).set_names({"means"})
    grey.output(0).set_names({"grey"})
    path = folder / "colours.xml"
    ov.save_model(ov.Model([means, grey], [pixels], "colours"), path, compress_to_fp16=False)
    path.with_suffix(".json").write_text(json.dumps(proc))
    return path


def proc_with(**params: Any) -> dict[str, Any]:
    """Return PROC with more said of its input."""
    (preparation,) = PROC["input_preproc"]
    return {**PROC, "input_preproc": [{"params": {**preparation["params"], **params}}]}


def test_the_input_is_prepared_as_described(tmp_path: Path) -> None:
    describer = Describer(DescribeOptions(model=classifier(tmp_path)), "describe")
    request = describer.request()
    for size in ((8, 8), (16, 8), (3, 40)):
        shade = np.random.default_rng(size[0]).integers(0, 255, 3)
        found = describer.describe(request, np.broadcast_to(shade, (*size, 3)).astype(np.uint8))
        expected = (shade / 255 - (0.1, 0.2, 0.3)) / 0.5
        np.testing.assert_allclose(found["all"]["data"], expected, atol=0.02)
        assert found["colour"]["label"] == "rgb"[int(expected.argmax())]
        assert found["grey"]["value"] == pytest.approx(100 * expected.mean(), abs=2)
    first = proc_with(reshape_size=[8, 8])
    unsized = Describer(DescribeOptions(model=classifier(tmp_path, first, side=-1)), "describe")
    assert unsized.describe(unsized.request(), np.full((5, 7, 3), 40, np.uint8)) == describer.describe(
        request, np.full((5, 7, 3), 40, np.uint8)
    )
    with pytest.raises(ModelError, match="height and width are open"):
        Describer(DescribeOptions(model=classifier(tmp_path, side=-1)), "describe")
    swapped = classifier(tmp_path, {**PROC, "input_preproc": []})  # DL Streamer's default: BGR, 0 to 255
    describer = Describer(DescribeOptions(model=swapped), "describe")
    found = describer.describe(describer.request(), np.full((4, 4, 3), (200, 100, 50), np.uint8))
    np.testing.assert_allclose(found["all"]["data"], [50, 100, 200], atol=1)


def test_methods_of_labels(tmp_path: Path) -> None:
    def say(**output: Any) -> Any:
        proc = {"output_postproc": [{"layer_name": "means", "attribute_name": "x", "converter": "label", **output}]}
        describer = Describer(DescribeOptions(model=classifier(tmp_path, proc)), "describe")
        return describer.describe(describer.request(), np.full((8, 8, 3), (3, 0, 2), np.uint8))["x"]

    names = ["b", "g", "r"]
    softmax = np.exp(3) / np.exp([2, 0, 3]).sum()
    assert say(method="softmax", labels=names) == {"label": "r", "score": pytest.approx(softmax, abs=0.01)}
    assert say(method="compound", labels=names, threshold=1.5) == {"label": "b, r", "score": pytest.approx(2, abs=0.02)}
    assert say(method="index", labels=names) == {"label": "r"}
    assert say(method="max", labels=["b"])["label"] == "class 2"


def test_each_thing_is_described_in_turn_and_results_go_everywhere(
    make: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []
    describe = Describer.describe

    def counted(self: Describer, request: Any, part: Any) -> Any:
        calls.append(part.shape)
        return describe(self, request, part)

    monkeypatch.setattr(Describer, "describe", counted)
    path = classifier(tmp_path)
    pipe = make(describe=[{"model": str(path), "every": 8}, {"model": str(path), "labels": ["other"]}])
    names = ["o.jsonl", "o.csv", "o.json"]
    frames: list[Any] = []
    pipe(video="a.mp4").write([tmp_path / name for name in names], frames.append)
    assert len(calls) == 3  # 22 frames with the thing: the first, the ninth, the seventeenth
    assert all(abs(side - 16) <= 4 for shape in calls for side in shape[:2])
    things = [
        thing for line in (tmp_path / "o.jsonl").read_text().splitlines() for thing in json.loads(line)["objects"]
    ]
    grey = [thing["details"]["grey"]["value"] for thing in things]
    assert len(grey) == 22
    assert grey == pytest.approx([100 * (0.9 - 0.2) / 0.5] * 22, rel=0.15)
    coco = json.loads((tmp_path / "o.json").read_text())["annotations"]
    assert [each["attributes"] for each in coco] == [thing["details"] for thing in things]
    rows = list(csv.DictReader((tmp_path / "o.csv").open()))
    assert f"grey={grey[0]:.2f}" in rows[0]["details"]
    last = frames[-1]
    assert last.to_supervision().data["details"][0] == things[-1]["details"]
    plain, drawn = (Overlay(OverlayOptions(details=shown))(last) for shown in (False, True))
    assert (plain != drawn).any()
    bare = list(make(describe=[{"model": str(path), "every": 8}], track="none", interval=1)(video="a.mp4"))
    assert sum(len(frame) for frame in bare) == sum("grey" in each for frame in bare for each in frame.details) == 24


@pytest.mark.parametrize(
    ("proc", "said"),
    [
        ({"output_postproc": []}, "output_postproc"),
        ({"output_postproc": [{"layer_name": "none"}]}, "no output 'none'"),
        ({"output_postproc": [{"layer_name": "means", "converter": "label"}]}, "labels are missing"),
        ({"output_postproc": [{"layer_name": "means"}] * 2}, "two outputs are called 'means'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, proc: dict[str, Any], said: str) -> None:
    path = classifier(tmp_path, proc)
    with pytest.raises((ModelError, ConfigError), match=said):
        Describer(DescribeOptions(model=path), "describe")
    path.with_suffix(".json").unlink()
    with pytest.raises(ConfigError, match="nothing says what the model's outputs mean"):
        Describer(DescribeOptions(model=path), "describe")


def test_gvaclassify_becomes_an_option() -> None:
    line = parse_line(
        "filesrc location=a.mp4 ! gvadetect model=m.xml ! gvatrack ! gvaclassify model=c.xml model-proc=c.json "
        "object-class=person reclassify-interval=5 device=CPU nireq=2 ! gvametaconvert ! fakesink"
    )
    assert line.config["task"]["describe"] == [
        {"model": "c.xml", "proc": "c.json", "labels": ["person"], "every": 5, "device": "CPU"}
    ]
    assert any("gvaclassify nireq=2 means nothing here" in note for note in line.notes)
