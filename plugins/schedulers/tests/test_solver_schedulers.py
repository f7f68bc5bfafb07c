"""DPM-Solver, UniPC and DEIS against diffusers', whole runs over their options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ovforge.errors import ConfigError, InputError
from ovforge_schedulers.deis import DEISOptions, DEISScheduler
from ovforge_schedulers.dpm_multistep import DPMMultistepOptions, DPMMultistepScheduler
from ovforge_schedulers.dpm_singlestep import DPMSinglestepOptions, DPMSinglestepScheduler
from ovforge_schedulers.spacing import sigma_table
from ovforge_schedulers.unipc import UniPCOptions, UniPCScheduler

pytest.importorskip("scipy")  # diffusers takes its beta distribution

RARE = st.sampled_from([False, False, True])
COMMON = {
    "num_train_timesteps": st.sampled_from([100, 500, 1000]),
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "beta_start": st.sampled_from([0.0001, 0.00085]),
    "beta_end": st.sampled_from([0.012, 0.02]),
    "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction", "flow_prediction"]),
    "solver_order": st.sampled_from([1, 2, 3]),
    "thresholding": RARE,
    "dynamic_thresholding_ratio": st.sampled_from([0.9, 0.995]),
    "sample_max_value": st.sampled_from([0.5, 1.0, 2.0]),
    "lower_order_final": st.booleans(),
    "use_karras_sigmas": RARE,
    "use_exponential_sigmas": RARE,
    "use_beta_sigmas": RARE,
    "use_flow_sigmas": RARE,
    "flow_shift": st.sampled_from([1.0, 3.0]),
    "sigma_min": st.sampled_from([None, 0.05]),
    "sigma_max": st.sampled_from([None, 20.0]),
}
SPACING = {
    "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"]),
    "steps_offset": st.sampled_from([0, 1]),
}
DPM = {
    "algorithm_type": st.sampled_from(["dpmsolver", "dpmsolver++", "sde-dpmsolver++", "deis"]),
    "solver_type": st.sampled_from(["midpoint", "heun", "logrho", "bh2"]),
    "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
    "lambda_min_clipped": st.sampled_from([-float("inf"), -5.1]),
    "variance_type": st.sampled_from([None, "fixed_small"]),
}
CASES = {
    "DPMSolverMultistepScheduler": (
        DPMMultistepScheduler,
        DPMMultistepOptions,
        COMMON
        | SPACING
        | DPM
        | {
            "algorithm_type": st.sampled_from(["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"]),
            "euler_at_final": st.booleans(),
            "use_lu_lambdas": RARE,
            "rescale_betas_zero_snr": RARE,
        },
    ),
    "DPMSolverSinglestepScheduler": (DPMSinglestepScheduler, DPMSinglestepOptions, COMMON | DPM),
    "UniPCMultistepScheduler": (
        UniPCScheduler,
        UniPCOptions,
        COMMON
        | SPACING
        | {
            "predict_x0": st.booleans(),
            "solver_type": st.sampled_from(["bh1", "bh2", "midpoint"]),
            "disable_corrector": st.sampled_from([[], [0], [1, 2]]),
            "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
            "rescale_betas_zero_snr": RARE,
            "shift_terminal": st.sampled_from([None, 0.1]),
        },
    ),
    "DEISMultistepScheduler": (
        DEISScheduler,
        DEISOptions,
        COMMON | SPACING | {"algorithm_type": st.sampled_from(["deis", "dpmsolver++"])},
    ),
}


@pytest.mark.filterwarnings(
    "ignore"
)  # of numpy's functions on torch's tensors, and of what is deprecated, in diffusers
@pytest.mark.parametrize("name", CASES)
@settings(derandomize=True, max_examples=80)
@given(
    data=st.data(),
    steps=st.integers(1, 20),
    strength=st.sampled_from([1.0, 1.0, 0.8, 0.35]),
    random=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_whole_runs(both: Any, name: str, data: Any, steps: int, strength: float, random: bool, seed: int) -> None:
    scheduler_class, options, space = CASES[name]
    config = data.draw(st.fixed_dictionaries({}, optional=space))
    try:
        scheduler = scheduler_class(options(), config)
        ours = scheduler.start(steps, strength)
    except (ConfigError, InputError):
        assume(False)
    if config.get("algorithm_type") == "deis" and config.get("final_sigmas_type", "zero") == "zero":
        config |= {"algorithm_type": scheduler.config.algorithm_type}  # diffusers means this, and trips over the name
    theirs = both.theirs(name, config, scheduler)
    theirs.set_timesteps(steps)
    allowed = time_tolerance(config, scheduler, theirs)
    both(ours, theirs, seed, random=random, tolerance=tolerance(ours, random), time_tolerance=allowed)


def tolerance(ours: Any, random: bool) -> float:
    """Return 1e-5, or more where float32 is not good for it.

    Methods that predict noise take differences of terms that grow as the picture's share does, in all steps together,
    and, of networks that predict the picture, divide by a sigma near 0.
    Third-order ones weigh second differences by small differences of numbers near 1, over the square of the step:
    of a network's answers those are small, too; of random ones they are not, and 1e-7 of rounding grows so.
    """
    config = ours.config
    by_picture = str(getattr(config, "algorithm_type", "++")).endswith("++") and getattr(config, "predict_x0", True)
    growth = 1.0 if by_picture else float(ours.alpha[-1] / ours.alpha[ours.first])
    allowed = 1e-5 if by_picture else max(5e-5, 2e-7 * growth)
    if config.solver_order > 2 and len(ours.timesteps) > 2:
        narrowest = float(np.min(np.diff(ours.lambdas[:-1])))
        allowed = max(allowed, (2e-6 if random else 3e-7) / narrowest**2 * growth)
    return allowed


def time_tolerance(config: dict[str, Any], ours: Any, theirs: Any) -> float:
    """Return how far timesteps may be off: not at all, if torch's noise levels are ours to the bit.

    Timesteps of spread levels are cut, often from 998.9999 or 999.0001. On some processors one in six of torch's square
    roots in float32 is not the nearest number to the true root, as all of numpy's are, and that decides.
    """
    alphas = theirs.alphas_cumprod
    same = np.array_equal(sigma_table(ours.alphas_cumprod), (((1 - alphas) / alphas) ** 0.5).numpy())
    cut = config.get("use_exponential_sigmas") or config.get("use_beta_sigmas")
    return 1 if cut and not config.get("use_karras_sigmas") and not same else 1e-6
