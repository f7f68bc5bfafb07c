"""The plugin keeps ovforge's contract, and models are compiled for as many threads as the config says."""

from __future__ import annotations

import pytest
from ovforge import testing
from ovforge.errors import DeviceError
from ovforge.model import core

import ovforge_my_plugin


def device(**options: object) -> object:
    described = testing.extension(ovforge_my_plugin, "device", "my-plugin")
    return described.create(described.options_model()(**options))


def test_contract() -> None:
    testing.check_plugin(ovforge_my_plugin)
    testing.check_device(ovforge_my_plugin, "my-plugin")


def test_a_model_is_compiled_for_so_many_threads() -> None:
    plan = device(threads=1).plan()
    compiled = core().compile_model(testing.small_model(), plan.device, dict(plan.properties))
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_more_threads_than_processors_are_refused() -> None:
    with pytest.raises(DeviceError, match="100000 threads"):
        device(threads=100_000).plan()
