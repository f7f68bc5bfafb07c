"""The gate on quantized pipelines: metrics against their papers, what passes, what fails, what a search keeps."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset13 as ops
from PIL import Image
from pydantic import BaseModel, ConfigDict

import ovforge
import ovforge_quality
from ovforge import hookimpl
from ovforge.contracts.extensions import GraphTransformExtension, QuantizerExtension, TaskExtension
from ovforge.contracts.stages import Phase, Progress, Report
from ovforge.errors import ConfigError, ModelError, PluginError, QualityError
from ovforge.model.bundle import ModelBundle
from ovforge.model.metrics import gmsd, psnr, ssim
from ovforge.model.results import ImagesResult, Result
from ovforge.plugins.catalogue import Registry
from ovforge.plugins.manager import Plugins
from ovforge.store.cache import Cache
from ovforge_detection.results import DetectInputs, Detections, DetectionsResult
from ovforge_quality.gate import Judge, JudgedQuality, Verdict, failed
from ovforge_quality.search import fewest, noise_of_layers
from test_sources import Protection

# -- metrics ----------------------------------------------------------------------------------------------------------


def picture(seed: int, shape: tuple[int, ...] = (24, 21, 3)) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def noisy(pixels: Any, amount: float, seed: int = 0) -> Any:
    noise = np.random.default_rng(seed).normal(0, amount, pixels.shape)
    return (pixels + noise).round().clip(0, 255).astype(np.uint8)


def slow_ssim(first: Any, second: Any) -> float:
    """Equations 13 to 16 of Wang et al. 2004, window by window, with weighted means written out."""
    offsets = [(y, x) for y in range(-5, 6) for x in range(-5, 6)]
    weights = np.array([math.exp(-(y * y + x * x) / (2 * 1.5**2)) for y, x in offsets])
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for channel in range(first.shape[2]):
        for row in range(5, first.shape[0] - 5):
            for column in range(5, first.shape[1] - 5):
                x, y = (
                    np.array([float(side[row + dy, column + dx, channel]) for dy, dx in offsets])
                    for side in (first, second)
                )
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                both = (weights * (x - mx) * (y - my)).sum()
                found.append((2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


def slow_gmsd(first: Any, second: Any) -> float:
    """Equations 1 to 6 of Xue et al. 2014, place by place."""

    def magnitude(pixels: Any) -> list[list[float]]:
        grey = [[0.299 * r + 0.587 * g + 0.114 * b for r, g, b in row] for row in pixels.tolist()]
        height, width = len(grey) // 2, len(grey[0]) // 2
        half = [
            [sum(grey[2 * y + a][2 * x + b] for a in (0, 1) for b in (0, 1)) / 4 for x in range(width)]
            for y in range(height)
        ]

        def at(y: int, x: int) -> float:
            return half[min(max(y, 0), height - 1)][min(max(x, 0), width - 1)]

        return [
            [
                math.hypot(
                    sum(at(y + d, x + 1) - at(y + d, x - 1) for d in (-1, 0, 1)) / 3,
                    sum(at(y + 1, x + d) - at(y - 1, x + d) for d in (-1, 0, 1)) / 3,
                )
                for x in range(width)
            ]
            for y in range(height)
        ]

    pairs = [
        (a, b)
        for left, right in zip(magnitude(first), magnitude(second), strict=True)
        for a, b in zip(left, right, strict=True)
    ]
    similarity = [(2 * a * b + 170) / (a * a + b * b + 170) for a, b in pairs]
    mean = sum(similarity) / len(similarity)
    return math.sqrt(sum((s - mean) ** 2 for s in similarity) / len(similarity))


@pytest.mark.parametrize("amount", [0.0, 3.0, 40.0])
def test_metrics_are_those_of_the_papers(amount: float) -> None:
    first = picture(1)
    second = noisy(first, amount)
    assert ssim(first, second) == pytest.approx(slow_ssim(first, second), abs=1e-10)
    assert 1 - gmsd(first, second) == pytest.approx(slow_gmsd(first, second), abs=1e-10)
    error = np.mean((first.astype(float) - second) ** 2)
    assert psnr(first, second) == pytest.approx(10 * math.log10(255**2 / error) if error else 100.0)


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([1, 3, 4]), st.integers(0, 99))
def test_metrics_have_bounds(height: int, width: int, channels: int, seed: int) -> None:
    """Of any size: equal pictures have the best score, the order of two does not matter."""
    first, second = (picture(seed + n, (height, width, channels)) for n in (0, 100))
    for measure, perfect in ((ssim, 1.0), (gmsd, 1.0), (psnr, 100.0)):
        assert measure(first, first) == pytest.approx(perfect, abs=1e-9)
        assert measure(first, second) == pytest.approx(measure(second, first))
        assert measure(first, second) <= perfect + 1e-9


def test_more_noise_is_a_lower_score() -> None:
    first = picture(3, (64, 64, 3))
    for measure in (ssim, gmsd, psnr):
        scores = [measure(first, noisy(first, amount)) for amount in (2, 10, 30, 80)]
        assert scores == sorted(scores, reverse=True)


# -- a pipeline whose layers are known --------------------------------------------------------------------------------


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


WIDTH = 16
SEEN: list[int] = []


def chain(layers: int = 6) -> ov.Model:
    """Layers "layer0"... of a matrix product and a tanh each; input "x" (batch, 16), output "y"."""
    rng = np.random.default_rng(0)
    x = ops.parameter([-1, WIDTH], np.float32, name="x")
    value: Any = x
    for number in range(layers):
        weights = rng.normal(0, 0.6, (WIDTH, WIDTH)).astype(np.float32)
        product = ops.matmul(value, ops.constant(weights, name=f"weights{number}"), False, False, name=f"layer{number}")
        value = ops.tanh(product)
    model = ov.Model([value], [x], "chain")
    model.inputs[0].get_tensor().set_names({"x"})
    model.outputs[0].get_tensor().set_names({"y"})
    return model


class NoiseOptions(Strict):
    bad: tuple[int, ...] = (1, 4)
    amount: float = 0.5
    small: float = 0.0005
    names: bool = True
    nan: bool = False


class Noise:
    """Adds noise to weights: much in the layers that are bad, little in the others."""

    def __init__(self, options: NoiseOptions) -> None:
        self.options = options

    def quantize(self, bundle: ModelBundle, calibration: Any, keep: Mapping[str, Collection[str]] = {}) -> Report:
        model, rng, names = bundle.models["model"], np.random.default_rng(1), []
        for op in model.get_ordered_ops():
            if op.get_type_name() != "MatMul":
                continue
            name, number = op.get_friendly_name(), int(op.get_friendly_name().removeprefix("layer"))
            weights = op.input_value(1).get_node()
            noise = rng.normal(
                0, self.options.amount if number in self.options.bad else self.options.small, (WIDTH, WIDTH)
            )
            if name in keep.get("model", ()):
                continue
            changed = weights.data + noise.astype(np.float32) * (np.nan if self.options.nan else 1)
            op.input(1).replace_source_output(ops.constant(changed.astype(np.float32)).output(0))
            names.append(name)
        return Report(roles=("model",), applied=["noise"], layers={"model": names} if self.options.names else {})


class Brighten:
    """A transform after quantization, which both sides of the comparison must have."""

    def __init__(self, options: None) -> None: ...

    def apply(self, bundle: ModelBundle) -> Report:
        SEEN.append(-1)
        return Report(applied=["looked"])


class FadeOptions(Strict):
    by: float = 0.9


class Fade:
    """An approximation: what the model gives, less."""

    def __init__(self, options: FadeOptions) -> None:
        self.options = options

    def apply(self, bundle: ModelBundle) -> Report:
        result = bundle.models["model"].get_results()[0]
        source = result.input_value(0)
        names = source.get_names()
        source.get_tensor().set_names(set())
        faded = ops.multiply(source, ops.constant(np.float32(self.options.by)))
        faded.output(0).get_tensor().set_names(names)
        result.input(0).replace_source_output(faded.output(0))
        return Report(roles=("model",), applied=["faded"])


class Inputs(Strict):
    number: int = 0
    seed: int = 0


class Draw:
    """Makes a picture of 16 x 16 pixels of the model's output."""

    def __init__(self, options: None, context: Any) -> None:
        self.bundle = context and context.bundle

    def _values(self, inputs: Inputs) -> Any:
        x = np.random.default_rng(inputs.number).normal(0, 1, (WIDTH, WIDTH)).astype(np.float32)
        y = self.bundle["model"].create_infer_request().infer({"x": x})["y"]
        if not np.isfinite(y).all():
            raise ModelError("numbers that are not finite", where="model")
        return y

    def __call__(self, inputs: Inputs, progress: Any) -> Result:
        SEEN.append(inputs.number)
        pixels = ((self._values(inputs) + 1) * 127.5).astype(np.uint8)
        return ImagesResult(images=[Image.fromarray(pixels).convert("RGB").resize((32, 32))], seeds=[inputs.seed])

    def examples(self, count: int) -> Sequence[Inputs]:
        return [Inputs(number=number, seed=number) for number in range(count)]


