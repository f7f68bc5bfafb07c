"""What plugins do wrong is told with their name, and does not reach other pipelines."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openvino import opset13 as ops
from pydantic import BaseModel, ConfigDict

import ovforge
from ovforge import hookimpl, testing
from ovforge.contracts import (
    DeviceExtension,
    GraphTransformExtension,
    LoaderExtension,
    Match,
    Phase,
    QuantizerExtension,
    Report,
    SchedulerExtension,
    SourceExtension,
    TaskExtension,
)
from ovforge.errors import ConfigError, ModelError, OvforgeError, PluginError
from ovforge.model import ModelBundle, Result
from ovforge.plugins.catalogue import Registry
from ovforge.plugins.manager import Plugins
from ovforge.store import Cache


class Inputs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    x: float = 1.0
    schedule: bool = False


class Run:
    def __init__(self, options: Any, context: Any) -> None:
        self.context = context

    def __call__(self, inputs: Inputs, progress: Any) -> Any:
        progress(ovforge.Progress("run", 0, 1))
        if FAULTS.get("task"):
            return FAULTS["task"]()
        if inputs.schedule:
            self.context.scheduler()
        result = Result()
        outputs = self.context.bundle["model"](np.full((1, 4), inputs.x, np.float32))
        result.provenance = {"y": outputs[0].ravel().tolist()}
        return result

    def examples(self, count: int) -> list[Inputs]:
        return [Inputs(x=n) for n in range(count)]


class Load:
    def __init__(self, options: Any) -> None: ...

    def can_load(self, source: Any) -> Match:
        return Match.YES if any(path.endswith(".small") for path in source.files()) else Match.NO

    def load(self, source: Any) -> Any:
        return FAULTS["load"]() if FAULTS.get("load") else testing.small_bundle()


class Change:
    """Adds to the outputs, and reports what the test wants."""

    def __init__(self, options: Any) -> None: ...

    def apply(self, bundle: ModelBundle) -> Any:
        return FAULTS["change"](bundle)

    def quantize(self, bundle: ModelBundle, calibration: Any, keep: Any = None) -> Any:
        return FAULTS["change"](bundle)


class Place:
    def __init__(self, options: Any) -> None: ...

    def plan(self) -> Any:
        return FAULTS["device"]()


FAULTS: dict[str, Callable[..., Any]] = {}
WHERE = "of the plugin faulty 1.2"


class Plugin:
    @hookimpl
    def ovforge_loaders(self) -> Any:
        yield LoaderExtension(name="small", summary="s", factory=Load, converts=True)

    @hookimpl
    def ovforge_graph_transforms(self) -> Any:
        yield GraphTransformExtension(name="change", summary="s", factory=Change, phase=Phase.STRUCTURE)
        yield GraphTransformExtension(name="again", summary="s", factory=Change, phase=Phase.STRUCTURE, recompute=True)

    @hookimpl
    def ovforge_quantizers(self) -> Any:
        yield QuantizerExtension(name="lower", summary="s", factory=Change, needs="nothing")

    @hookimpl
    def ovforge_schedulers(self) -> Any:
        yield SchedulerExtension(name="bad", summary="s", factory=lambda options, config: FAULTS["scheduler"]())

    @hookimpl
    def ovforge_devices(self) -> Any:
        yield DeviceExtension(name="moon", summary="s", factory=Place)

    @hookimpl
    def ovforge_tasks(self) -> Any:
        yield TaskExtension(name="run", summary="s", factory=Run, inputs=Inputs, roles=("model",))


@pytest.fixture
def plugins() -> Plugins:
    FAULTS.clear()
    module = types.ModuleType("faulty")
    for name in dir(Plugin):
        if name.startswith("ovforge_"):
            setattr(module, name, getattr(Plugin(), name))
    found = Plugins(Registry({}), found=())
    found.register(module, "faulty", "1.2")
    return found


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "x.small").write_text("")
    return {"task": "run", "load": str(tmp_path / "x.small"), "device": {"precision": "f32"}}


def boom() -> Any:
    raise ZeroDivisionError("no luck\nand more")


def nothing(*arguments: Any) -> None:
    return None


@pytest.mark.parametrize("fault", [boom, nothing])
@pytest.mark.parametrize(
    ("stage", "change", "extension"),
    [
        ("load", {}, "loader 'small'"),
        ("change", {"transform": ["change"]}, "transform 'change'"),
        ("change", {"transform": ["again"]}, "transform 'again'"),
        ("change", {"quantize": ["lower"]}, "quantizer 'lower'"),
        ("device", {"device": "moon"}, "device 'moon'"),
        ("scheduler", {"scheduler": "bad", "input": {"schedule": True}}, "scheduler 'bad'"),
        ("task", {}, "task 'run'"),
    ],
)
def test_a_fault_names_the_plugin_and_the_stage(
    plugins: Plugins, config: dict[str, Any], cache: Cache, stage: str, change: Any, extension: str, fault: Any
) -> None:
    FAULTS[stage] = (lambda bundle: fault()) if stage == "change" else fault
    with pytest.raises(PluginError) as raised:
        ovforge.load({**config, **change}, plugins=plugins, cache=cache)()
    assert raised.value.where == f"{extension} {WHERE}"
    assert raised.value.hint
    if fault is boom:
        assert raised.value.what == "it raised ZeroDivisionError: no luck"
        assert isinstance(raised.value.__cause__, ZeroDivisionError), "the traceback is kept"
    else:
        assert raised.value.what.startswith("it returned None instead of ")
    FAULTS.clear()
    FAULTS["change"] = lambda bundle: Report()
    if stage == "load":
        assert ovforge.load(config, plugins=plugins, cache=cache)().provenance["y"], "nothing of it is stored"


def test_what_a_callback_raises_is_the_callers_own(plugins: Plugins, config: dict[str, Any]) -> None:
    class Mine(Exception): ...

    def callback(moment: Any) -> None:
        raise Mine

    pipe = ovforge.load(config, plugins=plugins, cache=None)
    with pytest.raises(Mine):
        pipe(progress=callback)
    with pytest.raises(Mine):
        ovforge.load(config, plugins=plugins, cache=None, progress=callback)


def double(bundle: ModelBundle) -> None:
    """Change the model in place."""
    model = bundle.models["model"]
    result = model.get_results()[0]
    changed = ops.multiply(result.input_value(0), ops.constant(np.float32(2)))
    result.input(0).replace_source_output(changed.output(0))
    model.validate_nodes_and_infer_types()


@pytest.mark.parametrize("change", [{"transform": ["change"]}, {"transform": ["again"]}, {"quantize": ["lower"]}])
def test_a_change_that_is_not_reported_does_not_reach_other_pipelines(
    plugins: Plugins, config: dict[str, Any], cache: Cache, change: dict[str, Any]
) -> None:
    def lie(bundle: ModelBundle) -> Report:
        double(bundle)
        return Report(roles=(), applied=["nothing at all"])

    plain = ovforge.load(config, plugins=plugins, cache=None)().provenance["y"]
    FAULTS["change"] = lie
    with pytest.warns(UserWarning, match="model was changed, and the .* did not report it: tell the authors of faulty"):
        first = ovforge.load({**config, **change}, plugins=plugins, cache=cache)
    assert first.reports[0].roles == ("model",)
    changed = first().provenance["y"]
    assert np.allclose(changed, 2 * np.array(plain))
    assert ovforge.load(config, plugins=plugins, cache=cache)().provenance["y"] == plain
    assert ovforge.load({**config, **change}, plugins=plugins, cache=cache)().provenance["y"] == changed
    assert ovforge.load(config, plugins=plugins, cache=cache)().provenance["y"] == plain


def _set_config(bundle: ModelBundle) -> Report:
    bundle.configs["model"] = {"x": object()}
    return Report(roles=("model",))


def _forget_configs(bundle: ModelBundle) -> Report:
    bundle.configs = None  # type: ignore[assignment]
    return Report(roles=("model",))


def _set_role(name: Any, model: Any) -> Callable[[ModelBundle], Report]:
    def change(bundle: ModelBundle) -> Report:
        bundle.models[name] = testing.small_bundle().models["model"] if model is None else model
        return Report(roles=("model",))

    return change


def _leave(bundle: ModelBundle) -> Report:
    raise SystemExit(3)


@pytest.mark.parametrize("change", [
    _set_config, _forget_configs, _leave, _set_role("model", "/etc/passwd"), _set_role("../../x", None),
    _set_role("", None), _set_role(3, None), *(
        lambda bundle, wrong=wrong: Report(**wrong)
        for wrong in ({"roles": None}, {"roles": "model"}, {"skipped": ["x"]}, {"notes": 3}, {"applied": [None]})
    ),
])  # fmt: skip
def test_whatever_a_transform_does_is_blamed_on_it(
    plugins: Plugins, config: dict[str, Any], cache: Cache, change: Callable[[ModelBundle], Report]
) -> None:
    FAULTS["change"] = change
    for kept in (cache, None):
        with pytest.raises(PluginError, match=f"transform 'change' {WHERE}: it "):
            ovforge.load({**config, "transform": ["change"]}, plugins=plugins, cache=kept)()


def test_what_a_loader_says_of_a_models_content_is_not_believed(
    plugins: Plugins, config: dict[str, Any], cache: Cache, tmp_path: Path
) -> None:
    def load(factor: float) -> ModelBundle:
        bundle = testing.small_bundle()
        if factor != 1:
            double(bundle)
        bundle.identity["model"] = "always the same"
        return bundle

    loader = LoaderExtension(name="liar", summary="s", factory=Load)
    module = types.ModuleType("liar")
    module.ovforge_loaders = hookimpl(lambda: [loader])  # type: ignore[attr-defined]
    plugins.register(module, "liar", "1")
    (tmp_path / "y.small").write_text("another")
    results = []
    for factor, file in ((1.0, "x.small"), (2.0, "y.small")):
        FAULTS["load"] = lambda factor=factor: load(factor)
        pipeline = {**config, "load": {"source": str(tmp_path / file), "use": "liar"}}
        results.append(ovforge.load(pipeline, plugins=plugins, cache=cache)().provenance["y"])
    assert np.allclose(2 * np.array(results[0]), results[1])


def test_a_model_that_was_only_read_keeps_its_identity(plugins: Plugins, config: dict[str, Any], cache: Cache) -> None:
    def look(bundle: ModelBundle) -> Report:
        assert bundle.models["model"].get_ops()
        return Report()

    before = ovforge.load(config, plugins=plugins, cache=cache)
    before()
    FAULTS["change"] = look
    after = ovforge.load({**config, "transform": ["change"]}, plugins=plugins, cache=cache)
    assert after.bundle.identity == before.bundle.identity
    assert after.compiled.compiled("model").cached, "and its compiled model is found again"


def test_a_recomputation_that_changes_other_models_is_refused(
    plugins: Plugins, config: dict[str, Any], cache: Cache
) -> None:
    def honest(bundle: ModelBundle) -> Report:
        double(bundle)
        return Report(roles=("model",))

    FAULTS["change"] = honest
    ovforge.load({**config, "transform": ["again"]}, plugins=plugins, cache=cache)()
    FAULTS["change"] = lambda bundle: Report()
    for entry in cache.entries():
        if entry.stage == "compile":
            cache.remove(entry.key)
    with pytest.raises(PluginError, match="it changed nothing now, and model the first time"):
        ovforge.load({**config, "transform": ["again"]}, plugins=plugins, cache=cache)()


def test_parts_beside_a_whole_config_are_refused(plugins: Plugins, config: dict[str, Any]) -> None:
    whole = ovforge.PipelineConfig.of(config)
    for part in (
        {"scheduler": "lcm"},
        {"source": "x"},
        {"transforms": ["change"]},
        {"optimize": False},
        {"device": "gpu"},
    ):
        with pytest.raises(ConfigError, match="is given beside a whole config"):
            ovforge.Pipeline(whole, plugins=plugins, cache=None, **part)
    assert ovforge.Pipeline.from_config(whole, plugins=plugins, cache=None)().provenance["y"]


def test_timings_of_results_add_up(plugins: Plugins, config: dict[str, Any]) -> None:
    pipe = ovforge.load(config, plugins=plugins, cache=None)
    assert {"load", "compile"} <= set(pipe.start_timings().spans)
    assert not {"load", "compile"} & set(pipe().timings.spans)


# -- the one door -----------------------------------------------------------------------------------------------------


def test_what_a_conversion_read_besides_its_source_counts(
    plugins: Plugins, config: dict[str, Any], cache: Cache, tmp_path: Path
) -> None:
    labels, made = tmp_path / "labels.txt", []
    labels.write_text("cat")

    def load() -> ModelBundle:
        made.append(ovforge.open_file(labels).read("labels.txt"))
        bundle = testing.small_bundle()
        bundle.assets["labels.txt"] = made[-1]
        return bundle

    FAULTS["load"] = load
    for content in ("cat", "cat", "dog", "dog"):
        labels.write_text(content)
        bundle = ovforge.open_model(config["load"], plugins=plugins, cache=cache)
        assert bundle.assets["labels.txt"] == content.encode()
    assert made == [b"cat", b"dog"]


def test_a_damaged_entry_is_made_again_when_its_model_is_read(
    plugins: Plugins, config: dict[str, Any], cache: Cache
) -> None:
    made = []

    def load() -> ModelBundle:
        made.append(1)
        return testing.small_bundle()

    FAULTS["load"] = load
    ovforge.open_model(config["load"], plugins=plugins, cache=cache)
    [entry] = cache.entries()
    weights = next(entry.path.rglob("*.bin"))
    data = bytearray(weights.read_bytes())
    data[5] ^= 64
    weights.write_bytes(data)
    bundle = ovforge.open_model(config["load"], plugins=plugins, cache=cache)
    with pytest.warns(UserWarning, match="damaged"):
        model = bundle.models["model"]
    x = np.ones((1, 4), np.float32)
    assert np.array_equal(testing.run(model, {"x": x})["y"], testing.run(testing.small_model(), {"x": x})["y"])
    assert len(made) == 2


def test_without_a_driver_quantizers_that_need_data_say_what_to_install(
    plugins: Plugins, config: dict[str, Any]
) -> None:
    def ask(bundle: ModelBundle) -> Report:
        double(bundle)
        return Report(roles=("model",))

    FAULTS["change"] = ask
    assert ovforge.load({**config, "quantize": ["lower"]}, plugins=plugins, cache=None)().provenance["y"]
    here = Plugins(Registry.load(Path("none.toml")), found=())
    with pytest.raises(ConfigError, match="no plugin here reads this section") as raised:
        ovforge.load({**config, "quantize": ["lower"], "calibration": {"samples": 3}}, plugins=_with(here, plugins))
    assert raised.value.hint == "Run: pip install ovforge-quality"
    with pytest.raises(ConfigError, match="unknown key `calibratio`"):
        ovforge.load({**config, "calibratio": {"samples": 3}}, plugins=plugins)


def _with(catalogued: Plugins, plugins: Plugins) -> Plugins:
    catalogued._offers |= plugins._offers
    return catalogued


def test_errors_are_ours(plugins: Plugins, config: dict[str, Any]) -> None:
    def said() -> Any:
        raise ModelError("the model says no")

    FAULTS["load"] = said
    with pytest.raises(OvforgeError, match="the model says no"):
        ovforge.load(config, plugins=plugins, cache=None)


class Blind:
    def __init__(self, options: Any) -> None: ...

    def can_open(self, source: Any) -> bool:
        return bool(boom())


@pytest.mark.parametrize("factory", ["ovforge_nowhere.opener:Opener", lambda options: boom(), Blind])
def test_a_broken_source_plugin_stops_only_what_needs_it(
    factory: Any, plugins: Plugins, config: dict[str, Any], tmp_path: Path
) -> None:
    broken = types.ModuleType("broken")
    hook = hookimpl(lambda: [SourceExtension(name="broken", summary="s", factory=factory)])
    broken.ovforge_sources = hook  # type: ignore[attr-defined]
    plugins.register(broken, "broken", "1.0")
    with pytest.warns(UserWarning, match="the plugin broken is left out: it opens no source: it ") as told:
        assert ovforge.load(config, plugins=plugins, cache=None)().provenance["y"]
    assert len(told) == 1
    (tmp_path / "x.hidden").write_text("")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ModelError, match="no loader knows what this is") as unknown,
    ):
        ovforge.load({**config, "load": str(tmp_path / "x.hidden")}, plugins=plugins, cache=None)
    assert "the plugin broken: it opens no source: it " in str(unknown.value.hint)
    if factory is not Blind:
        with (
            pytest.warns(UserWarning, match="left out"),
            pytest.raises(PluginError, match="the plugin broken: it opens no source"),
        ):
            ovforge.load({**config, "load": {"source": config["load"], "key": {}}}, plugins=plugins, cache=None)
