"""Schedulers for flows against diffusers', whole runs over their options and over what pipelines give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ovforge.contracts import FlowRun, FlowScheduler
from ovforge.errors import ConfigError, InputError
from ovforge_schedulers.deis import DEISOptions, DEISScheduler
from ovforge_schedulers.dpm_multistep import DPMMultistepOptions, DPMMultistepScheduler
from ovforge_schedulers.dpm_singlestep import DPMSinglestepOptions, DPMSinglestepScheduler
from ovforge_schedulers.euler import EulerOptions, EulerScheduler
from ovforge_schedulers.flow_match import (
    FlowEulerOptions,
    FlowEulerScheduler,
    FlowHeunOptions,
    FlowHeunScheduler,
    FlowLCMOptions,
    FlowLCMScheduler,
)
from ovforge_schedulers.scm import SCMOptions, SCMScheduler
from ovforge_schedulers.unipc import UniPCOptions, UniPCScheduler

pytest.importorskip("scipy")  # diffusers takes its beta distribution

RARE = st.sampled_from([False, False, True])
DYNAMIC = {
    "use_dynamic_shifting": st.booleans(),
    "base_shift": st.sampled_from([0.5, 0.25]),
    "max_shift": st.sampled_from([1.15, 0.9, 3.1]),
    "base_image_seq_len": st.sampled_from([256, 1024]),
    "max_image_seq_len": st.sampled_from([4096, 8192]),
}
MATCH = DYNAMIC | {
    "num_train_timesteps": st.sampled_from([100, 1000]),
    "shift": st.sampled_from([1.0, 0.5, 3.0, 12.0]),
    "invert_sigmas": RARE,
    "shift_terminal": st.sampled_from([None, 0.0, 0.02, 0.1]),
    "use_karras_sigmas": RARE,
    "use_exponential_sigmas": RARE,
    "use_beta_sigmas": RARE,
    "time_shift_type": st.sampled_from(["exponential", "linear"]),
}
SOLVERS = DYNAMIC | {
    "use_flow_sigmas": st.just(True),
    "prediction_type": st.just("flow_prediction"),
    "flow_shift": st.sampled_from([1.0, 3.0, 7.5]),
    "solver_order": st.sampled_from([1, 2]),
    "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
    "time_shift_type": st.sampled_from(["exponential", "linear"]),
}
EVEN = "sigmas"
ASKED = st.sampled_from(
    [(), (EVEN,), ("timesteps",), (EVEN, "timesteps"), ("mu",), (EVEN, "mu"), (EVEN, "size"), ("size",)]
)
RUNS = {
    "asked": ASKED,
    "steps": st.integers(1, 20),
    "strength": st.sampled_from([1.0, 1.0, 0.8, 0.6, 0.35]),
    "random": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
}
many = settings(derandomize=True, max_examples=40)


def calculate_shift(size: int, config: dict[str, Any]) -> float:
    """Return mu as diffusers' pipelines do: from the scheduler's config, with their own defaults."""
    flux = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux")
    return float(
        flux.calculate_shift(
            size,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
    )


def requests(asked: tuple[str, ...], steps: int, config: dict[str, Any]) -> tuple[FlowRun, dict[str, Any]]:
    """Return what ours is given, and the arguments that pipelines of diffusers give for the same."""
    sigmas = np.linspace(1.0, 1 / steps, steps) if EVEN in asked else None
    times = np.linspace(990.0, 13.0, steps).round(2) if "timesteps" in asked else None
    mu, size = (0.7 if "mu" in asked else None), (1500 if "size" in asked else None)
    said: dict[str, Any] = {} if sigmas is None else {"sigmas": sigmas.copy()}
    said |= {} if times is None else {"timesteps": times.tolist()}
    if mu is not None or size is not None:
        said["mu"] = mu if mu is not None else calculate_shift(int(size or 0), config)
    return FlowRun(
        size, mu, None if sigmas is None else sigmas.tolist(), None if times is None else times.tolist()
    ), said


def compare(
    both: Any, name: str, ours: Any, config: dict[str, Any], asked: tuple[str, ...], run: dict[str, Any]
) -> None:
    """Compare a run as a pipeline would begin it; what ours refuses has tests of its own."""
    steps = run["steps"]
    flow, said = requests(asked, steps, config)
    try:
        scheduler = ours(config)
        sampling = scheduler.start_flow(steps, flow, run["strength"])
    except (ConfigError, InputError):
        assume(False)
    assert isinstance(scheduler, FlowScheduler)
    theirs = both.theirs(name, config, scheduler)
    if config.get("use_flow_sigmas") and not config.get("use_dynamic_shifting"):
        said.pop("mu", None)  # diffusers' solvers assert that there is none
    if set(said) & {"sigmas", "timesteps"}:
        theirs.set_timesteps(**said)
    else:
        theirs.set_timesteps(steps, **said)
    left_out = int(max(steps - min(steps * run["strength"], steps), 0))
    assert sampling.first == left_out * theirs.order
    # DEIS takes differences of terms that grow as the picture's share does: see the solvers' own tests.
    growth = float(sampling.alpha[-1] / sampling.alpha[sampling.first]) if name.startswith("DEIS") else 1.0
    both(sampling, theirs, run["seed"], random=run["random"], tolerance=max(1e-5, 2e-7 * growth))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"])
@many
@given(data=st.data(), **RUNS)
def test_whole_runs(both: Any, name: str, data: Any, asked: tuple[str, ...], **run: Any) -> None:
    euler = name == "FlowMatchEulerDiscreteScheduler"
    more = {"stochastic_sampling": st.booleans()} if euler else {"upscale_mode": st.just("nearest")}
    config = data.draw(st.fixed_dictionaries({}, optional=MATCH | more))
    make = (
        (lambda config: FlowEulerScheduler(FlowEulerOptions(), config))
        if euler
        else (lambda config: FlowLCMScheduler(FlowLCMOptions(), config))
    )
    compare(both, name, make, config, asked, run)


@many
@given(
    config=st.fixed_dictionaries(
        {}, optional={"num_train_timesteps": st.sampled_from([100, 1000]), "shift": st.sampled_from([1.0, 3.0, 0.5])}
    ),
    **RUNS,
)
def test_heun(both: Any, config: dict[str, Any], asked: tuple[str, ...], **run: Any) -> None:
    make = lambda config: FlowHeunScheduler(FlowHeunOptions(), config)  # noqa: E731
    compare(both, "FlowMatchHeunDiscreteScheduler", make, config, (), run)


CASES: dict[str, Any] = {
    "DPMSolverMultistepScheduler": (
        lambda config: DPMMultistepScheduler(DPMMultistepOptions(), config),
        {
            "algorithm_type": st.sampled_from(["dpmsolver++", "sde-dpmsolver++"]),
            "solver_type": st.sampled_from(["midpoint", "heun"]),
            "euler_at_final": st.booleans(),
        },
    ),
    "DPMSolverSinglestepScheduler": (lambda config: DPMSinglestepScheduler(DPMSinglestepOptions(), config), {}),
    "UniPCMultistepScheduler": (
        lambda config: UniPCScheduler(UniPCOptions(), config),
        {
            "solver_type": st.sampled_from(["bh1", "bh2"]),
            "shift_terminal": st.sampled_from([None, 0.1]),
            "use_karras_sigmas": RARE,
        },
    ),
    "DEISMultistepScheduler": (lambda config: DEISScheduler(DEISOptions(), config), {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
@many
@given(data=st.data(), **RUNS)
def test_solvers(both: Any, name: str, data: Any, asked: tuple[str, ...], **run: Any) -> None:
    """As pipelines of flows run them: what diffusers' class cannot take of a pipeline is refused, and left out here."""
    make, more = CASES[name]
    need = ("use_flow_sigmas", "prediction_type")
    optional = {key: value for key, value in (SOLVERS | more).items() if key not in need}
    config = data.draw(st.fixed_dictionaries({key: SOLVERS[key] for key in need}, optional=optional))
    compare(both, name, make, config, asked, run)