class Measure(Draw):
    """The same without pictures, with a metric of its own."""

    def __call__(self, inputs: Inputs, progress: Any) -> Result:
        return Result(provenance={"y": self._values(inputs)})

    def compare(self, result: Result, reference: Result) -> float:
        return 1 - float(np.abs(result.provenance["y"] - reference.provenance["y"]).mean())


class Silent(Measure):
    compare = None  # type: ignore[assignment]


def plugins() -> Plugins:
    module = ModuleType("noises")

    @hookimpl
    def ovforge_quantizers() -> Iterator[QuantizerExtension]:
        yield QuantizerExtension(name="noise", summary="Noise", factory=Noise, config=NoiseOptions, needs="nothing")

    @hookimpl
    def ovforge_graph_transforms() -> Iterator[GraphTransformExtension]:
        yield GraphTransformExtension(name="brighten", summary="After", factory=Brighten, phase=Phase.ATTACH)
        for name, phase in (("fade", Phase.ATTACH), ("fade-early", Phase.STRUCTURE)):
            yield GraphTransformExtension(
                name=name, summary="Less", factory=Fade, config=FadeOptions, phase=phase, approximates=True
            )

    @hookimpl
    def ovforge_tasks() -> Iterator[TaskExtension]:
        for name, factory in (("draw", Draw), ("measure", Measure), ("silent", Silent)):
            yield TaskExtension(name=name, summary="Runs", factory=factory, inputs=Inputs, roles=("model",))

    for hook in (ovforge_quantizers, ovforge_graph_transforms, ovforge_tasks):
        setattr(module, hook.__name__, hook)
    found = Plugins(Registry({}), found=())
    found.register(module, "noises", "1.0")
    found.register(ovforge_quality, "quality", "1.0")
    return found


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    SEEN.clear()
    bundle = ModelBundle()
    bundle.models["model"] = chain()
    bundle.save(tmp_path / "model")
    return {
        "task": "draw",
        "load": str(tmp_path / "model"),
        "quantize": [{"use": "noise"}],
        "quality": {"min_score": 0.95, "samples": 4, "save": str(tmp_path / "worst")},
        "device": {"precision": "f32"},
    }


