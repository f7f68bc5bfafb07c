"""Arguments of the Python API with wrong types or values: an error that names the argument, never a traceback."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ovforge
from ovforge.errors import OvforgeError

MODEL = "package:ovforge_lcm/model"
CONFIG = ovforge.PipelineConfig.of({"task": "text-to-image", "load": MODEL})
WRONG: tuple[Any, ...] = (
    None, 3, -1, 1.5, float("nan"), b"x", "", "\0", "nope", "\ud800", "x" * 5000, "/dev/null", [], [1],
    ["nope"], (), {}, {"nope": 1}, {"nope"}, object(),
)  # fmt: skip
CALLS: dict[Callable[..., Any], dict[str, Any]] = {
    ovforge.Pipeline: {"task": "text-to-image", "source": MODEL},
    ovforge.Pipeline.from_config: {"config": CONFIG},
    ovforge.load: {"config": CONFIG},
    ovforge.plan: {"config": CONFIG},
    ovforge.prepare: {"config": CONFIG},
    ovforge.open_model: {"source": MODEL},
    ovforge.find_loader: {"source": MODEL},
    ovforge.describe_protection: {"source": MODEL, "base": Path()},
    ovforge.open_file: {"path": "x"},
    ovforge.Cache: {"root": "x"},
    ovforge.PipelineConfig.of: {"value": {}},
}


def _parameters() -> Iterator[Any]:
    for function, arguments in CALLS.items():
        for name, parameter in inspect.signature(function).parameters.items():
            # Anything may observe; and a folder that is not there does not matter to a config without paths.
            if parameter.kind is not parameter.VAR_KEYWORD and name not in ("observe", "base"):
                yield pytest.param(function, arguments, name, parameter.default, id=f"{function.__qualname__}-{name}")


@pytest.mark.parametrize(("function", "arguments", "name", "default"), list(_parameters()))
def test_wrong_arguments_are_named(
    function: Callable[..., Any], arguments: dict[str, Any], name: str, default: object
) -> None:
    for value in WRONG:
        if value or default is inspect.Parameter.empty:  # what is empty may be left out, too
            with contextlib.suppress(OvforgeError):
                function(**{**arguments, name: value})


def test_wrong_arguments_of_a_running_pipeline_are_named() -> None:
    pipeline = ovforge.Pipeline.from_config(CONFIG)
    result = pipeline("x", steps=1)
    calls: list[Callable[[Any], Any]] = [
        pipeline,
        lambda value: pipeline("x", value),
        lambda value: pipeline("x", steps=1, progress=value),
        *(lambda value, name=name: pipeline(**{"prompt": "x", "steps": 1, name: value}) for name in ("seed", "width", "count")),
        lambda value: pipeline.controls[value],
        lambda value: pipeline.controls.__setitem__(value, 1.0),
        pipeline.adapters.load,
        pipeline.adapters.set,
        pipeline.adapters.unload,
        result.save,
        result.check_path,
    ]  # fmt: skip
    for call in calls:
        for value in WRONG:
            with contextlib.suppress(OvforgeError):
                call(value)
    with pytest.raises(OvforgeError, match="there is no 'strength'"):
        pipeline.controls["strength"]
    assert "strength" not in pipeline.controls and pipeline.controls.get("strength") is None


def test_a_config_is_told_what_arguments_of_diffusers_are_called() -> None:
    given = {"task": "text-to-image", "load": MODEL, "input": {"num_inference_steps": 4, "clean_caption": True}}
    with pytest.raises(OvforgeError, match="`num_inference_steps` of diffusers is `steps` here; leave `clean_caption`"):
        ovforge.plan(given)
