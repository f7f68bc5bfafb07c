"""LCM and TCD against diffusers' own, whole runs over their options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ovforge_lcm
from ovforge import testing
from ovforge.errors import ConfigError, InputError
from ovforge.model.random import Generator
from ovforge_lcm.scheduler import LCMOptions, LCMScheduler
from ovforge_lcm.tcd import TCDOptions, TCDScheduler
from samplers import TorchStream, check_rows_alone, options_beside_diffusers

CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "num_train_timesteps": st.sampled_from([500, 1000]),
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "beta_start": st.sampled_from([0.0001, 0.00085]),
        "beta_end": st.sampled_from([0.012, 0.02]),
        "original_inference_steps": st.sampled_from([20, 50, 100]),
        "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
        "clip_sample": st.booleans(),
        "clip_sample_range": st.sampled_from([1.0, 2.5]),
        "thresholding": st.booleans(),
        "dynamic_thresholding_ratio": st.sampled_from([0.9, 0.995]),
        "sample_max_value": st.sampled_from([1.0, 2.0]),
        "set_alpha_to_one": st.booleans(),
        "steps_offset": st.sampled_from([0, 1]),
        "timestep_spacing": st.sampled_from(["leading", "trailing"]),
        "timestep_scaling": st.sampled_from([1.0, 10.0]),
        "rescale_betas_zero_snr": st.booleans(),
    },
)


@settings(max_examples=150)
@given(
    config=CONFIGS,
    steps=st.integers(1, 20),
    strength=st.sampled_from([1.0, 0.8, 0.35]),
    seed=st.integers(0, 2**32 - 1),
)
def test_whole_runs_equal_diffusers(config: dict[str, Any], steps: int, strength: float, seed: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    epsilon = config.get("prediction_type", "epsilon") == "epsilon"
    assume(not (config.get("rescale_betas_zero_snr") and epsilon))
    assume(steps <= int(config.get("original_inference_steps", 50) * strength))
    theirs = diffusers.LCMScheduler(**config)
    theirs.set_timesteps(steps, strength=strength)
    ours = LCMScheduler(LCMOptions(), config).start(steps, strength)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    assert ours.init_noise_sigma == theirs.init_noise_sigma

    network, scale = Generator(seed ^ 1), 1.0
    stream, generator = TorchStream(seed), torch.Generator().manual_seed(seed)
    mine = stream.randn((2, 4, 6, 5))
    wanted = torch.randn((2, 4, 6, 5), generator=generator)
    if strength < 1:
        clean = network.randn(mine.shape)
        mine = ours.add_noise(clean, mine, ours.first)
        wanted = theirs.add_noise(torch.from_numpy(clean), wanted, theirs.timesteps[:1])
    for index, timestep in enumerate(theirs.timesteps):
        output = network.randn(mine.shape)
        mine = ours.step(output, index, ours.scale_input(mine, index), stream)
        said = torch.from_numpy(output)
        wanted = theirs.step(said, timestep, wanted, generator=generator, return_dict=False)[0]
        # Neither run sees the other's latents, so errors add up. Random "predictions" blow latents up where
        # alpha is small: 1e-5 is of the largest there were.
        scale = max(scale, float(wanted.abs().max()))
        np.testing.assert_allclose(mine, wanted.numpy(), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("count", [1, 2, 777, 1000])
def test_noise_schedules_equal_diffusers(schedule: str, count: int) -> None:
    """A few last bits at most: what another CPU's torch may fuse otherwise."""
    diffusers = pytest.importorskip("diffusers")
    config = {"beta_schedule": schedule, "num_train_timesteps": count, "original_inference_steps": 1}
    ours, theirs = LCMScheduler(LCMOptions(), config), diffusers.LCMScheduler(**config)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=3e-7, atol=0)


