"""Euler's family, Heun, DPM2 and LMS against diffusers', whole runs over their options."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ovforge.errors import ConfigError, InputError
from ovforge_schedulers.dpm_sde import DPMSDEOptions, DPMSDEScheduler
from ovforge_schedulers.euler import (
    EDMEulerOptions,
    EDMEulerScheduler,
    EulerAncestralOptions,
    EulerAncestralScheduler,
    EulerOptions,
    EulerScheduler,
)
from ovforge_schedulers.heun import HeunOptions, HeunScheduler
from ovforge_schedulers.kdpm2 import DPM2AncestralOptions, DPM2AncestralScheduler, DPM2Options, DPM2Scheduler
from ovforge_schedulers.lms import LMSOptions, LMSScheduler

pytest.importorskip("scipy")  # diffusers integrates with it, and takes its beta distribution

NOISE = {
    "num_train_timesteps": st.sampled_from([100, 500, 1000]),
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "beta_start": st.sampled_from([0.0001, 0.00085]),
    "beta_end": st.sampled_from([0.012, 0.02]),
    "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
    "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"]),
    "steps_offset": st.sampled_from([0, 1]),
}
SPREADS = {
    key: st.sampled_from([False, False, True])
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
} | {"sigma_min": st.sampled_from([None, 0.05]), "sigma_max": st.sampled_from([None, 20.0])}
TWO = {"prediction_type": st.sampled_from(["epsilon", "v_prediction"])}
SHORT = {"num_train_timesteps": st.sampled_from([50, 100])}  # diffusers' classes take a second for 1000
CASES = {
    "EulerDiscreteScheduler": (
        EulerScheduler,
        EulerOptions,
        NOISE
        | SPREADS
        | {
            "interpolation_type": st.sampled_from(["linear", "log_linear"]),
            "timestep_type": st.sampled_from(["discrete", "continuous"]),
            "rescale_betas_zero_snr": st.booleans(),
            "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
        },
    ),
    "EulerAncestralDiscreteScheduler": (
        EulerAncestralScheduler,
        EulerAncestralOptions,
        NOISE | TWO | {"rescale_betas_zero_snr": st.booleans()},
    ),
    "HeunDiscreteScheduler": (
        HeunScheduler,
        HeunOptions,
        NOISE
        | SPREADS
        | {
            "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "exp"]),
            "clip_sample": st.booleans(),
            "clip_sample_range": st.sampled_from([1.0, 2.5]),
        },
    ),
    "KDPM2DiscreteScheduler": (DPM2Scheduler, DPM2Options, NOISE | SPREADS | TWO),
    "KDPM2AncestralDiscreteScheduler": (DPM2AncestralScheduler, DPM2AncestralOptions, NOISE | SPREADS | TWO),
    "DPMSolverSDEScheduler": (DPMSDEScheduler, DPMSDEOptions, NOISE | SPREADS | TWO),
    "LMSDiscreteScheduler": (LMSScheduler, LMSOptions, NOISE | SPREADS),
    "EDMEulerScheduler": (
        EDMEulerScheduler,
        EDMEulerOptions,
        {
            "sigma_min": st.sampled_from([0.002, 0.02]),
            "sigma_max": st.sampled_from([80.0, 120.0]),
            "sigma_data": st.sampled_from([0.5, 1.0]),
            "sigma_schedule": st.sampled_from(["karras", "exponential"]),
            "prediction_type": st.sampled_from(["epsilon", "v_prediction"]),
            "rho": st.sampled_from([7.0, 5.0]),
            "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
        },
    ),
}


@pytest.mark.filterwarnings("ignore")  # of numpy's functions on torch's tensors, in diffusers
@pytest.mark.parametrize("name", CASES)
@settings(derandomize=True, max_examples=30)
@given(
    data=st.data(),
    steps=st.integers(1, 20),
    strength=st.sampled_from([1.0, 1.0, 0.8, 0.35]),
    random=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_whole_runs(both: Any, name: str, data: Any, steps: int, strength: float, random: bool, seed: int) -> None:
    scheduler_class, options, space = CASES[name]
    if "SDE" in name:
        pytest.importorskip("torchsde")
    required = SHORT if "KDPM2" in name or "SDE" in name else {}
    config = data.draw(
        st.fixed_dictionaries(required, optional={key: space[key] for key in space if key not in required})
    )
    try:
        scheduler = scheduler_class(options(), config)
        ours = scheduler.start(steps, strength)
    except (ConfigError, InputError):
        assume(False)
    theirs = both.theirs(name, config, scheduler)
    theirs.set_timesteps(steps)
    both(ours, theirs, seed, random=random, **both.tolerances(name, ours))