@many
@given(
    config=st.fixed_dictionaries({}, optional={"sigma_data": st.sampled_from([0.5, 1.0, 0.3])}),
    options=st.fixed_dictionaries({}, optional={"max_timesteps": st.sampled_from([1.57080, 1.5])}),
    given_angles=RARE,
    steps=st.integers(1, 12),
    strength=st.sampled_from([1.0, 1.0, 0.6]),
    random=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_scm(
    both: Any,
    config: dict[str, Any],
    options: dict[str, Any],
    given_angles: bool,
    steps: int,
    strength: float,
    random: bool,
    seed: int,
) -> None:
    angles = np.linspace(1.5, 0, steps + 1).tolist() if given_angles else None
    scheduler = SCMScheduler(SCMOptions(**options), config)
    try:
        ours = scheduler.start_flow(steps, FlowRun(timesteps=angles), strength)
    except InputError:
        assume(False)
    theirs = both.theirs("SCMScheduler", config, scheduler)
    most = None if angles else options.get("max_timesteps", 1.57080)
    between = 1.3 if steps == 2 and not angles else None
    theirs.set_timesteps(steps, timesteps=angles, max_timesteps=most, intermediate_timesteps=between)
    assert ours.sigma_data == theirs.config.sigma_data
    both(ours, theirs, seed, random=random)


FLUX = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
        "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
        "max_image_seq_len": 4096}  # fmt: skip