def load(config: Mapping[str, Any], cache: Cache | None = None, **changes: Any) -> ovforge.Pipeline:
    return ovforge.load({**config, **changes}, plugins=plugins(), cache=cache)


GOOD = [{"use": "noise", "bad": []}]


@pytest.mark.parametrize("quantize", [[], GOOD])
def test_approximations_are_held_to_the_pipeline_without_them(
    config: dict[str, Any], cache: Cache, quantize: list[dict[str, Any]]
) -> None:
    """With quantizers or alone: the reference leaves them out, the result has them, and the outcome is stored."""
    pipe = load(config, cache, quantize=quantize, transform=[{"use": "fade", "by": 0.99}, "brighten"])
    assert pipe.outcome is not None
    assert pipe.outcome.passed
    assert pipe.outcome.score < 1, "what is left out of the reference is seen"
    SEEN.clear()
    assert load(config, cache, quantize=quantize, transform=[{"use": "fade", "by": 0.99}, "brighten"]).outcome == (
        pipe.outcome
    )
    assert SEEN == [], "and found again"
    with pytest.raises(QualityError, match="pipeline scores"):
        load(config, cache, quantize=quantize, transform=[{"use": "fade", "by": 0.2}])
    with pytest.raises(QualityError):
        load(config, cache, transform=[{"use": "fade", "by": 0.2}], quality={**config["quality"], "on_fail": "search"})
    ungated = {name: value for name, value in config.items() if name not in ("quality", "quantize")}
    assert load(ungated, cache, transform=["fade"]).outcome is None, "without [quality] nothing is judged"


