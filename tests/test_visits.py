"""One pipeline for several people: what is set for one run only, another scheduler without compiling, an end of runs."""

from __future__ import annotations

import numpy as np
import pytest

import ovforge
from ovforge import Pipeline, Progress, Stop, Use, adjusted
from ovforge.errors import Cancelled, ConfigError, InputError, PluginError

MODEL = "package:ovforge_lcm/model"
PENCIL = Use("lora", path="package:ovforge_sd_lora/examples/pencil.safetensors", mode="runtime", scale=0.5)


def pipeline(scheduler: str | Use | None = None) -> Pipeline:
    device = Use("cpu", precision="f32")
    return Pipeline("text-to-image", MODEL, transforms=[PENCIL], scheduler=scheduler, device=device)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return pipeline()


def pixels(pipe: Pipeline) -> np.ndarray:
    return np.asarray(pipe("a car", steps=2, seed=1).images[0])


def test_a_scheduler_is_changed_and_nothing_compiled(pipe: Pipeline) -> None:
    first, models = pixels(pipe), [model for _, model in pipe.compiled.all()]
    euler = Use("euler", timestep_spacing="trailing")
    pipe.use_scheduler(euler)
    changed = pixels(pipe)
    np.testing.assert_array_equal(changed, pixels(pipeline(euler)))
    assert pipe.provenance()["config"]["scheduler"] == {"use": "euler", "timestep_spacing": "trailing"}
    for wrong, error in ((Use("nosuch"), PluginError), (Use("euler", x=1), ConfigError), (3, ConfigError)):
        with pytest.raises(error):
            pipe.use_scheduler(wrong)  # type: ignore[arg-type]
        np.testing.assert_array_equal(pixels(pipe), changed)
    pipe.use_scheduler(None)
    np.testing.assert_array_equal(pixels(pipe), first)
    assert "scheduler" not in pipe.provenance()["config"]
    assert all(now is before for (_, now), before in zip(pipe.compiled.all(), models, strict=True))


def test_what_is_set_for_a_run_is_taken_back(pipe: Pipeline) -> None:
    own = pixels(pipe)
    with adjusted(pipe, adapters={"pencil": 0.0}):
        without = pixels(pipe)
    assert not np.array_equal(own, without) and pipe.adapters["pencil"] == 0.5
    for adapters, controls in (({"nosuch": 1.0}, {}), ({"pencil": 0.0}, {"nosuch": 1.0})):
        with pytest.raises(InputError), adjusted(pipe, adapters=adapters, controls=controls):
            pass
        assert pipe.adapters["pencil"] == 0.5
    with pytest.raises(ZeroDivisionError), adjusted(pipe, adapters={"pencil": 0.0}):
        raise ZeroDivisionError
    np.testing.assert_array_equal(pixels(pipe), own)


def test_a_run_is_ended_at_its_next_step(pipe: Pipeline) -> None:
    seen: list[Progress] = []

    def watch(moment: Progress) -> None:
        seen.append(moment)
        if moment.done == 2:
            stop.ask()

    stop = Stop(watch)
    with pytest.raises(Cancelled):
        pipe("a car", steps=8, seed=1, progress=stop)
    assert stop.asked and max(moment.done for moment in seen if moment.total == 8) == 2
    with pytest.raises(Cancelled):
        pipe("a car", steps=8, seed=1, progress=stop)


def test_a_result_says_what_may_change() -> None:
    result = ovforge.Result()
    assert result.adjustable == {}
    with pytest.raises(InputError, match="cannot be changed"):
        result.adjusted(threshold=0.5)
