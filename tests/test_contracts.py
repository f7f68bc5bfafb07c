"""Every plugin of this repository keeps the contract, and the contract tests fail for those that break it."""

from __future__ import annotations

import importlib
import time
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import MappingProxyType

import pytest
import typer
from openvino import opset13 as ops
from pydantic import BaseModel, ConfigDict

from ovforge import testing
from ovforge.cli.program import make_command
from ovforge.contracts import (
    CommandExtension,
    LoaderExtension,
    QuantizerExtension,
    Report,
    SchedulerExtension,
    SourceExtension,
    TaskExtension,
)
from ovforge.contracts.hookspecs import hookimpl
from ovforge.errors import PluginError
from ovforge.model import ModelBundle, Result
from ovforge.plugins import Plugins
from ovforge.testing.plugin import _check_help

ENGINES = {entry.name for entry in entry_points(group="ovforge.engines")}
"""What brings no extension: engines of commands, which are found by name."""

OURS = sorted(entry.value for entry in entry_points(group="ovforge") if entry.name not in ENGINES)


@pytest.mark.parametrize("name", OURS)
def test_ours_keep_the_contract(name: str) -> None:
    module = importlib.import_module(name)
    for extension in testing.check_plugin(module):
        if extension.kind == "command":
            testing.check_command(module, extension.name)


def test_commands_that_are_built_in_explain_themselves() -> None:
    plugins = Plugins()
    ours = [offer for offer in plugins.all("command") if offer.plugin == "builtin"]
    assert {"run", "plan", "convert", "schema", "plugins", "cache"} <= {offer.extension.name for offer in ours}
    for offer in ours:
        _check_help(make_command(offer), [offer.extension.name])


class Open(BaseModel):
    """Options that take any key."""


class Required(BaseModel):
    """Options without a default."""

    model_config = ConfigDict(extra="forbid")
    token: str


def silent(number: int = 3) -> None:
    """Say nothing of its option."""


def undocumented() -> None:
    print(1 / 0)


def module_of(hook: str, *extensions: object) -> types.ModuleType:
    module = types.ModuleType("plugin_under_test")
    function = lambda: extensions  # noqa: E731
    function.__name__ = hook
    setattr(module, hook, hookimpl(function))
    return module


@pytest.mark.parametrize(
    ("hook", "extension", "reason"),
    [
        ("schedulers", SchedulerExtension(name="a", summary="s", factory="no.such:Thing"), "No module named 'no'"),
        ("schedulers", SchedulerExtension(name="a", summary="s", factory="json:Thing"), "no attribute 'Thing'"),
        ("schedulers", SchedulerExtension(name="a", summary="s", factory="json"), "not a valid import string"),
        ("loaders", LoaderExtension(name="a", summary="s", factory=print, config="json:JSONDecoder"), "pydantic.BaseModel"),
        ("loaders", LoaderExtension(name="a", summary="s", factory=print, config=Open), 'extra="forbid"'),
        ("tasks", TaskExtension(name="a", summary="s", factory=print, inputs=Open, roles=("m",)), 'extra="forbid"'),
        ("tasks", TaskExtension(name="a", summary="s", factory=print, inputs="a:b", roles=("m",)), "inputs"),
        ("sources", SourceExtension(name="a", summary="s", factory=print, config=Required), "must have defaults"),
        ("commands", CommandExtension(name="run", summary="s", factory=print), "'builtin' offers already"),
        ("commands", CommandExtension(name="a", summary="s", factory="json:__doc__"), "cannot be called"),
    ],
)  # fmt: skip
def test_check_plugin_refuses(hook: str, extension: object, reason: str) -> None:
    with pytest.raises((AssertionError, PluginError)) as raised:
        testing.check_plugin(module_of(f"ovforge_{hook}", extension), check_imports=False)
    assert reason in str(raised.value)


def test_check_command() -> None:
    def greet(name: str = typer.Option("you", help="Whom to greet.")) -> None:
        """Greet somebody."""
        print(f"hello {name}")

    def command(function: object) -> types.ModuleType:
        return module_of("ovforge_commands", CommandExtension(name="a", summary="s", factory=function))  # type: ignore[arg-type]

    assert testing.check_command(command(greet), "a", ["--name", "me"]) == "hello me\n"
    with pytest.raises(AssertionError, match="exit code 2"):
        testing.check_command(command(greet), "a", ["--nam", "me"])
    with pytest.raises(AssertionError, match="number has no help"):
        testing.check_command(command(silent), "a")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        testing.check_command(command(undocumented), "a", [])


class Halver:
    """Reports its layer, and halves it unless it is to be kept."""

    def __init__(self, options: None) -> None:
        pass

    def quantize(
        self, bundle: ModelBundle, calibration: object, keep: Mapping[str, Collection[str]] = MappingProxyType({})
    ) -> Report:
        kept = () if type(self) is Deaf else keep.get("model", ())
        model = bundle.models["model"]
        if "product" in kept:
            return Report(notes=["the only layer is kept"])
        weights = next(op for op in model.get_ops() if op.get_friendly_name() == "weights")
        halved = ops.constant(weights.data / 2, name="weights")
        next(iter(weights.output(0).get_target_inputs())).replace_source_output(halved.output(0))
        return Report(roles=("model",), layers={"model": ["product"]}, applied=["halved"])


class Deaf(Halver):
    """Does not keep what it is told to keep."""


@pytest.mark.parametrize(("factory", "sound"), [(Halver, True), (Deaf, False)])
def test_a_quantizer_that_reports_layers_passes_on_the_small_bundle(factory: type, sound: bool) -> None:
    extension = QuantizerExtension(name="a", summary="s", factory=factory, needs="nothing")
    module = module_of("ovforge_quantizers", extension)
    check = lambda: testing.check_quantizer(module, "a", {}, testing.small_bundle, testing.FixedCalibration({}))  # noqa: E731
    if sound:
        assert check().layers == {"model": ["product"]}
    else:
        with pytest.raises(AssertionError, match="told to keep"):
            check()


@dataclass
class Answer(Result):
    """What a call gives back of its input."""

    token: str = ""


class Mixed:
    """A task that keeps what a call works on where other calls find it."""

    def __call__(self, inputs: Required, progress: object) -> Answer:
        self.token = inputs.token
        time.sleep(0.05)
        return Answer(token=self.token)

    def examples(self, count: int) -> list[Required]:
        return [Required(token=str(number)) for number in range(count)]


@pytest.mark.parametrize("threads", [False, True])
def test_a_task_that_threads_disturb_is_found_unless_it_says_so(threads: bool) -> None:
    extension = TaskExtension(name="a", summary="s", factory=Mixed, inputs=Required, roles=("m",), threads=threads)
    module = module_of("ovforge_tasks", extension)
    if not threads:
        testing.check_task(module, "a", Mixed())  # calls take turns
        return
    with pytest.raises(AssertionError, match="several threads"):
        testing.check_task(module, "a", Mixed())