def test_approximations_come_after_the_quantizers(config: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match="ATTACH or LAYOUT"):
        load(config, transform=["fade-early"])
    with pytest.raises(ConfigError, match="quantizers and approximations"):
        load(config, quantize=[], transform=["brighten"])


def test_what_is_close_passes_and_is_remembered(config: dict[str, Any], cache: Cache) -> None:
    pipe = load(config, cache, quantize=GOOD, transform=["brighten"])
    assert pipe.outcome is not None
    assert pipe.outcome.passed and pipe.outcome.metric == "ssim" and len(pipe.outcome.scores) == 4
    assert sorted(set(SEEN)) == [-1, 1, 3, 5, 7], "held-out examples only, and later steps are applied"
    SEEN.clear()
    again = load(config, cache, quantize=GOOD, transform=["brighten"])
    assert again.outcome == pipe.outcome and SEEN == []
    assert [report.layers for report in again.reports] == [report.layers for report in pipe.reports]
    before, after = pipe.reports[0].sizes["model"]
    assert before == after == 6 * WIDTH * WIDTH * 4
    assert pipe.reports[0].seconds is not None
    planned = ovforge.plan({**config, "quantize": GOOD, "transform": ["brighten"]}, plugins=plugins(), cache=cache)
    [stage] = [stage for stage in planned.stages if stage.stage == "quality"]
    assert (stage.state, stage.why) == ("cached", str(pipe.outcome))
    fresh = ovforge.plan({**config, "quality": {"min_score": 0.5}}, plugins=plugins(), cache=cache)
    assert next(stage.state for stage in fresh.stages if stage.stage == "quality") == "to do"


def test_the_worst_detections_are_drawn(tmp_path: Path) -> None:
    white = Image.new("RGB", (40, 30), "white")

    def result(*boxes: list[float]) -> DetectionsResult:
        floats, count = np.array(boxes, np.float32).reshape(-1, 4), len(boxes)
        one = Detections("a", (40, 30), floats, np.ones(count, np.float32), np.zeros(count, np.int64), ["dog"])
        return DetectionsResult(detections=[one], pictures=[white])

    inputs = (DetectInputs(image=white),) * 2
    outcome = JudgedQuality("task", "mean", 0.9, 0.5, (1.0, 0.0))
    verdict = Verdict(outcome.scores, (result(), result()), (result(), result([5, 5, 30, 25])), inputs)
    said = str(failed(outcome, verdict, tmp_path))
    assert "task 0, with input number 2" in said
    assert "worst-1.png" in said
    with Image.open(tmp_path / "worst-1.png") as image:
        both = np.asarray(image)
    assert (both[:, :40] != 255).any(), "the unquantized pipeline found something"
    assert (both[:, 40:] == 255).all()


