"""Contract tests that any plugin, ours or yours, can run on itself.

    from ovforge import testing
    import my_plugin

    def test_contract():
        testing.check_plugin(my_plugin)

    def test_my_transform():
        testing.check_transform(my_plugin, "my-transform", {"scale": 0.5}, testing.small_bundle)

Each raises AssertionError that says what is not kept, and why it matters.
"""

from __future__ import annotations

import copy
import json
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ovforge.config.inputs import input_content
from ovforge.config.options import validate_options
from ovforge.contracts.extensions import Extension, TaskExtension
from ovforge.contracts.hookspecs import HOOK_OF_KIND
from ovforge.contracts.stages import Match, Phase, Report
from ovforge.errors import ConfigError, OvforgeError
from ovforge.model.bundle import ModelBundle
from ovforge.model.results import Result
from ovforge.model.sources import FileSource, Source
from ovforge.plugins.catalogue import Registry
from ovforge.plugins.manager import Plugins
from ovforge.store.processes import run_python

if TYPE_CHECKING:
    import openvino as ov

__all__ = [
    "FixedCalibration",
    "check_device",
    "check_loader",
    "check_plugin",
    "check_quantizer",
    "check_scheduler",
    "check_source",
    "check_task",
    "check_transform",
    "extension",
    "run",
    "small_bundle",
    "small_model",
]

HEAVY = ("torch", "diffusers", "transformers", "nncf", "tensorflow", "openvino")
"""Modules that a plugin must not import just to be listed."""


def small_model() -> ov.Model:
    """Return a model of one matrix product: input "x" float32 (batch, 4), output "y" (batch, 3)."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    x = ops.parameter([-1, 4], np.float32, name="x")
    weights = ops.constant(np.arange(12, dtype=np.float32).reshape(4, 3) / 12)
    product = ops.matmul(x, weights, False, False)
    model = ov.Model([product], [x], "small")
    model.inputs[0].get_tensor().set_names({"x"})
    model.outputs[0].get_tensor().set_names({"y"})
    return model


def run(model: ov.Model, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Run `model` on the CPU in float32, on every processor alike; return output name -> array."""
    from ovforge.model.runtime import core

    results = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(inputs)
    return {name: array for port, array in results.items() for name in port.names}


def small_bundle() -> ModelBundle:
    """Return a bundle with `small_model` as the role "model"."""
    bundle = ModelBundle()
    bundle.models["model"] = small_model()
    return bundle


def extension(module: types.ModuleType, kind: str, name: str) -> Extension:
    """Return what `module` offers, without its being installed."""
    return _plugins(module).find(kind, name).extension


def check_plugin(module: types.ModuleType, light: bool = True) -> list[Extension]:
    """Check what every plugin owes: it registers, describes itself, refuses unknown options, and imports lightly.

    Returns its extensions. `light=False` leaves the last out, for a plugin whose own module must be heavy.
    """
    plugins = _plugins(module)
    offers = [offer.extension for kind in HOOK_OF_KIND for offer in plugins.all(kind) if offer.plugin == "under-test"]
    assert offers, f"{module.__name__} offers nothing: is each function marked with @hookimpl?"
    for offered in offers:
        model = offered.options_model()
        if model is not None:
            assert model.model_config.get("extra") == "forbid", (
                f'the options of {offered.name} must have extra="forbid": a misspelt option would be ignored in silence'
            )
        assert callable(offered.factory) or ":" in offered.factory, f"{offered.name}: factory is no import string"
    if light:
        _check_light(module)
    return offers


def check_loader(
    module: types.ModuleType, name: str, ours: Path, foreign: Path, options: Mapping[str, Any] = {}
) -> ModelBundle:
    """Check a loader: it knows `ours`, not `foreign`, and what it loads survives being written and read."""
    loader = _create(module, "loader", name, options)
    assert loader.can_load(FileSource(ours)) > Match.NO, f"{name} does not know {ours}"
    assert loader.can_load(FileSource(foreign)) is Match.NO, f"{name} claims {foreign}, which is not its own"
    bundle: ModelBundle = loader.load(FileSource(ours))
    assert bundle.models, f"{name} found no model in {ours}"
    with TemporaryDirectory() as folder:
        saved = Path(folder) / "bundle"
        bundle.save(saved)
        again = ModelBundle.open(FileSource(saved))
        assert sorted(again.models) == sorted(bundle.models), "roles are lost when the bundle is written"
        assert again.configs == bundle.configs, "configs are lost when the bundle is written"
        assert again.assets == bundle.assets, "assets are lost when the bundle is written"
    return bundle


