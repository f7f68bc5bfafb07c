"""Each hook has an example that keeps its contract, and a section in docs/hooks.md."""

from __future__ import annotations

import gzip
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ovforge
from ovforge import testing
from ovforge.contracts import Calibration, QuantizerExtension, Report, hookimpl, hookspecs
from ovforge.contracts.hookspecs import HOOK_OF_KIND

PAGE = Path(__file__).parents[1] / "docs" / "hooks.md"


def hooks() -> set[str]:
    """Return every hook that pluggy knows, whatever the tables say."""
    return {name for name, value in vars(hookspecs).items() if hasattr(value, "ovforge_spec")}


def example(kind: str) -> types.ModuleType:
    """Run the example in a hook's docstring as a module."""
    text = inspect.getdoc(getattr(hookspecs, HOOK_OF_KIND[kind]))
    assert text
    code = re.search(r"^Example.*?\n\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    assert code, f"{HOOK_OF_KIND[kind]} has no example"
    module = types.ModuleType(f"example_{kind}")
    sys.modules[module.__name__] = module  # pydantic looks a class's module up
    exec(compile(textwrap.dedent(code[1]), f"<{HOOK_OF_KIND[kind]}>", "exec"), vars(module))
    return module


def check_source(module: types.ModuleType, folder: Path) -> None:
    (folder / "plain").mkdir()
    (folder / "packed").mkdir()
    (folder / "plain" / "a.txt").write_bytes(b"text " * 100)
    (folder / "packed" / "a.txt.gz").write_bytes(gzip.compress(b"text " * 100))
    opened = testing.check_source(module, "gzip", folder / "packed", folder / "plain", encrypted=False)
    assert opened.read("a.txt", 4) == b"text"
    with pytest.raises(AssertionError):  # the check takes nothing for encrypted that is not
        testing.check_source(module, "gzip", folder / "packed", folder / "plain")


def check_loader(module: types.ModuleType, folder: Path) -> None:
    (folder / "ours").mkdir()
    (folder / "foreign").mkdir()
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(folder / "ours" / "matrix.npy", matrix)
    np.save(folder / "foreign" / "other.npy", matrix)
    bundle = testing.check_loader(module, "matrix", folder / "ours", folder / "foreign")
    model = bundle.models["model"]
    model.outputs[0].get_tensor().set_names({"y"})
    model.inputs[0].get_tensor().set_names({"x"})
    np.testing.assert_array_equal(testing.run(model, {"x": np.eye(2, dtype=np.float32)})["y"], matrix)


def check_transform(module: types.ModuleType, folder: Path) -> None:
    assert testing.check_transform(module, "squash", {}, testing.small_bundle).roles == ("model",)


def check_quantizer(module: types.ModuleType, folder: Path) -> None:
    report = testing.check_quantizer(module, "half", {}, testing.small_bundle, testing.FixedCalibration({}))
    assert report.layers == {"model": ["product"]}


def check_driver(module: types.ModuleType, folder: Path) -> None:
    testing.check_driver(module, "noise", {"noise": {"seed": 3}})
    seen: list[np.ndarray] = []

    class Watching:
        def __init__(self, options: None) -> None: ...

        def quantize(self, bundle: object, calibration: Calibration, keep: object = None) -> Report:
            seen.extend(record["x"] for record in calibration.inputs("model", 2))
            return Report(notes=["two records seen"])

    @hookimpl
    def ovforge_quantizers() -> list[QuantizerExtension]:
        return [QuantizerExtension(name="watcher", summary="Looks", factory=Watching, needs="inputs")]

    watcher = types.ModuleType("watcher")
    watcher.ovforge_quantizers = ovforge_quantizers
    testing.small_bundle().save(folder / "model")
    plugins = ovforge.Plugins(found=())
    plugins.register(module, "example")
    plugins.register(watcher, "watcher")
    config = {"load": str(folder / "model"), "quantize": ["watcher"], "noise": {"seed": 3}}
    ovforge.prepare(config, base=folder, plugins=plugins, cache=None)
    rng = np.random.default_rng(3)
    np.testing.assert_array_equal(seen, [np.float32(rng.normal(size=(1, 4))) for _ in range(2)])


def check_scheduler(module: types.ModuleType, folder: Path) -> None:
    testing.check_scheduler(module, "flow")
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    run = testing.extension(module, "scheduler", "flow").create(None, {}).start(4)
    theirs.set_timesteps(sigmas=run.sigmas[:-1].tolist())
    np.testing.assert_allclose(run.timesteps, theirs.timesteps.numpy(), rtol=1e-6)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(1, 4, 8, 8)).astype(np.float32)
    expected = torch.from_numpy(latents)
    for index, timestep in enumerate(theirs.timesteps):
        output = rng.normal(size=latents.shape).astype(np.float32)
        latents = run.step(output, index, latents, rng)
        expected = theirs.step(torch.from_numpy(output), timestep, expected).prev_sample
        np.testing.assert_allclose(latents, expected.numpy(), atol=1e-5)


def check_device(module: types.ModuleType, folder: Path) -> None:
    testing.check_device(module, "busy")


def check_task(module: types.ModuleType, folder: Path) -> None:
    testing.small_bundle().save(folder / "model")
    plugins = ovforge.Plugins(found=())
    plugins.register(module, "example")
    device = ovforge.Use("cpu", precision="f32")
    pipeline = ovforge.Pipeline("ask", source=folder / "model", device=device, plugins=plugins, cache=None)
    testing.check_task(module, "ask", pipeline.task)
    (file,) = pipeline((1.0, 0.0, 0.0, 0.0)).save(folder / "answer.txt")
    expected = testing.run(testing.small_model(), {"x": np.eye(4, dtype=np.float32)[:1]})["y"]
    assert file.read_text() == str(expected)


def check_tracker(module: types.ModuleType, folder: Path) -> None:
    testing.check_tracker(module, "nearest")


def check_command(module: types.ModuleType, folder: Path) -> None:
    testing.small_bundle().save(folder / "model")
    assert testing.check_command(module, "count", [str(folder)]) == "1\n"
    with pytest.raises(ovforge.OvforgeError, match="no such folder"):
        testing.check_command(module, "count", [str(folder / "nothing")])


CHECKS: dict[str, Callable[[types.ModuleType, Path], None]] = {
    name.removeprefix("check_"): value for name, value in list(vars().items()) if name.startswith("check_")
}


def test_every_hook_has_its_kind_and_its_check() -> None:
    assert hooks() == set(HOOK_OF_KIND.values())
    assert set(CHECKS) == set(HOOK_OF_KIND)


@pytest.mark.parametrize("kind", HOOK_OF_KIND)
def test_the_example_of_each_hook_keeps_its_contract(kind: str, tmp_path: Path) -> None:
    module = example(kind)
    try:
        testing.check_plugin(module, check_imports=False)
        CHECKS[kind](module, tmp_path)
    finally:
        del sys.modules[module.__name__]


def test_every_hook_has_a_section_in_the_docs() -> None:
    sections = dict(re.findall(r"^## `(ovforge_\w+)`\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    assert set(sections) == hooks()
    for kind, hook in HOOK_OF_KIND.items():
        text = sections[hook]
        assert f"::: ovforge.contracts.hookspecs.{hook}\n" in text, f"the section of {hook} does not show its example"
        assert f"plugins new NAME --kind {kind}" in text or kind in ("source", "driver")
        assert "**Must keep.**" in text
        assert f"testing.check_{kind}" in text