def test_configs_of_other_samplers_are_taken() -> None:
    """A model that came with another sampler (and an LCM adapter) runs; diffusers takes its config, too."""
    diffusers = pytest.importorskip("diffusers")
    for name in [
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "DEISMultistepScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ]:
        LCMScheduler(LCMOptions(), dict(getattr(diffusers, name)().config)).start(4)


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_each_keeps_the_contract(name: str) -> None:
    testing.check_scheduler(ovforge_lcm, name, steps=(4, 7))
    extension = testing.extension(ovforge_lcm, "scheduler", name)
    options_beside_diffusers(extension)
    check_rows_alone(extension.create(extension.options_model()(), {}))


@pytest.mark.parametrize("steps", [*range(1, 11), 15, 20, 25, 28, 30, 40, 50])
def test_runs_of_a_well_known_model(both: Any, steps: int) -> None:
    """LCM Dreamshaper's config, at all numbers of steps that people use."""
    config = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
              "trained_betas": None, "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1,
              "original_inference_steps": 50, "timestep_scaling": 10.0}  # fmt: skip
    scheduler = LCMScheduler(LCMOptions(), config)
    theirs = both.theirs("LCMScheduler", config, scheduler)
    theirs.set_timesteps(steps)
    both(scheduler.start(steps), theirs, steps, random=False)


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_timesteps_of_a_call(both: Any, name: str, strength: float) -> None:
    """Also such ones as the model was not distilled at. Image-to-image leaves the first out, also for LCM."""
    scheduler: Any = LCMScheduler(LCMOptions(), {}) if name == "LCMScheduler" else TCDScheduler(TCDOptions(), {})
    theirs = both.theirs(name, {}, scheduler)
    theirs.set_timesteps(timesteps=[999, 700, 402, 100])
    ours = scheduler.start_given(strength, timesteps=[999, 700, 402, 100])
    assert ours.first == (0 if strength == 1 else 2)
    both(ours, theirs, 3, arguments={"eta": 0.0} if name == "TCDScheduler" else {})
    with pytest.raises(InputError, match=f"{name} takes no sigmas"):
        scheduler.start_given(sigmas=[3.0, 1.0])


@settings(derandomize=True, max_examples=60)
@given(
    config=CONFIGS,
    eta=st.sampled_from([0.0, 0.3, 1.0]),
    steps=st.integers(1, 20),
    strength=st.sampled_from([1.0, 1.0, 0.8, 0.35]),
    random=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_tcd(
    both: Any, config: dict[str, Any], eta: float, steps: int, strength: float, random: bool, seed: int
) -> None:
    assume(not (config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon"))
    scheduler = TCDScheduler(TCDOptions(eta=eta), config)
    try:
        ours = scheduler.start(steps, strength)
    except (ConfigError, InputError):  # what is refused has a test of its own
        assume(False)
    theirs = both.theirs("TCDScheduler", config, scheduler)
    theirs.set_timesteps(steps)
    both(ours, theirs, seed, random=random, arguments={"eta": eta})


def test_trained_betas_equal_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    betas = np.linspace(0.001, 0.02, 100).tolist()
    config = {"trained_betas": betas, "num_train_timesteps": 100}
    ours = LCMScheduler(LCMOptions(), config)
    np.testing.assert_allclose(ours.alphas_cumprod, diffusers.LCMScheduler(**config).alphas_cumprod.numpy(), atol=1e-6)


def test_a_step_leaves_its_inputs_alone() -> None:
    sampling = LCMScheduler(LCMOptions(prediction_type="sample", clip_sample=True), {}).start(4)
    output, latents = Generator(1).randn((1, 4, 8, 8)), Generator(2).randn((1, 4, 8, 8))
    before = output.copy(), latents.copy()
    sampling.step(output, 0, latents, Generator(3))
    np.testing.assert_array_equal(output, before[0])
    np.testing.assert_array_equal(latents, before[1])


def test_options_win_over_the_model() -> None:
    scheduler = LCMScheduler(
        LCMOptions(original_inference_steps=20), {"original_inference_steps": 50, "_class_name": "X"}
    )
    assert scheduler.config.original_inference_steps == 20


@pytest.mark.parametrize(
    ("model_config", "steps", "message"),
    [
        ({}, 51, "51 is out of range"),
        ({}, 0, "0 is out of range"),
        ({"original_inference_steps": 2000}, 4, "more than num_train_timesteps"),
        ({"new_option": 3}, 4, "'new_option' is not one of LCMScheduler's"),
        ({"new_option": 0}, 4, "'new_option' is not one of LCMScheduler's"),
        ({"new_option": False}, 4, "'new_option' is not one of LCMScheduler's"),
        ({"prediction_type": "flow"}, 4, "prediction_type"),
        ({"rescale_betas_zero_snr": True}, 4, "divides by zero"),
        ({"trained_betas": [0.1]}, 4, "1 trained_betas"),
    ],
)
def test_what_cannot_be_done_is_said(model_config: dict[str, Any], steps: int, message: str) -> None:
    with pytest.raises((ConfigError, InputError), match=message):
        LCMScheduler(LCMOptions(), model_config).start(steps)


def test_tcd_refuses_what_divides_by_zero() -> None:
    with pytest.raises(ConfigError, match="rescale_betas_zero_snr"):
        TCDScheduler(TCDOptions(), {"rescale_betas_zero_snr": True})