def check_source(
    module: types.ModuleType, name: str, ours: Path, plain: Path, options: Mapping[str, Any] = {}
) -> Source:
    """Check what opens encrypted sources: it knows `ours`, not `plain`, which is the same unencrypted.

    Its files are the plain ones by every way of reading, no path leads to them, and what it protects is unreadable on
    disk, and to any other purpose.
    """
    opener = _create(module, "source", name, options)
    expected = FileSource(plain)
    assert opener.can_open(FileSource(ours)), f"{name} does not know {ours}"
    assert not opener.can_open(expected), f"{name} claims {plain}, which is plain"
    source: Source = opener.open(FileSource(ours))
    assert source.files() == expected.files(), "names or sizes differ from the plain ones"
    for path, size in expected.files().items():
        data, buffer = expected.read(path), bytearray(size)
        source.read_into(path, memoryview(buffer))
        assert source.read(path) == data == buffer, f"{path} is another file than the plain one"
        assert source.read(path, 5) == data[:5], f"{path}: a part of it differs"
        assert source.local(path) is None, f"{path} is said to lie plain on disk"
        assert source.digest(path) != expected.digest(path), "a digest of plain content tells what the content is"
    assert source.protection is not None, "nothing protects what is made from it"
    with TemporaryDirectory() as folder:
        data = b"made from an encrypted model " * 1000
        source.protection.write(Path(folder), "a/b.bin", data, "this")
        for file in FileSource(Path(folder)).files():
            assert data[:29] not in (Path(folder) / file).read_bytes(), "what it protects is plain on disk"
        assert source.protection.open(Path(folder), "this").read("a/b.bin") == data, "what it protects is lost"
        try:
            source.protection.open(Path(folder), "that").read("a/b.bin")
        except OvforgeError:
            return source
        raise AssertionError("what was stored for one purpose opens for another")


def check_transform(
    module: types.ModuleType, name: str, options: Mapping[str, Any], make_bundle: Callable[[], ModelBundle]
) -> Report:
    """Check a graph transform: pure, honest about what it changed, and its result compiles."""
    return _check_change(module, "transform", name, options, make_bundle, lambda stage, bundle: stage.apply(bundle))


def check_quantizer(
    module: types.ModuleType,
    name: str,
    options: Mapping[str, Any],
    make_bundle: Callable[[], ModelBundle],
    calibration: Any,
) -> Report:
    """Check a quantizer in the same way, with recorded inputs; `FixedCalibration` holds some.

    It asks for no more than its description says that it needs, and keeps the layers that it is told to keep.
    """
    from ovforge.contracts.extensions import QuantizerExtension

    described = extension(module, "quantizer", name)
    assert isinstance(described, QuantizerExtension)
    model = described.options_model()
    need = described.needed(validate_options(model, options, where=name))
    watched = _Watched(calibration)
    report = _check_change(
        module, "quantizer", name, options, make_bundle, lambda stage, bundle: stage.quantize(bundle, watched)
    )
    allowed = {"nothing": set(), "inputs": {"inputs"}, "score": {"inputs", "score"}}[need]
    assert watched.asked <= allowed, f"{name} asks for {watched.asked}, and says needs={need!r}: the cache relies on it"
    for role, names in report.layers.items():
        assert role in report.roles, f"{name} lowered layers of {role}, which it does not name as changed"
        known = {op.get_friendly_name() for op in make_bundle().models[role].get_ops()}
        assert set(names) <= known, f"{name} names layers that {role} does not have: {sorted(set(names) - known)}"
        if len(names) > 1:
            _check_keep(module, name, options, make_bundle(), calibration, role, names)
    return report


