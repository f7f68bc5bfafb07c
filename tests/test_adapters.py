"""What stays adjustable while a pipeline runs: controls and adapters, by a small plugin that leaves variables."""

from __future__ import annotations

import gc
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset6
from openvino import opset13 as ops
from openvino.op.util import Variable, VariableInfo
from pydantic import BaseModel, ConfigDict

import ovforge
from ovforge import Use, hookimpl, testing
from ovforge.contracts.extensions import GraphTransformExtension, LoaderExtension, TaskExtension
from ovforge.contracts.stages import Match, Phase, Report, Skipped
from ovforge.errors import InputError, ModelError
from ovforge.model.bundle import Control, ModelBundle
from ovforge.model.results import ImagesResult
from ovforge.model.sources import Source
from ovforge.plugins.catalogue import Registry
from ovforge.plugins.manager import Plugins
from ovforge.run.requests import _ObservedRequest
from ovforge.store.cache import Cache


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SmallLoader:
    def __init__(self, options: None) -> None: ...

    def can_load(self, source: Source) -> Match:
        return Match.YES

    def load(self, source: Source) -> ModelBundle:
        return testing.small_bundle()


def variable(model: ov.Model, name: str, shape: list[int], first: Any) -> ov.Node:
    info = VariableInfo()
    info.data_shape, info.data_type, info.variable_id = ov.PartialShape(shape), ov.Type.f32, name
    made = Variable(info)
    read = opset6.read_value(ops.constant(np.asarray(first, np.float32)), made)
    model.add_variables([made])
    model.add_sinks([opset6.assign(read, made)])
    return read


def behind(model: ov.Model, change: Any) -> None:
    """Put `change` behind the model's output y."""
    result = model.get_results()[0]
    source = result.input_value(0)
    names = source.get_names()
    changed = change(source)
    source.get_tensor().set_names(set())
    changed.output(0).get_tensor().set_names(names)
    result.input(0).replace_source_output(changed.output(0))


class Gain:
    """Multiplies by a control."""

    def __init__(self, options: None) -> None: ...

    def apply(self, bundle: ModelBundle) -> Report:
        model = bundle.models["model"]
        behind(model, lambda y: ops.multiply(y, variable(model, "gain", [1], [1])))
        bundle.controls["gain"] = Control("model", "gain", (1,), 1.0, "What the result is multiplied by")
        return Report(roles=("model",), applied=["gain"])


class RowsOptions(Strict):
    name: str
    rows: tuple[float, ...] = (1.0,)
    offset: float = 0.0
    weight: float = 1.0
    prepare: bool = True
    place: str = "rows"


class Rows:
    """Adds the sum of an open list of numbers, and an offset: each adapter brings some."""

    def __init__(self, options: RowsOptions) -> None:
        self.options = options

    def apply(self, bundle: ModelBundle) -> Report:
        if not self.options.prepare:
            return Report(notes=["nothing to prepare"])
        model = bundle.models["model"]
        if not bundle.adapters:
            rows, offset = variable(model, "rows", [-1, 1], [[0]]), variable(model, "offset", [1], [0])
            behind(model, lambda y: ops.add(y, ops.reduce_sum(rows, ops.constant(np.int64(0)), False)))
            behind(model, lambda y: ops.add(y, offset))
        bundle.adapters[self.options.name] = {"model": {"rows": [-1, 1], "offset": [1]}}
        return Report(roles=("model",), applied=["rows"])


class RunningRows:
    def __init__(self, options: RowsOptions) -> None:
        self.name, self.weight = options.name, options.weight
        self.notes: list[str] = []
        self.skipped = [] if options.place == "rows" else [Skipped("a part", "there is no place")]
        self._options = options

    def values(self, weight: float) -> Mapping[str, Mapping[str, Any]]:
        rows = weight * np.array(self._options.rows, np.float32).reshape(-1, 1)
        offset = weight * np.array([self._options.offset], np.float32)
        return {"model": {"offset": offset, self._options.place: rows}}


