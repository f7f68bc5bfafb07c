"""Timesteps and noise levels of a call, against diffusers' classes; and what takes none."""

from __future__ import annotations

from typing import Any

import pytest

import ovforge_schedulers
from ovforge.contracts import GivenScheduler
from ovforge.errors import InputError

CLASSES = {each.implements[0]: each for each in ovforge_schedulers.ovforge_schedulers() if each.implements}
TIMES, LEVELS, SHARES = [981, 700, 401, 120, 3], [11.0, 4.0, 1.5, 0.3, 0.0], [1.0, 0.8, 0.45, 0.1]
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
CASES: list[tuple[str, dict[str, Any], str, list[float]]] = [
    ("EulerDiscreteScheduler", SIGMA_MIN, "timesteps", [999.0, 500.5, 20.0]),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "timesteps", TIMES),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "sigmas", LEVELS),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, "sigmas", LEVELS),
    ("EulerDiscreteScheduler", SIGMA_MIN, "sigmas", [4.0, 1.0, 0.4]),
    ("HeunDiscreteScheduler", {}, "timesteps", TIMES),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, "timesteps", TIMES),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1, **SIGMA_MIN}, "timesteps", [*range(990, 0, -60)]),
    ("DPMSolverSinglestepScheduler", SIGMA_MIN, "timesteps", TIMES),
    ("DDPMScheduler", {"timestep_spacing": "trailing"}, "timesteps", TIMES),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "sigmas", SHARES),
    ("FlowMatchLCMScheduler", {"shift": 3.0}, "timesteps", TIMES),
    ("SCMScheduler", {}, "timesteps", [1.57, 1.2, 0.7, 0.0]),
]


@pytest.mark.parametrize(("name", "config", "what", "values"), CASES)
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_runs_equal_diffusers(
    both: Any, name: str, config: dict[str, Any], what: str, values: list[float], strength: float
) -> None:
    """Of all calls of the network, diffusers' pipelines leave out as many as of steps, and flows round otherwise."""
    scheduler = _make(name, config)
    assert isinstance(scheduler, GivenScheduler)
    ours = scheduler.start_given(strength, **{what: values})
    theirs = both.theirs(name, config, scheduler)
    if name == "SCMScheduler":
        theirs.set_timesteps(len(values) - 1, timesteps=values, max_timesteps=None, intermediate_timesteps=None)
        count = len(values) - 1
    else:
        theirs.set_timesteps(**{what: values})
        count = len(theirs.timesteps)
    flow = "Flow" in name or name == "SCMScheduler"
    left_out = count - count * strength if flow else count - int(count * strength)
    assert ours.first == int(left_out) * getattr(theirs, "order", 1)
    both(ours, theirs, 3, random=False)


def _make(name: str, config: dict[str, Any]) -> Any:
    model: Any = CLASSES[name].options_model()
    return CLASSES[name].create(model(), config)


@pytest.mark.parametrize(
    ("name", "config", "what", "values", "message"),
    [
        *((name, {}, what, [9.0, 3.0], f"{name} takes no {what}") for name, what in [
            ("DDIMScheduler", "timesteps"), ("LMSDiscreteScheduler", "sigmas"), ("HeunDiscreteScheduler", "sigmas"),
            ("EDMEulerScheduler", "sigmas"), ("KDPM2DiscreteScheduler", "timesteps"),
            ("FlowMatchHeunDiscreteScheduler", "sigmas"), ("SCMScheduler", "sigmas"),
        ]),
        ("UniPCMultistepScheduler", {}, "sigmas", SHARES, "without use_flow_sigmas"),
        ("DPMSolverMultistepScheduler", FLOW, "timesteps", TIMES, "with use_flow_sigmas"),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "timesteps", TIMES, "with use_beta_sigmas"),
        ("DPMSolverMultistepScheduler", {}, "timesteps", [9.5], "takes whole timesteps"),
        ("DDPMScheduler", {}, "timesteps", [1000], "fall from 999 at most"),
        ("EulerDiscreteScheduler", {}, "sigmas", [3.0, 3.0], "do not fall"),
        ("EulerDiscreteScheduler", {}, "sigmas", [float("nan"), 3.0], "do not fall"),
        ("EulerDiscreteScheduler", {}, "sigmas", [3.0], "the level that a run ends at"),
        ("EulerDiscreteScheduler", {}, "timesteps", [], "there are none"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(
    name: str, config: dict[str, Any], what: str, values: list[float], message: str
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        _make(name, config).start_given(**{what: values})
    assert raised.value.where == what
    assert raised.value.hint


def test_shares_of_a_flow_go_to_unipc(both: Any) -> None:
    import numpy as np

    scheduler = _make("UniPCMultistepScheduler", FLOW)
    theirs = both.theirs("UniPCMultistepScheduler", FLOW, scheduler)
    theirs.set_timesteps(sigmas=np.array(SHARES))
    both(scheduler.start_given(sigmas=SHARES), theirs, 3, random=False)