def _check_keep(
    module: types.ModuleType,
    name: str,
    options: Mapping[str, Any],
    bundle: ModelBundle,
    calibration: Any,
    role: str,
    layers: Sequence[str],
) -> None:
    report = _create(module, "quantizer", name, options).quantize(bundle, calibration, {role: [layers[0]]})
    assert layers[0] not in report.layers.get(role, ()), f"{name} lowers {layers[0]}, which it was told to keep"
    assert report.layers.get(role), f"{name} lowers nothing more, where one layer of {len(layers)} is to be kept"


class FixedCalibration:
    """A stages.Calibration of given records by role, and of a function that scores models (by default, always 1)."""

    def __init__(
        self,
        records: Mapping[str, Sequence[Mapping[str, Any]]],
        score: Callable[[Mapping[str, ov.Model]], float] = lambda models: 1.0,
    ) -> None:
        self._records, self._score = records, score

    def inputs(self, role: str, count: int) -> Sequence[Mapping[str, Any]]:
        """Return the first `count` records of `role`."""
        return self._records[role][:count]

    def score(self, models: Mapping[str, ov.Model]) -> float:
        """Return what the function says."""
        return self._score(models)


class _Watched:
    """A calibration that knows what it was asked for."""

    def __init__(self, calibration: Any) -> None:
        self._calibration = calibration
        self.asked: set[str] = set()

    def inputs(self, role: str, count: int) -> Any:
        self.asked.add("inputs")
        return self._calibration.inputs(role, count)

    def score(self, models: Any) -> Any:
        self.asked.add("score")
        return self._calibration.score(models)


def check_scheduler(
    module: types.ModuleType,
    name: str,
    options: Mapping[str, Any] = {},
    model_config: Mapping[str, Any] = {},
    steps: Sequence[int] = (1, 2, 4),
) -> None:
    """Check a scheduler: shapes and types hold, runs repeat and do not disturb each other."""
    import numpy as np

    from ovforge.model.random import Generator

    scheduler = _create(module, "scheduler", name, options, model_config)
    for count in steps:
        finals = []
        for _ in range(2):
            run, rng, network = scheduler.start(count), Generator(1), Generator(2)
            latents = rng.randn((1, 4, 8, 8)) * np.float32(run.init_noise_sigma)
            for index in range(len(run.timesteps)):
                seen = run.scale_input(latents, index)
                before = latents.copy()
                latents = run.step(network.randn(seen.shape), index, latents, rng)
                assert latents.dtype == np.float32, f"{name} gives {latents.dtype}, not float32"
                assert latents.shape == before.shape, f"{name} changes the shape of latents"
            finals.append(latents)
        assert np.array_equal(finals[0], finals[1]), (
            f"{name}: the same seed gives other latents; a run must keep no hidden state"
        )
    late, clean, noise = (
        scheduler.start(max(steps), 0.5),
        Generator(1).randn((1, 4, 8, 8)),
        Generator(2).randn((1, 4, 8, 8)),
    )
    assert 0 <= late.first < len(late.timesteps), f"{name}: strength 0.5 begins at step {late.first}"
    noised = late.add_noise(clean, noise, late.first)
    assert (noised.dtype, noised.shape) == (clean.dtype, clean.shape), f"{name}: add_noise changes type or shape"
    assert not np.array_equal(noised, clean), f"{name}: add_noise adds nothing"


def check_device(module: types.ModuleType, name: str, options: Mapping[str, Any] = {}) -> None:
    """Check a device: its plan compiles a small model, or it says why it is not here."""
    from ovforge.model.runtime import core

    try:
        plan = _create(module, "device", name, options).plan()
    except OvforgeError as error:
        assert error.hint, f"{name} refuses without saying what to do"
        return
    core().compile_model(small_model(), plan.device, dict(plan.properties))