def test_pictures_in_which_nothing_is_found_say_nothing() -> None:
    def judge(count: int) -> Judge:
        found = Detections("a", (40, 30), np.zeros((count, 4), np.float32), np.ones(count, np.float32),
                           np.zeros(count, np.int64), ["dog"])  # fmt: skip

        class Finder:
            def __call__(self, inputs: Any, progress: Any) -> DetectionsResult:
                return DetectionsResult(detections=[found])

            def compare(self, result: Any, reference: Any) -> float:
                return 1.0

        return Judge(None, Finder, lambda _: Finder(), lambda _, number: [None] * number, lambda _: None)  # type: ignore[arg-type,return-value]

    with pytest.raises(ConfigError, match="finds nothing with any of 8 inputs"):
        judge(0).judge(ModelBundle())
    assert judge(1).judge(ModelBundle()).score("mean") == 1.0


def test_what_is_not_close_fails_with_the_worst_pictures(config: dict[str, Any], cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(QualityError) as raised:
        load(config, cache)
    said = str(raised.value)
    assert "below 0.9500" in said and "worst-1.png" in said
    files = sorted((tmp_path / "worst").iterdir())
    assert [file.name for file in files] == ["worst-1.png", "worst-2.png", "worst-3.png"]
    with Image.open(files[0]) as image:
        assert image.size == (72, 32)
        both = np.asarray(image)
    score = float(said.split("The worst is ssim ")[1].split(",")[0])
    assert ssim(both[:, :32], both[:, 40:]) == pytest.approx(score, abs=1e-3), "it is the worst one that is shown"
    assert not any(entry.stage == "quality" for entry in cache.entries())
    with pytest.warns(UserWarning, match="below 0.9500"):
        pipe = load(config, cache, quality={**config["quality"], "on_fail": "warn"})
    assert pipe.outcome is not None and not pipe.outcome.passed
    with pytest.warns(UserWarning, match="below 0.9500"):
        load(config, cache, quality={**config["quality"], "on_fail": "warn"})


def test_limits(config: dict[str, Any]) -> None:
    """max_drop counts from 1; worst is stricter than mean; psnr is in dB."""
    table = {"samples": 6, "save": config["quality"]["save"]}
    pipe = load(config, quantize=[{"use": "noise", "bad": [2], "amount": 0.02}], quality={**table, "max_drop": 1.0})
    assert pipe.outcome is not None
    mean, worst = np.mean(pipe.outcome.scores), min(pipe.outcome.scores)
    assert worst < mean < 1
    middle = float(mean + worst) / 2
    quantize = [{"use": "noise", "bad": [2], "amount": 0.02}]
    load(config, quantize=quantize, quality={**table, "min_score": middle})
    load(config, quantize=quantize, quality={**table, "max_drop": 1 - middle})
    with pytest.raises(QualityError, match=r"worst of 6"):
        load(config, quantize=quantize, quality={**table, "min_score": middle, "by": "worst"})
    pipe = load(config, quantize=quantize, quality={**table, "metric": "psnr", "min_score": 10})
    assert pipe.outcome is not None and " dB (mean of 6)" in str(pipe.outcome)
    assert load(config, quantize=quantize, quality={**table, "metric": "gmsd", "max_drop": 0.5}).outcome


def test_results_without_pictures_need_the_tasks_metric(config: dict[str, Any]) -> None:
    pipe = load(config, task="measure", quantize=GOOD)
    assert pipe.outcome is not None and pipe.outcome.metric == "task"
    with pytest.raises(QualityError, match="task 0"):
        load(config, task="measure")
    with pytest.raises(ConfigError, match="ssim is not a metric of what the task returns"):
        load(config, task="measure", quality={**config["quality"], "metric": "ssim"})
    with pytest.raises(ConfigError, match="no metric of their own"):
        load(config, task="silent")
    with pytest.raises(ConfigError, match="no metric of their own"):
        load(config, task="draw", quality={**config["quality"], "metric": "task"})


def test_a_model_that_computes_no_numbers_fails(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(QualityError, match="not finite"):
        load(config, quantize=[{"use": "noise", "nan": True}])
    with Image.open(tmp_path / "worst" / "worst-1.png") as image:
        assert not np.asarray(image)[:, 40:].any(), "black"


# -- the search -------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.integers(1, 300), st.integers(0, 300))
def test_bisection_finds_the_least(count: int, needed: int) -> None:
    tried: list[int] = []

    def passes(n: int) -> bool:
        tried.append(n)
        return n >= needed

    found = fewest(count, passes)
    assert found == (max(needed, 1) if needed < count and count > 1 else None)
    assert len(tried) <= math.ceil(math.log2(count)) + 1 and len(set(tried)) == len(tried)
    assert all(1 <= n < count for n in tried)


def test_noise_is_that_of_the_layer_and_not_of_those_before_it() -> None:
    original, lowered = chain(), ModelBundle()
    lowered.models["model"] = original.clone()
    Noise(NoiseOptions(bad=(1,), amount=0.2, small=0.0)).quantize(lowered, None)
    names = [f"layer{number}" for number in range(6)]
    records = [{"x": np.random.default_rng(n).normal(0, 1, (4, WIDTH)).astype(np.float32)} for n in range(3)]
    noise = noise_of_layers(original, lowered.models["model"], names, records)
    assert max(noise, key=lambda name: noise[name]) == "layer1"
    assert noise["layer0"] == 0
    by_weights = noise_of_layers(original, lowered.models["model"], ["weights1", "nowhere"], records)
    assert by_weights == {"weights1": noise["layer1"]}, "a weight is known by the layer that uses it"
    # By hand: the ratio of powers at the layer's output, which gets exactly what the original's gets.
    weights = [op.data for op in original.get_ordered_ops() if op.get_type_name() == "Constant"]
    changed = next(op for op in lowered.models["model"].get_ops() if op.get_friendly_name() == "layer1")
    given = [np.tanh(record["x"] @ weights[0]) for record in records]
    difference = sum(float(((g @ (changed.input_value(1).get_node().data - weights[1])) ** 2).sum()) for g in given)
    assert noise["layer1"] == pytest.approx(
        difference / sum(float(((g @ weights[1]) ** 2).sum()) for g in given), rel=1e-4
    )


def test_a_search_keeps_the_layers_that_matter(config: dict[str, Any], cache: Cache) -> None:
    table = {**config["quality"], "on_fail": "search"}
    for store in (None, cache):
        pipe = load(config, store, quality=table)
        assert pipe.outcome is not None and pipe.outcome.passed
        assert pipe.outcome.kept == {"model": ["layer1", "layer4"]}
        assert pipe.outcome.lowered == 4 and pipe.outcome.trials <= 4
        assert pipe.reports[0].layers == {"model": ["layer0", "layer2", "layer3", "layer5"]}
    stages = ovforge.plan({**config, "quality": table}, plugins=plugins(), cache=cache).stages
    assert [(s.stage, s.state) for s in stages[1:3]] == [("quantizer (precision)", "cached"), ("quality", "cached")]
    assert "2 of 6 layers kept" in stages[2].why
    SEEN.clear()
    again = load(config, cache, quality=table)
    assert (again.outcome, again.reports, SEEN) == (pipe.outcome, pipe.reports, [])
    result = again(number=3)
    plain = load({**config, "quality": None}, cache, quantize=[])(number=3)
    assert ssim(*(np.asarray(r.images[0]) for r in (result, plain))) > 0.95  # type: ignore[attr-defined]


def test_an_interrupted_search_goes_on(config: dict[str, Any], cache: Cache) -> None:
    table = {**config["quality"], "on_fail": "search"}

    def stop(moment: Progress) -> None:
        if (moment.stage, moment.done) == ("search", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ovforge.load({**config, "quality": table}, plugins=plugins(), cache=cache, progress=stop)
    assert sum(entry.stage == "quality trial" for entry in cache.entries()) == 2
    assert not any(entry.stage == "quality" for entry in cache.entries())
    before = len(SEEN)
    resumed = load(config, cache, quality=table)
    took = len(SEEN) - before
    SEEN.clear()
    whole = load(config, None, quality=table)
    assert resumed.outcome == whole.outcome
    assert len(SEEN) - took == 2 * 4 + 2, "two trials of four pictures, and two runs to record, are not made again"


def test_a_search_that_finds_nothing_says_so(config: dict[str, Any], tmp_path: Path) -> None:
    table = {**config["quality"], "on_fail": "search"}
    with pytest.raises(QualityError, match="every layer kept but the least sensitive one"):
        load(config, quality={**table, "min_score": 1.0}, quantize=[{"use": "noise", "small": 0.3}])
    with pytest.raises(QualityError, match="names no layers"):
        load(config, quality=table, quantize=[{"use": "noise", "names": False}])
    assert (tmp_path / "worst" / "worst-1.png").is_file()


def test_quantizers_may_ask_for_the_score(config: dict[str, Any]) -> None:
    """It is the gate's: same metric, same inputs, and 1 for the models as they are."""
    asked: list[float] = []

    class Ask:
        def __init__(self, options: None) -> None: ...

        def quantize(self, bundle: ModelBundle, calibration: Any) -> Report:
            asked.append(calibration.score({}))
            asked.append(calibration.score({"model": bundle.models["model"]}))
            noised = bundle.copy()
            Noise(NoiseOptions()).quantize(noised, None)
            asked.append(calibration.score({"model": noised.models["model"]}))
            return Report(applied=["asked"])

    module = ModuleType("asks")

    @hookimpl
    def ovforge_quantizers() -> Iterator[QuantizerExtension]:
        yield QuantizerExtension(name="ask", summary="Asks", factory=Ask, needs="score")

    module.ovforge_quantizers = ovforge_quantizers  # type: ignore[attr-defined]
    found = plugins()
    found.register(module, "asks", "1.0")
    for quality in (config["quality"], None):
        ovforge.load({**config, "quantize": ["ask"], "quality": quality}, plugins=found, cache=None)
    assert asked[:2] == asked[3:5] == [1.0, 1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = load(config, quality={**config["quality"], "on_fail": "warn"})
    assert pipe.outcome is not None and asked[2] == pytest.approx(pipe.outcome.score)


def test_outcomes_on_encrypted_models_are_not_plain(
    config: dict[str, Any], cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They name layers, which tell of the model."""
    from ovforge.run import pipeline

    real = pipeline.resolve

    def sealed(*arguments: Any, **more: Any) -> Any:
        return dataclasses.replace(real(*arguments, **more), protection=Protection())

    monkeypatch.setattr(pipeline, "resolve", sealed)
    first, again = (load(config, cache, quality={**config["quality"], "on_fail": "search"}) for _ in range(2))
    assert first.outcome is not None and first.outcome.kept == {"model": ["layer1", "layer4"]}
    assert again.outcome == first.outcome
    for entry in cache.entries():
        assert not any(b"layer4" in file.read_bytes() for file in entry.path.rglob("*") if file.is_file()), entry.label


def test_outcomes_are_json(config: dict[str, Any], cache: Cache) -> None:
    load(config, cache, quantize=GOOD)
    [entry] = [entry for entry in cache.entries() if entry.stage == "quality"]
    assert json.loads((entry.path / "outcome.json").read_text())["metric"] == "ssim"
    assert entry.label.startswith("quality: ssim 1.0")