def running_rows(options: RowsOptions, bundle: ModelBundle) -> RunningRows | None:
    return RunningRows(options) if bundle.adapters else None


class RunInputs(Strict):
    x: float = 1.0


class RunTask:
    """Keeps one request, and makes another for each call."""

    def __init__(self, options: None, context: Any) -> None:
        self._bundle, self._kept = context.bundle, None

    def __call__(self, inputs: RunInputs, progress: Any) -> ImagesResult:
        from PIL import Image

        model = self._bundle["model"]
        if self._kept is None:
            self._kept = model.create_infer_request()
        x = np.full((1, 4), inputs.x, np.float32)
        kept, fresh = self._kept.infer({"x": x})["y"].copy(), model({"x": x})["y"]
        assert np.array_equal(kept, fresh)
        self._kept.start_async({"x": x})
        self._kept.wait()
        assert np.array_equal(self._kept.get_output_tensor(0).data, fresh)
        return ImagesResult(
            provenance={"inputs": {"x": inputs.x}}, images=[Image.new("RGB", (1, 1))], seeds=[0], latents=kept
        )

    def examples(self, count: int) -> list[Any]:
        return []


plugin = types.ModuleType("adjustable")


@hookimpl
def ovforge_loaders() -> Iterator[LoaderExtension]:
    yield LoaderExtension(name="small", summary="Small", factory=SmallLoader, converts=True)


@hookimpl
def ovforge_graph_transforms() -> Iterator[GraphTransformExtension]:
    yield GraphTransformExtension(name="gain", summary="Gain", factory=Gain, phase=Phase.ATTACH)
    yield GraphTransformExtension(
        name="rows", summary="Rows", config=RowsOptions, factory=Rows, phase=Phase.ATTACH, adapter=running_rows
    )


@hookimpl
def ovforge_tasks() -> Iterator[TaskExtension]:
    yield TaskExtension(name="run", summary="Run", inputs=RunInputs, factory=RunTask, roles=("model",))


for hook in (ovforge_loaders, ovforge_graph_transforms, ovforge_tasks):
    setattr(plugin, hook.__name__, hook)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "a.small").write_text("x")
    return tmp_path / "a.small"


def pipeline(source: Path, *transforms: str | Use, cache: Cache | None = None, **more: Any) -> ovforge.Pipeline:
    plugins = Plugins(Registry({}), found=())
    plugins.register(plugin, "under-test")
    device = Use("cpu", precision="f32")
    return ovforge.Pipeline(
        "run", source, load={"use": "small"}, transforms=transforms, device=device, plugins=plugins, cache=cache, **more
    )


def result(pipe: ovforge.Pipeline) -> Any:
    return pipe(x=1.0).latents[0]