def check_task(module: types.ModuleType, name: str, task: Any = None) -> None:
    """Check a task's description: inputs are a strict pydantic model, roles are named.

    And, if a running `task` is given, its examples: they are inputs, always the same, and different ones; and that four
    threads which call it as a pipeline does get what one thread gets.
    """
    described = extension(module, "task", name)
    assert isinstance(described, TaskExtension)
    assert described.inputs_model().model_config.get("extra") == "forbid", (
        f'the inputs of {name} must have extra="forbid"'
    )
    assert described.roles, f"{name} names no role"
    kind = described.result_type()
    assert kind is None or (isinstance(kind, type) and issubclass(kind, Result) and kind.suffixes), (
        f"the result of {name} must be a class derived from ovforge.Result that names the files it is saved as"
    )
    if task is None:
        return
    model = described.inputs_model()
    examples = list(task.examples(8))
    assert all(isinstance(inputs, model) for inputs in examples), f"examples of {name} are no {model.__name__}"
    written = [input_content(inputs) for inputs in examples]
    assert len({json.dumps(one) for one in written}) == len(written), (
        f"{name} gives the same example twice: it would be calibrated and judged by"
    )
    fewer = [input_content(inputs) for inputs in task.examples(4)]
    same = fewer == written[:4]
    assert same, f"examples of {name} change from call to call: calibration would use what quality judges by"
    _check_threads(described, task, examples[:2])


def _check_threads(described: TaskExtension, task: Any, examples: Sequence[Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from ovforge.contracts.stages import ignore_progress
    from ovforge.run.turns import Turns

    turns = Turns(described)

    def call(inputs: Any) -> bytes:
        with turns:
            return _outputs(task(inputs, ignore_progress))

    expected = [call(inputs) for inputs in examples]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, [*examples, *examples]))
    assert found == expected * 2, f"{described.name} gives other results if several threads call it"


def _outputs(result: Any) -> bytes:
    """Return what a result holds but for how long it took and what it came from."""
    import pickle
    from dataclasses import fields

    names = [field.name for field in fields(result) if field.name not in ("timings", "provenance")]
    return pickle.dumps([getattr(result, name) for name in names])


def _check_change(
    module: types.ModuleType,
    kind: str,
    name: str,
    options: Mapping[str, Any],
    make_bundle: Callable[[], ModelBundle],
    change: Callable[[Any, ModelBundle], Report],
) -> Report:
    from ovforge.model.runtime import core

    described = extension(module, kind, name)
    phase = getattr(described, "phase", Phase.PRECISION)
    assert callable(phase) or isinstance(phase, Phase), f"{name} states no phase"
    first, second = make_bundle(), make_bundle()
    untouched = {role: _serialized(model) for role, model in first.models.items()}
    report = change(_create(module, kind, name, options), first)
    change(_create(module, kind, name, copy.deepcopy(options)), second)
    for role, model in first.models.items():
        same = _serialized(model) == untouched.get(role)
        assert same or role in report.roles, f"{name} changed {role} and does not report it: the cache would miss it"
        assert _serialized(model) == _serialized(second.models[role]), f"{name} is not pure: a second run differs"
        core().compile_model(model, "CPU")
    assert report.applied or report.skipped or report.notes, f"{name} reports neither what it did nor why not"
    return report


def _create(module: types.ModuleType, kind: str, name: str, options: Mapping[str, Any], *more: Any) -> Any:
    described = extension(module, kind, name)
    model = described.options_model()
    try:
        checked = validate_options(model, options, where=name)
    except ConfigError as error:
        raise AssertionError(f"the options given to the check are refused: {error}") from error
    return described.create(checked, *more)


def _plugins(module: types.ModuleType) -> Plugins:
    plugins = Plugins(Registry({}), found=())
    plugins.register(module, "under-test")
    return plugins


def _check_light(module: types.ModuleType) -> None:
    """Import the module in a fresh interpreter and look for heavy modules."""
    code = f"import sys, {module.__name__}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = run_python(["-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"{module.__name__} cannot be imported alone: {done.stderr[-500:]}"
    heavy = done.stdout.split()
    assert not heavy, (
        f"importing {module.__name__} imports {', '.join(heavy)}: name factories as import strings, so that "
        "listing plugins stays fast"
    )


def _serialized(model: ov.Model) -> bytes:
    """Return the model's XML and weights as bytes, without the names that OpenVINO numbers as it goes."""
    import re

    import openvino as ov

    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        ov.save_model(model, path, compress_to_fp16=False)
        xml = re.sub(rb' (name|id)="[^"]*"', b"", path.read_bytes())
        return xml + path.with_suffix(".bin").read_bytes()
