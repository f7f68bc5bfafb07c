"""The plugin keeps ovforge's contract, and a network that is always right leads to the clean picture."""

from __future__ import annotations

import numpy as np
import pytest
from ovforge import testing
from ovforge.errors import ConfigError, InputError

import ovforge_my_plugin


def scheduler(**model_config: object) -> object:
    described = testing.extension(ovforge_my_plugin, "scheduler", "my-plugin")
    return described.create(described.options_model()(), model_config)


def test_contract() -> None:
    testing.check_plugin(ovforge_my_plugin)
    testing.check_scheduler(ovforge_my_plugin, "my-plugin")


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_a_network_that_is_always_right_leads_to_the_picture(steps: int) -> None:
    rng = np.random.default_rng(0)
    picture, noise = rng.normal(size=(2, 1, 4, 8, 8)).astype(np.float32)
    run = scheduler().start(steps)
    latents = run.add_noise(picture, noise, 0)
    for index in range(steps):
        latents = run.step(noise, index, latents, rng)
    last = scheduler().alphas[0]
    np.testing.assert_allclose(latents, np.sqrt(last) * picture + np.sqrt(1 - last) * noise, atol=1e-3)


def test_a_weak_run_starts_late() -> None:
    assert scheduler().start(10, 0.3).first == 7


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="v_prediction"):
        scheduler(prediction_type="v_prediction")
    with pytest.raises(InputError, match="0 steps"):
        scheduler().start(0)