def test_controls_are_listed_set_and_part_of_the_provenance(source: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second time from the cache
        pipe = pipeline(source, "gain", cache=Cache(tmp_path / "cache"))
        plain = result(pipe)
        assert dict(pipe.controls) == {"gain": 1.0}
        assert pipe.controls.summary("gain") == "What the result is multiplied by"
        assert "controls" not in pipe.provenance()
        pipe.controls["gain"] = 3
        assert np.array_equal(result(pipe), 3 * plain)
        assert pipe().provenance["controls"] == {"gain": 3.0}
        del pipe.controls["gain"]
        assert np.array_equal(result(pipe), plain)


@pytest.mark.parametrize("wrong", [{"gian": 1.0}, {"gain": float("nan")}, {"gain": True}, {"gain": "2"}])
def test_a_wrong_control_is_refused(source: Path, wrong: dict[str, Any]) -> None:
    pipe = pipeline(source, "gain")
    with pytest.raises(InputError) as error:
        pipe.controls.update(wrong)
    assert "gain" in str(error.value)
    assert dict(pipe.controls) == {"gain": 1.0}


def test_adapters_join_in_open_dimensions_and_add_in_others(source: Path) -> None:
    plain = result(pipeline(source))
    pipe = pipeline(
        source, Use("rows", name="one", rows=[1, 2], offset=10), Use("rows", name="two", rows=[5], offset=0.5, weight=2)
    )
    assert dict(pipe.adapters) == {"one": 1.0, "two": 2.0}
    assert np.allclose(result(pipe), plain + (3 + 10) + 2 * (5 + 0.5))
    pipe.adapters.set({"one": 0.5})
    assert dict(pipe.adapters) == {"one": 0.5, "two": 0.0}
    assert np.allclose(result(pipe), plain + 0.5 * 13)
    pipe.adapters.off()
    assert np.array_equal(result(pipe), plain)
    pipe.adapters.set({"two": 1, "one": -1})
    assert np.allclose(result(pipe), plain + 5.5 - 13)
    assert pipe().provenance["adapters"] == {"one": {"weight": -1.0}, "two": {"weight": 1.0}}


def test_another_adapter_is_loaded_into_a_running_pipeline(source: Path, tmp_path: Path) -> None:
    pipe = pipeline(source, Use("rows", name="one"))
    before = result(pipe)
    assert pipe.adapters.load("rows", name="three", rows=[1, 2, 3], weight=0.5) == "three"
    assert np.allclose(result(pipe), before + 3)
    made = pipe()
    assert made.provenance["adapters"]["three"]["use"] == {
        "use": "rows", "name": "three", "rows": [1, 2, 3], "weight": 0.5,
    }  # fmt: skip
    picture = made.save(tmp_path / "picture.png")[0]
    again = ovforge.load(picture, plugins=pipe._session.plugins, cache=None)  # a picture brings its adapters back
    assert dict(again.adapters) == {"one": 1.0, "three": 0.5}
    assert np.array_equal(result(again), result(pipe))
    pipe.adapters.unload("three")
    assert dict(pipe.adapters) == {"one": 1.0}
    assert np.array_equal(result(pipe), before)
    with pytest.raises(InputError, match="no 'three'"):
        pipe.adapters.set({"three": 1.0})


def test_what_finds_no_place_is_said_and_changes_nothing(source: Path) -> None:
    pipe = pipeline(source, Use("rows", name="one"))
    before, now = result(pipe), dict(pipe.adapters)
    with pytest.raises(ModelError, match="a part could not be applied: there is no place"):
        pipe.adapters.load("rows", name="lost", place="elsewhere")
    with pytest.raises(InputError, match="there is an adapter 'one'"):
        pipe.adapters.load("rows", name="one")
    loose = pipeline(source, Use("rows", name="one"), strict=False)
    with pytest.raises(ModelError, match="no place for elsewhere"):
        loose.adapters.load("rows", name="lost", place="elsewhere")
    with pytest.raises(ModelError, match=r"takes \[1\]"):
        loose.adapters.load("rows", name="wide", place="offset", rows=[1, 2])
    assert dict(loose.adapters) == dict(pipe.adapters) == now
    assert np.array_equal(result(pipe), before)
    with pytest.raises(ovforge.OvforgeError, match="not an adapter that can be loaded"):
        pipeline(source).adapters.load("rows", name="one")


def test_switching_a_hundred_times_leaves_nothing_behind(source: Path) -> None:
    pipe = pipeline(source, Use("rows", name="one", rows=[0.1, 0.2]), Use("rows", name="two", rows=[0.3]))
    on = result(pipe)
    pipe.adapters.off()
    off = result(pipe)
    gc.collect()
    counted = len(gc.get_objects())
    for _ in range(100):
        pipe.adapters.set({"one": 1, "two": 1})
        assert np.array_equal(result(pipe), on)
        pipe.adapters.off()
        assert np.array_equal(result(pipe), off)
    gc.collect()
    assert len(gc.get_objects()) - counted < 100
    assert sum(isinstance(item, _ObservedRequest) for item in gc.get_objects()) == 1
    pipe.adapters.unload()
    assert dict(pipe.adapters) == {}
    assert np.array_equal(result(pipe), off)
