"""The configs that well-known models come with, over all numbers of steps that people use."""

from __future__ import annotations

from typing import Any

import pytest

from ovforge_schedulers import ovforge_schedulers

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
      "trained_betas": None, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip
XL = {**SD, "interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0,
      "timestep_spacing": "leading", "use_karras_sigmas": False, "skip_prk_steps": True}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "1.5": ("PNDMScheduler", {**SD, "skip_prk_steps": True}),
    "2.1": ("DDIMScheduler", {**SD, "prediction_type": "v_prediction", "skip_prk_steps": True}),
    "2.1 zero SNR": (
        "DDIMScheduler",
        {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "XL": ("EulerDiscreteScheduler", XL),
    "XL Turbo": ("EulerAncestralDiscreteScheduler", {**XL, "timestep_spacing": "trailing"}),
    "XL Lightning": ("EulerDiscreteScheduler", {**XL, "timestep_spacing": "trailing"}),
    "Playground 2.5": ("EDMEulerScheduler", {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}),
    "XL with DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {**XL, "use_karras_sigmas": True}),
    "XL with DPM++ 2M SDE Karras": (
        "DPMSolverMultistepScheduler",
        {**XL, "use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
    ),
    "1.5 with UniPC": ("UniPCMultistepScheduler", {**SD, "skip_prk_steps": True}),
    "1.5 with LMS": ("LMSDiscreteScheduler", {**SD, "skip_prk_steps": True}),
    "1.5 with Heun": ("HeunDiscreteScheduler", {**SD, "skip_prk_steps": True}),
    "1.5 with DPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", {**SD, "skip_prk_steps": True}),
}


@pytest.mark.filterwarnings("ignore")  # of numpy's functions on torch's tensors, in diffusers
@pytest.mark.parametrize("model", MODELS)
def test_runs_of_well_known_models(both: Any, model: str) -> None:
    name, config = MODELS[model]
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    extension = next(each for each in ovforge_schedulers() if name in each.implements)
    options = extension.options_model()
    assert options is not None
    scheduler = extension.create(options(), config)
    theirs = both.theirs(name, config, scheduler)
    for steps in (*range(1, 11), 15, 20, 25, 28, 30, 40, 50):
        for strength in (1.0, 0.6) if steps > 1 else (1.0,):
            theirs.set_timesteps(steps)
            ours = scheduler.start(steps, strength)
            both(ours, theirs, steps, random=False, **both.tolerances(name, ours))