QWEN = {**FLUX, "shift": 1.0, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02,
        "invert_sigmas": False, "stochastic_sampling": False, "time_shift_type": "exponential",
        "use_beta_sigmas": False, "use_exponential_sigmas": False, "use_karras_sigmas": False}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "SD 3": ({"num_train_timesteps": 1000, "shift": 3.0}, ()),
    "FLUX dev": (FLUX, (EVEN, "size")),
    "FLUX schnell": ({**FLUX, "use_dynamic_shifting": False, "shift": 1.0}, (EVEN, "size")),
    "Qwen-Image": (QWEN, (EVEN, "size")),
    "Z-Image": ({"num_train_timesteps": 1000, "use_dynamic_shifting": False, "shift": 3.0}, (EVEN, "size")),
}


@pytest.mark.parametrize("model", MODELS)
def test_runs_of_well_known_models(both: Any, model: str) -> None:
    config, asked = MODELS[model]
    for steps in (1, 2, 3, 4, 8, 20, 28, 50):
        for strength in (1.0, 0.6, 0.85):
            if steps == 1 and "shift_terminal" in config:
                continue  # nothing to stretch
            run = {"steps": steps, "strength": strength, "random": False, "seed": steps}
            make = lambda config: FlowEulerScheduler(FlowEulerOptions(), config)  # noqa: E731
            compare(both, "FlowMatchEulerDiscreteScheduler", make, config, asked, run)


SANA = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear", "flow_shift": 3.0,
        "use_flow_sigmas": True, "prediction_type": "flow_prediction"}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "config", "flow", "error", "message"),
    [
        (lambda c: EulerScheduler(EulerOptions(), c), FLUX, FlowRun(), ConfigError, "the model is a flow"),
        (lambda c: UniPCScheduler(UniPCOptions(), c), FLUX, FlowRun(), ConfigError, "the options are for diffusion"),
        (
            lambda c: UniPCScheduler(UniPCOptions(), c),
            {**SANA, "use_dynamic_shifting": True},
            FlowRun(),
            ConfigError,
            "use_dynamic_shifting needs",
        ),
        (
            lambda c: DPMMultistepScheduler(DPMMultistepOptions(), c),
            SANA,
            FlowRun(sigmas=[1, 0.75, 0.5, 0.25]),
            InputError,
            "takes no sigmas",
        ),
        (
            lambda c: DPMMultistepScheduler(DPMMultistepOptions(), c),
            {**SANA, "use_dynamic_shifting": True, "time_shift_type": "linear"},
            FlowRun(mu=1),
            ConfigError,
            "'exponential' only",
        ),
        (lambda c: FlowEulerScheduler(FlowEulerOptions(), c), FLUX, FlowRun(), ConfigError, "size of the picture"),
        (
            lambda c: FlowEulerScheduler(FlowEulerOptions(), c),
            {},
            FlowRun(sigmas=[1, 0.5]),
            InputError,
            "2 sigmas, and 4",
        ),
        (
            lambda c: FlowEulerScheduler(FlowEulerOptions(), c),
            {},
            FlowRun(sigmas=[1, 0.5, 0.2, 0]),
            InputError,
            "0 cannot be one",
        ),
        (
            lambda c: FlowEulerScheduler(FlowEulerOptions(), c),
            FLUX,
            FlowRun(image_seq_len=10_000_000),
            InputError,
            "too steep",
        ),
        (
            lambda c: FlowEulerScheduler(FlowEulerOptions(), c),
            {"beta_schedule": "scaled_linear"},
            FlowRun(),
            ConfigError,
            "the model predicts 'epsilon'",
        ),
        (lambda c: FlowHeunScheduler(FlowHeunOptions(), c), FLUX, FlowRun(), ConfigError, "cannot"),
        (
            lambda c: FlowHeunScheduler(FlowHeunOptions(), c),
            {},
            FlowRun(sigmas=[1, 0.75, 0.5, 0.25]),
            InputError,
            "takes no sigmas",
        ),
        (
            lambda c: FlowLCMScheduler(FlowLCMOptions(scale_factors=(0.5, 1.0)), c),
            {},
            FlowRun(),
            ConfigError,
            "scale_factors|grow",
        ),
        (
            lambda c: SCMScheduler(SCMOptions(intermediate_timesteps=1.1), c),
            {},
            FlowRun(),
            InputError,
            "is for 2 steps",
        ),
        *(
            (lambda c: SCMScheduler(SCMOptions(), c), {}, FlowRun(timesteps=angles), InputError, "two or more angles")
            for angles in ([1.5], [900, 500, 0], [0.4, 1.2, 0])
        ),
    ],
)
def test_what_cannot_be_done_is_said(make: Any, config: Any, flow: FlowRun, error: Any, message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        make(config).start_flow(4, flow)
    assert raised.value.hint


def test_one_step_has_nothing_to_stretch() -> None:
    with pytest.raises(InputError, match="one step"):
        FlowEulerScheduler(FlowEulerOptions(), QWEN).start_flow(1, FlowRun(mu=0.5, sigmas=[1.0]))


def test_a_flow_samples_a_model_that_came_with_a_solver() -> None:
    assert len(FlowEulerScheduler(FlowEulerOptions(shift=3.0), SANA).start(4).timesteps) == 4
