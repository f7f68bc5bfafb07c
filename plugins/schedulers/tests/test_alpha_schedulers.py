"""DDIM, DDPM and PNDM against diffusers', whole runs over their options."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ovforge.errors import ConfigError, InputError
from ovforge_schedulers.ddim import DDIMOptions, DDIMScheduler, DDPMOptions, DDPMScheduler
from ovforge_schedulers.pndm import PNDMOptions, PNDMScheduler

NOISE = {
    "num_train_timesteps": st.sampled_from([100, 500, 1000]),
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "beta_start": st.sampled_from([0.0001, 0.00085]),
    "beta_end": st.sampled_from([0.012, 0.02]),
    "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
}
SPACING = {
    "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"]),
    "steps_offset": st.sampled_from([0, 1]),
}
BOUNDS = {
    "clip_sample": st.booleans(),
    "clip_sample_range": st.sampled_from([1.0, 2.5]),
    "thresholding": st.booleans(),
    "dynamic_thresholding_ratio": st.sampled_from([0.9, 0.995]),
    "sample_max_value": st.sampled_from([0.5, 1.0, 2.0]),
    "rescale_betas_zero_snr": st.booleans(),
}
RUNS = {
    "steps": st.integers(1, 20),
    "strength": st.sampled_from([1.0, 1.0, 0.8, 0.35]),
    "random": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
}
many = settings(derandomize=True, max_examples=60)


def started(scheduler: Any, steps: int, strength: float) -> Any:
    """Begin a run, or drop the example: what is refused has tests of its own."""
    try:
        return scheduler.start(steps, strength)
    except (ConfigError, InputError):
        assume(False)


@many
@given(
    config=st.fixed_dictionaries({}, optional=NOISE | SPACING | BOUNDS | {"set_alpha_to_one": st.booleans()}),
    eta=st.sampled_from([0.0, 0.0, 0.4, 1.0]),
    **RUNS,
)
def test_ddim(
    both: Any, config: dict[str, Any], eta: float, steps: int, strength: float, random: bool, seed: int
) -> None:
    scheduler = DDIMScheduler(DDIMOptions(eta=eta), config)
    ours = started(scheduler, steps, strength)
    theirs = both.theirs("DDIMScheduler", config, scheduler)
    theirs.set_timesteps(steps)
    both(ours, theirs, seed, random=random, arguments={"eta": eta})


@many
@given(
    config=st.fixed_dictionaries(
        {},
        optional=NOISE
        | SPACING
        | BOUNDS
        | {
            "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]),
            "variance_type": st.sampled_from(["fixed_small", "fixed_small_log", "fixed_large"]),
        },
    ),
    **RUNS,
)
def test_ddpm(both: Any, config: dict[str, Any], steps: int, strength: float, random: bool, seed: int) -> None:
    scheduler = DDPMScheduler(DDPMOptions(), config)
    ours = started(scheduler, steps, strength)
    theirs = both.theirs("DDPMScheduler", config, scheduler)
    theirs.set_timesteps(steps)
    both(ours, theirs, seed, random=random)


@pytest.mark.parametrize("steps", [1, 7])
def test_ddpm_learned_variance(both: Any, steps: int) -> None:
    config = {"variance_type": "learned_range"}
    scheduler = DDPMScheduler(DDPMOptions(), config)
    theirs = both.theirs("DDPMScheduler", config, scheduler)
    theirs.set_timesteps(steps)
    both(scheduler.start(steps), theirs, 3, widen=2)


@many
@given(
    config=st.fixed_dictionaries(
        {"skip_prk_steps": st.booleans()},
        optional=NOISE
        | SPACING
        | {"prediction_type": st.sampled_from(["epsilon", "v_prediction"]), "set_alpha_to_one": st.booleans()},
    ),
    **RUNS,
)
def test_pndm(both: Any, config: dict[str, Any], steps: int, strength: float, random: bool, seed: int) -> None:
    scheduler = PNDMScheduler(PNDMOptions(), config)
    ours = started(scheduler, steps, strength)
    theirs = both.theirs("PNDMScheduler", config, scheduler)
    theirs.set_timesteps(steps)
    # A step takes the difference of two terms that are 1 / sqrt(alpha) as large, and float32 keeps 6e-8 of them.
    rest = float(scheduler.alphas_cumprod[ours.timesteps.max()])
    both(ours, theirs, seed, random=random, tolerance=max(1e-5, 3e-7 / rest**0.5))
