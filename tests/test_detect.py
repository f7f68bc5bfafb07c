"""GroundingDINO through the task detect: texts, sizes, thresholds, the command; against transformers' own processor."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import ovforge
from detectors import make_folder
from ovforge.cli import app
from ovforge.errors import InputError
from ovforge.run.pipeline import Pipeline
from ovforge.store.cache import Cache

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = "horse. red cat. clouds."
NARROW = {
    "num_queries": 60, "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "max_text_len": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("dino") / "grounding-dino"
    return folder, make_folder(folder, **NARROW)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def load(folder: Path, store: Path, **task: Any) -> Pipeline:
    config = {
        "task": {"use": "detect", **task}, "load": {"source": str(folder), "weights": "f32"},
        "device": {"use": "cpu", "precision": "f32"},
    }  # fmt: skip
    return ovforge.load(config, cache=Cache(store))


@pytest.fixture(scope="module")
def pipe(dino: tuple[Path, Any], store: Path) -> Pipeline:
    return load(dino[0], store)


def picture(number: int = 0, size: tuple[int, int] = (320, 240)) -> Image.Image:
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def by_transformers(dino: tuple[Path, Any], image: Image.Image, text: str, threshold: float) -> Any:
    """Return boxes inside the picture and scores, best first."""
    processor = transformers.GroundingDinoProcessor.from_pretrained(dino[0])
    given = processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
        outputs = dino[1](**given)
    found = processor.post_process_grounded_object_detection(
        outputs, threshold=threshold, text_threshold=0.25, target_sizes=[(image.height, image.width)]
    )[0]
    order = found["scores"].argsort(descending=True)
    boxes = found["boxes"][order].numpy().clip(0, [image.width, image.height] * 2)
    return boxes, found["scores"][order].numpy(), [found["text_labels"][n] for n in order]


@pytest.mark.parametrize(("number", "size"), [(0, (320, 240)), (1, (200, 333)), (2, (700, 100))])
def test_boxes_and_scores_are_those_of_transformers(
    dino: tuple[Path, Any], pipe: Pipeline, number: int, size: tuple[int, int]
) -> None:
    image = picture(number, size)
    _, everything, _ = by_transformers(dino, image, TEXT, 0.0)
    # Halfway between two scores that lie apart, so that no rounding moves a box over it.
    gaps = everything[10:-10] - everything[11:-9]
    place = 10 + int(gaps.argmax())
    threshold = float((everything[place] + everything[place + 1]) / 2)
    boxes, scores, words = by_transformers(dino, image, TEXT, threshold)
    result: Any = pipe(image, text=TEXT, threshold=threshold)
    found = result.detections[0]
    assert len(found) == len(boxes) == place + 1
    np.testing.assert_allclose(found.scores, scores, atol=1e-4)
    nearest = np.abs(found.boxes[:, None] - boxes[None]).max(2)
    near = np.abs(found.scores[:, None] - scores[None]) < 2e-4
    assert np.where(near, nearest, np.inf).min(1).max() < 0.5
    phrases = dict(enumerate(found.names))
    for label, own, (first, last) in zip(found.classes, found.words, found.spans, strict=True):
        assert set(own.split()) <= set(phrases[int(label)].split())
        assert last - first >= len(own.split())
    assert len(words) == len(found.words)


def test_a_text_is_read_once(pipe: Pipeline) -> None:
    first: Any = pipe(picture(), text=["Hill", "sky"])
    again: Any = pipe(picture(5), text="hill. sky.")
    assert first.timings.total("text") > 0
    assert again.timings.total("text") == 0
    assert first.warnings == ["the text is read as: hill. sky."]
    assert again.warnings == []


def test_long_texts_are_read_in_parts_and_merged(pipe: Pipeline) -> None:
    words = ["horse", "clouds", "grasses", "sky", "hill", "a", "red", "cat", "on", "the", "remote", "control"]
    phrases = [f"{one} {two}" for one in words for two in words if one != two][:20]  # three tokens each, 12 fit
    result: Any = pipe(picture(), text=phrases, threshold=0.3)
    assert result.warnings == ["the text is longer than 40 tokens, and is read in 2 parts"]
    parts: list[Any] = [
        pipe(picture(), text=part, threshold=0.3).detections[0] for part in (phrases[:12], phrases[12:])
    ]  # type: ignore[attr-defined]
    assert len(result.detections[0]) == sum(map(len, parts))
    expected = sorted(
        ((float(s), label) for part in parts for s, label in zip(part.scores, part.labels, strict=True)), reverse=True
    )
    found = result.detections[0]
    np.testing.assert_allclose(found.scores, [score for score, _ in expected], atol=1e-6)
    assert sorted(found.labels) == sorted(label for _, label in expected)
    with pytest.raises(InputError, match="has 51 tokens, and the model reads 38"):
        pipe(picture(), text=" ".join(["red"] * 50))


def test_a_fixed_size_finds_the_same(dino: tuple[Path, Any], pipe: Pipeline, store: Path) -> None:
    image = picture(3, (400, 256))
    fixed = load(dino[0], store, size=(256, 400), batch=2)
    one: Any = pipe(image, text=TEXT, threshold=0.2)
    two: Any = fixed([image, picture(4, (400, 256))], text=TEXT, threshold=0.2)
    np.testing.assert_allclose(one.detections[0].scores, two.detections[0].scores, atol=1e-4)
    assert one.compare(type(two)(detections=two.detections[:1])) > 0.99
    filled: Any = fixed(picture(6, (256, 256)), text=TEXT, threshold=0.2)
    assert (filled.detections[0].boxes <= 256).all()


@pytest.mark.parametrize("size", [(1, 1), (10000, 10), (7, 3000)])
def test_thin_pictures(pipe: Pipeline, size: tuple[int, int]) -> None:
    found: Any = pipe(Image.new("RGB", size, "red"), text="horse.", threshold=0.0).detections[0]  # type: ignore[attr-defined]
    assert len(found) == NARROW["num_queries"]
    assert (found.boxes >= 0).all()
    assert (found.boxes <= [*size, *size]).all()


@pytest.mark.parametrize("text", ["horse. red cat.", ["red cat", "a", "horse"] * 12])
def test_other_thresholds_need_no_inference(pipe: Pipeline, text: Any) -> None:
    first: Any = pipe(picture(), text=text, threshold=0.01)
    assert set(first.adjustable) == {"threshold", "text_threshold", "nms", "limit"}
    scores = first.detections[0].scores
    for values in ({"threshold": float(scores[len(scores) // 2])}, {"text_threshold": 0.9}, {"nms": 0.2, "limit": 5}):
        theirs: Any = pipe(picture(), text=text, **{"threshold": 0.01, **values})
        assert first.adjusted(**values).as_json() == theirs.as_json() != first.as_json()


def test_labels_of_a_list_come_back_as_given(pipe: Pipeline) -> None:
    given = ["Clouds", "Red Cat", "a horse.", "red  cat"]
    result: Any = pipe(picture(), text=given, threshold=0.0, nms=1.0)
    found = result.detections[0]
    assert list(found.names) == given
    assert set(found.labels) <= {"Clouds", "Red Cat", "a horse."}, "of two that are alike, the first"
    plain: Any = pipe(picture(), text="clouds. red cat. a horse.", threshold=0.0, nms=1.0)
    assert [label.lower().rstrip(".") for label in found.labels] == plain.detections[0].labels
    assert "read as: clouds. red cat. a horse." in result.warnings[0]


def test_nothing_to_look_for(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="say what to look for"):
        pipe(picture())
    with pytest.raises(InputError, match="nothing to look for"):
        pipe(picture(), text=" . ")
    nothing: Any = pipe(picture(), text="horse.", threshold=1.0)
    assert len(nothing.detections[0]) == 0


def test_the_command_finds_draws_and_compares(dino: tuple[Path, Any], store: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "photo.jpg", quality=95)
    given = [
        "detect", str(tmp_path / "photo.jpg"), "-m", str(dino[0]), "-t", "Horse. Clouds.", "--device", "CPU",
        "--precision", "f32", "--weights", "f32", "--threshold", "0.5", "-c", str(store),
    ]  # fmt: skip
    done = CliRunner().invoke(app, [*given, "-o", str(tmp_path / "out.png"), "--compare", "torch"])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert re.search(r"(\d+) boxes, \1 of the same label; at most 0\.\d+ pixels and 0\.000\d of score apart", said), (
        said
    )
    both = Image.open(tmp_path / "out.png")
    assert both.width == 640
    done = CliRunner().invoke(app, [*given, "-o", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    coco = json.loads((tmp_path / "out.json").read_text())
    assert {each["name"] for each in coco["categories"]} == {"horse", "clouds"}
    assert coco["info"]["provenance"]["inputs"]["text"] == "Horse. Clouds."
