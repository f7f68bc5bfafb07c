"""The task detect without GroundingDINO: RT-DETR and D-FINE, described models, texts, pictures, results, bad input."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ovforge
import ovforge_detection
from detectors import make_detr
from ovforge import testing
from ovforge.errors import ConfigError, InputError, ModelError
from ovforge.model import DetectorSpec
from ovforge.model.runtime import core
from ovforge.model.sources import FileSource
from ovforge.run.pipeline import Pipeline
from ovforge_detection.decode import Found, decode_classes, suppress
from ovforge_detection.detr import DetrLoader, DetrOptions
from ovforge_detection.examples import scene
from ovforge_detection.phrases import phrase_masks, wanted
from ovforge_detection.prepare import prepare
from ovforge_detection.results import Detections, DetectionsResult
from ovforge_detection.task import Detect, DetectOptions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DELIMITERS = (101, 102, 1012, 1029)
DINO = DetectorSpec(
    kind="text", shortest=800, longest=1333, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    queries=900, strides=(8, 16, 32, 64), delimiters=DELIMITERS,
)  # fmt: skip


# -- texts and pictures -------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([1012, 1029, 2000, 3000]), max_size=40))
def test_masks_of_phrases_are_those_of_transformers(inside: list[int]) -> None:
    ids = np.array([101, *inside, 102])
    module = transformers.models.grounding_dino.modeling_grounding_dino
    mask, positions = module.generate_masks_with_special_tokens_and_transfer_map(
        torch.tensor(ids)[None], torch.tensor(DELIMITERS)
    )
    ours, places = phrase_masks(ids, DELIMITERS)
    np.testing.assert_array_equal(ours, mask.numpy())
    np.testing.assert_array_equal(places, positions.numpy())


def test_texts_are_normalized_and_said() -> None:
    for text in ("horse. red cat.", ["horse", "red cat"]):
        assert (wanted(text).names, wanted(text).notes) == (["horse", "red cat"], ())
    sought = wanted(" Horse.  RED  cat.. horse?")
    assert sought.names == sought.phrases == ["horse", "red cat"]
    assert list(sought.notes) == ["the text is read as: horse. red cat."]
    names = ["Red House", "Dr. Pepper can", "Red  house", "x"]
    sought = wanted(names)
    assert (sought.names, sought.phrases) == (names, ["red house", "dr pepper can", "x"])
    assert (list(sought.firsts), len(sought.notes)) == ([0, 1, 3], 1)
    for nothing in ("", " . ", [], [""], ["cat", " ."]):
        with pytest.raises(InputError, match="nothing to look for"):
            wanted(nothing)


@settings(max_examples=15)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 12))
def test_pictures_are_prepared_as_transformers_does(height: int, width: int, scale: int) -> None:
    rng = np.random.default_rng(height)
    image = Image.fromarray(rng.integers(0, 256, (height, width * scale, 3), dtype=np.uint8))
    spec = DINO.model_copy(update={"shortest": 40, "longest": 90, "queries": 0})
    processor = transformers.GroundingDinoImageProcessorPil(size={"shortest_edge": 40, "longest_edge": 90})
    try:
        expected = processor(image, return_tensors="np")["pixel_values"][0]
    except ValueError:  # thinner than a pixel, which transformers does not scale
        assert min(prepare(image, spec).content) == 1
        return
    np.testing.assert_allclose(prepare(image, spec).pixels, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (10000, 10), (10, 10000), (3, 5000)])
def test_thin_pictures_are_filled_up_to_the_number_of_queries(size: tuple[int, int]) -> None:
    found = prepare(Image.new("RGB", size, "red"), DINO)
    places = sum(-(-found.canvas[0] // s) * -(-found.canvas[1] // s) for s in DINO.strides)
    assert places >= DINO.queries
    assert found.mask.sum() == found.content[0] * found.content[1]
    whole = np.array([[0, 0, found.content[1], found.content[0]]], np.float32)
    np.testing.assert_allclose(found.restored(whole), [[0, 0, *size]], rtol=1e-6)


def test_suppression_is_that_of_supervision() -> None:
    supervision = pytest.importorskip("supervision")
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 60, (200, 2))
    boxes = np.concatenate([low, low + rng.uniform(5, 40, (200, 2))], 1).astype(np.float32)
    scores, classes = rng.permutation(200).astype(np.float32) / 200, rng.integers(0, 3, 200)
    theirs = supervision.Detections(xyxy=boxes, confidence=scores, class_id=classes).with_nms(0.4)
    ours = suppress(Found(boxes, scores, classes), 0.4)
    np.testing.assert_array_equal(np.sort(ours.scores), np.sort(theirs.confidence))


# -- RT-DETR and D-FINE -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rt_detr(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("detr") / "rt-detr"
    return folder, make_detr(folder)


@pytest.fixture(scope="module")
def pipe(rt_detr: tuple[Path, Any]) -> Pipeline:
    return ovforge.load(config_of(rt_detr[0], weights="f32"), cache=None)


def config_of(source: Path, **load: Any) -> dict[str, Any]:
    return {
        "task": "detect", "load": {"source": str(source), **load}, "device": {"use": "cpu", "precision": "f32"},
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["RTDetrV2", "DFine"])
def test_outputs_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    agree(tmp_path, make_detr(tmp_path, kind))


def test_outputs_of_rt_detr_are_those_of_transformers(rt_detr: tuple[Path, Any]) -> None:
    agree(*rt_detr)


def agree(folder: Path, model: Any, height: int = 192, width: int = 256) -> None:
    """Check logits and boxes of three pictures. Queries are a set: places that score alike come in any order."""
    converted = DetrLoader(DetrOptions(weights="f32")).load(FileSource(folder)).models["detector"]
    pixels = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixel_values=pixels)
    found = core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({0: pixels.numpy()})
    ours = np.concatenate([found["logits"], found["boxes"]], -1)
    theirs = np.concatenate([expected.logits.numpy(), expected.pred_boxes.numpy()], -1)
    nearest = np.abs(ours[:, :, None] - theirs[:, None]).max(-1).min(2)
    assert np.quantile(nearest, 0.97) < 1e-3


PROCESSORS: dict[str, dict[str, Any]] = {
    "plain": {"size": {"height": 96, "width": 128}, "resample": 3},
    "nearest": {"size": {"height": 96, "width": 128}, "resample": 0, "do_rescale": False},
    "normalized": {"size": {"height": 96, "width": 128}, "do_normalize": True, "image_mean": [0.4, 0.5, 0.6]},
    "edges": {"size": {"shortest_edge": 96, "longest_edge": 128}},
    "most": {"size": {"max_height": 96, "max_width": 200}},
    "as it is": {"do_resize": False},
    "padded": {
        "size": {"shortest_edge": 90, "longest_edge": 120},
        "do_pad": True,
        "pad_size": {"height": 160, "width": 128},
    },
    "padded as it is": {"do_resize": False, "do_pad": True, "pad_size": {"height": 224, "width": 192}},
    "stretched, padded": {"size": {"height": 80, "width": 70}, "do_pad": True, "pad_size": {"height": 96, "width": 96}},
}


def spec_of(folder: Path, **options: Any) -> DetectorSpec:
    return DetectorSpec.of(DetrLoader(DetrOptions(**options)).load(FileSource(folder)).configs["detector"])


@pytest.fixture
def detr_files(rt_detr: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(rt_detr[0], tmp_path / "m"))


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pictures_are_prepared_whatever_the_processor_does(kind: str, detr_files: Path) -> None:
    processor = transformers.RTDetrImageProcessorPil(**PROCESSORS[kind])
    processor.save_pretrained(detr_files)
    size = {"as it is": (160, 128), "edges": (256, 192), "most": (160, 120)}.get(kind, (160, 192))
    image = scene(3)[0].resize(size)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    prepared = prepare(image, spec_of(detr_files))
    np.testing.assert_allclose(prepared.pixels, expected, atol=1e-5)
    whole = np.array([[0, 0, prepared.content[1], prepared.content[0]]], np.float32)
    np.testing.assert_allclose(prepared.restored(whole), [[0, 0, *size]], rtol=1e-6)


def test_outputs_at_any_size_are_those_of_transformers(rt_detr: tuple[Path, Any], detr_files: Path) -> None:
    transformers.RTDetrImageProcessorPil(do_resize=False).save_pretrained(detr_files)
    agree(detr_files, rt_detr[1], 160, 224)
    with pytest.raises(InputError, match="comes to 100x90, and the model takes multiples of 32"):
        prepare(Image.new("RGB", (100, 90)), spec_of(detr_files))
    fixed = spec_of(detr_files, height=96, width=128)
    assert prepare(Image.new("RGB", (100, 90)), fixed).canvas == (96, 128)


def test_image_processors_that_are_not_understood(detr_files: Path) -> None:
    for change, match in (({"image_processor_type": "CLIPImageProcessor"}, "not known"), ({"size": 7}, "scaled")):
        (detr_files / "preprocessor_config.json").write_text(json.dumps(change))
        with pytest.raises(ModelError, match=match):
            spec_of(detr_files)
    config = json.loads((detr_files / "config.json").read_text())
    (detr_files / "config.json").write_text(json.dumps({**config, "id2label": {"2147483647": "cat"}}))
    with pytest.raises(ModelError, match="id2label has a class 2147483647"):
        spec_of(detr_files)


def test_anchors_of_another_size(rt_detr: tuple[Path, Any], detr_files: Path) -> None:
    config = json.loads((detr_files / "config.json").read_text())
    (detr_files / "config.json").write_text(json.dumps({**config, "anchor_image_size": [640, 640]}))
    agree(detr_files, rt_detr[1])


def test_a_size_for_a_model_that_has_one(pipe: Pipeline) -> None:
    context: Any = pipe.task._bundle  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="the model's input is 192x256"):
        Detect(DetectOptions(size=(64, 64)), SimpleNamespace(bundle=context))  # type: ignore[arg-type]


def test_classes_are_decoded_as_transformers_does() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (30, 5)).astype(np.float32)
    boxes = rng.uniform(0.3, 0.7, (30, 4)).astype(np.float32) * [1, 1, 0.5, 0.5]
    image = Image.new("RGB", (400, 300))
    spec = DetectorSpec(kind="classes", height=192, width=256)
    ours = decode_classes(logits, boxes.astype(np.float32), prepare(image, spec), 0.6, None)
    outputs = transformers.models.rt_detr.modeling_rt_detr.RTDetrObjectDetectionOutput(
        logits=torch.tensor(logits)[None], pred_boxes=torch.tensor(boxes, dtype=torch.float32)[None]
    )
    theirs = transformers.RTDetrImageProcessorPil().post_process_object_detection(
        outputs, threshold=0.6, target_sizes=[(300, 400)]
    )[0]
    np.testing.assert_allclose(ours.scores, theirs["scores"], atol=1e-6)
    np.testing.assert_array_equal(ours.classes, theirs["labels"])
    np.testing.assert_allclose(ours.boxes, theirs["boxes"], atol=1e-3)


def test_a_folder_is_walked_and_what_is_damaged_in_it_passed_over(pipe: Pipeline, tmp_path: Path) -> None:
    for number in range(3):
        scene(number)[0].save(tmp_path / f"{number}.jpg")
    data = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "notes.txt").write_text("no picture")
    seen: list[tuple[int, int]] = []
    result: Any = pipe(tmp_path, threshold=0.0, progress=lambda moment: seen.append((moment.done, moment.total)))
    assert [Path(each.picture).name for each in result.detections] == ["0.jpg", "2.jpg"]
    assert "truncated" in result.warnings[0]
    assert seen[0] == (0, 3)
    assert seen[-1] == (3, 3)
    with pytest.raises(InputError, match="truncated"):
        pipe(tmp_path / "1.jpg")
    alone: Any = pipe([tmp_path / "2.jpg"], threshold=0.0)
    np.testing.assert_allclose(alone.detections[0].boxes, result.detections[1].boxes, atol=1e-3)
    assert len(pipe(tmp_path / "0.jpg", threshold=1.0).detections[0]) == 0  # type: ignore[attr-defined]


def test_pictures_of_any_mode_and_orientation(pipe: Pipeline, tmp_path: Path) -> None:
    image = scene(4)[0]
    plain: Any = pipe(image, threshold=0.0)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    upright: Any = pipe(tmp_path / "turned.png", threshold=0.0)
    np.testing.assert_allclose(upright.detections[0].boxes, plain.detections[0].boxes, atol=1e-3)
    assert upright.detections[0].size == image.size
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    for mode in ("L", "RGBA", "P", "I;16", "1"):
        other = Image.new("I;16", (50, 40), 30000) if mode == "I;16" else image.convert(mode)
        other.save(tmp_path / "mode.png")
        assert len(pipe(tmp_path / "mode.png", threshold=0.0).detections[0])  # type: ignore[attr-defined]
    cmyk: Any = pipe(tmp_path / "cmyk.jpg", threshold=0.0)
    assert cmyk.detections[0].size == image.size


def test_which_of_the_models_classes(pipe: Pipeline) -> None:
    image = scene(0)[0]
    everything: Any = pipe(image, threshold=0.0)
    cars: Any = pipe(image, text="Car. person", threshold=0.0)
    assert set(cars.detections[0].labels) <= {"car", "person"}
    expected = [label for label in everything.detections[0].labels if label in ("car", "person")]
    assert cars.detections[0].labels == expected
    with pytest.raises(InputError, match="does not know 'cars'. Did you mean 'car'"):
        pipe(image, text="cars")


def test_several_at_once_are_the_same(rt_detr: tuple[Path, Any], pipe: Pipeline) -> None:
    config = config_of(rt_detr[0], weights="f32")
    together = ovforge.load({**config, "task": {"use": "detect", "batch": 2}}, cache=None)
    images = [scene(number)[0] for number in range(3)]
    one: Any = pipe(images, threshold=0.3)
    two: Any = together(images, threshold=0.3)
    for ours, theirs in zip(one.detections, two.detections, strict=True):
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=0.05)
    assert one.compare(two) > 0.999
    testing.check_task(ovforge_detection, "detect", pipe.task)


def test_other_thresholds_need_no_inference(pipe: Pipeline) -> None:
    images = [scene(number)[0] for number in range(2)]
    first: Any = pipe(images, threshold=0.1)
    middle = float(np.median(first.detections[0].scores))
    for values in ({"threshold": middle}, {"limit": 2}, {"threshold": middle, "nms": 0.0}):
        ours: Any = first.adjusted(**values)
        theirs: Any = pipe(images, **{"threshold": 0.1, **values})
        assert ours.as_json() == theirs.as_json() and ours.as_json() != first.as_json()
        assert ours.provenance["inputs"] == theirs.provenance["inputs"]
        assert ours.adjusted(**first.adjustable).as_json() == first.as_json()


def test_which_inputs_may_change_afterwards(pipe: Pipeline) -> None:
    result: Any = pipe(scene(0)[0])
    assert result.adjustable == {"threshold": 0.5, "nms": 1.0, "limit": 300}
    with pytest.raises(InputError, match="cannot be changed"):
        result.adjusted(text_threshold=0.5)
    with pytest.raises(ConfigError, match="threshold"):
        result.adjusted(threshold=2)
    assert result.compact().adjustable == {} and pickle.loads(pickle.dumps(result.compact())).detections
    assert pipe([scene(0)[0]] * 9).adjustable == {}, "the outputs of many pictures are not held"


# -- results ------------------------------------------------------------------------------------------------------


BOXES = np.array([[20, 30, 80, 90], [100, 10, 120, 60]], np.float32)


def result_of(*pictures: Any) -> DetectionsResult:
    found = [
        Detections(str(n), (128, 96), BOXES, np.array([0.9, 0.5], np.float32), np.array([1, 0]), ["dog", "cat"])
        for n in range(len(pictures))
    ]
    return DetectionsResult(detections=found, pictures=pictures)


def test_results_as_coco_csv_pictures_and_supervision(tmp_path: Path) -> None:
    images = [scene(n)[0].resize((128, 96)) for n in range(2)]
    result = result_of(*images)
    coco = json.loads(result.save(tmp_path / "x.json")[0].read_text())
    assert [each["bbox"] for each in coco["annotations"][:2]] == [[20, 30, 60, 60], [100, 10, 20, 50]]
    names = {each["id"]: each["name"] for each in coco["categories"]}
    assert [names[each["category_id"]] for each in coco["annotations"]] == ["cat", "dog"] * 2
    assert {each["image_id"] for each in coco["annotations"]} == {each["id"] for each in coco["images"]}
    rows = result.save(tmp_path / "x.csv")[0].read_text().splitlines()
    assert rows[1] == "0,cat,0.900000,20.00,30.00,80.00,90.00"
    assert [path.name for path in result.save(tmp_path / "x.png")] == ["x-1.png", "x-2.png"]
    drawn = np.asarray(Image.open(tmp_path / "x-1.png"))
    assert (drawn != np.asarray(images[0])).any(axis=2)[30:90, 20].all()
    folder = result.save(tmp_path / "all")
    assert sorted(path.name for path in folder) == ["detections.json", "picture-1.png", "picture-2.png"]
    with pytest.raises(InputError, match=r"cannot write \.doc"):
        result.save(tmp_path / "x.doc")
    supervision = pytest.importorskip("supervision")
    given = result.detections[0].to_supervision()
    assert isinstance(given, supervision.Detections)
    assert given["class_name"].tolist() == ["cat", "dog"]
    np.testing.assert_array_equal(given.xyxy, BOXES)


def test_contract(rt_detr: tuple[Path, Any], tmp_path: Path) -> None:
    testing.check_plugin(ovforge_detection)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "clip"}')
    testing.check_loader(ovforge_detection, "detr", rt_detr[0], other)


def test_bad_input(pipe: Pipeline, tmp_path: Path) -> None:
    for image, match in [
        ([], "no picture"),
        (tmp_path, "no picture is in the folder"),
        (tmp_path / "x.png", "no such"),
    ]:
        with pytest.raises(InputError, match=match):
            pipe(image)
    (tmp_path / "text.png").write_text("this is not a picture")
    with pytest.raises(InputError, match="not a readable picture"):
        pipe(tmp_path / "text.png")
    with pytest.raises(ConfigError, match="threshold"):
        pipe(Image.new("RGB", (9, 9)), threshold=1.5)
    assert pipe(Image.new("RGB", (1, 1))).detections[0].size == (1, 1)  # type: ignore[attr-defined]
