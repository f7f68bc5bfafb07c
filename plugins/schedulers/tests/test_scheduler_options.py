"""What schedulers take from configs, what they refuse, and that they keep the contract."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

import ovforge_schedulers
from ovforge import testing
from ovforge.contracts.extensions import SchedulerExtension
from ovforge.errors import ConfigError, InputError
from ovforge.model.random import Generator
from ovforge_sampling.options import KEYS
from ovforge_schedulers.beta import symmetric_beta_quantile
from ovforge_schedulers.dpm_multistep import DPMMultistepOptions, dpm_multistep_sde
from samplers import check_rows_alone, options_beside_diffusers

EXTENSIONS = {extension.name: extension for extension in ovforge_schedulers.ovforge_schedulers()}
FLOWS = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "SCMScheduler"}
CLASSES = {extension.implements[0]: extension for extension in EXTENSIONS.values() if extension.implements}


def make(extension: SchedulerExtension, model_config: dict[str, Any] | None = None, **options: Any) -> Any:
    model = extension.options_model()
    assert model is not None
    return extension.create(model(**options), model_config or {})


def network(index: int) -> Any:
    return Generator(100 + index).randn((1, 4, 8, 8))


@pytest.mark.parametrize("name", EXTENSIONS)
def test_each_keeps_the_contract(name: str) -> None:
    testing.check_scheduler(ovforge_schedulers, name, steps=(4, 7))


def test_the_plugin_keeps_the_contract() -> None:
    testing.check_plugin(ovforge_schedulers)


@pytest.mark.parametrize("name", CLASSES)
def test_options_are_those_of_diffusers_with_its_defaults(name: str) -> None:
    if "SDE" in name:
        pytest.importorskip("torchsde")
    assert set(options_beside_diffusers(CLASSES[name])) <= KEYS


def test_keys_are_known_of_every_sampler_of_latent_diffusion() -> None:
    utilities = pytest.importorskip("diffusers.schedulers.scheduling_utils")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("torchsde")
    for each in utilities.KarrasDiffusionSchedulers:
        parameters = inspect.signature(getattr(diffusers, each.name).__init__).parameters
        assert set(parameters) - {"self", "args", "kwargs"} <= KEYS, each.name


@pytest.mark.filterwarnings("ignore")  # of numpy's functions on torch's tensors, in diffusers
@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"SCMScheduler"}))
def test_configs_of_other_samplers_are_taken_as_diffusers_takes_them(both: Any, name: str) -> None:
    """A model that came with another sampler runs with this one, and both make the same of it; or both refuse."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    for package in ("scipy", "torchsde"):
        pytest.importorskip(package)
    for other in sorted(set(CLASSES) - {"SCMScheduler"}):  # whose models alone predict in angles
        config = dict(getattr(diffusers, other)(num_train_timesteps=100).config)
        config["_use_default_values"] = config["_use_default_values"][::2]
        try:
            scheduler = make(CLASSES[name], config)
            ours = scheduler.start(6)
        except ConfigError as error:
            if "samples" in str(error):  # a flow's sampler for a model of diffusion; diffusers makes noise of it
                assert (name in FLOWS) and other not in FLOWS, (name, other)
                continue
            with pytest.raises((ValueError, TypeError, NotImplementedError)):
                getattr(diffusers, name).from_config(config).step(*[torch.zeros(1)] * 3)
            continue
        if config.get("algorithm_type") == "deis" and "DPM" in name:
            config |= {"algorithm_type": "dpmsolver++"}  # diffusers means this, and trips over the name
        theirs = both.theirs(name, config, scheduler)
        theirs.set_timesteps(6)
        both(ours, theirs, 5, **both.tolerances(name, ours))


def test_options_win_over_the_model_and_the_model_over_defaults() -> None:
    config = {"beta_end": 0.012, "timestep_spacing": "trailing", "num_train_timesteps": 500, "_class_name": "X"}
    merged = make(EXTENSIONS["euler"], config, timestep_spacing="leading").config
    assert (merged.beta_end, merged.timestep_spacing, merged.num_train_timesteps) == (0.012, "leading", 500)
    assert merged.beta_start == 0.0001
    reset = make(EXTENSIONS["euler"], {**config, "_use_default_values": ["beta_end"]}).config
    assert reset.beta_end == 0.02, "diffusers takes the class's default for what is listed there"
    assert make(EXTENSIONS["ddim"], {"eta": 0.7}).config.eta == 0, "diffusers reads no eta from a config"


def test_a_models_wrong_value_can_be_set_right() -> None:
    with pytest.raises(ConfigError, match="prediction_type"):
        make(EXTENSIONS["pndm"], {"prediction_type": "sample"})
    assert make(EXTENSIONS["pndm"], {"prediction_type": "sample"}, prediction_type="epsilon")


def test_sde_by_name_is_sde_whatever_the_model_says() -> None:
    config = {"algorithm_type": "dpmsolver++", "solver_order": 3}
    assert dpm_multistep_sde(DPMMultistepOptions(), config).config.algorithm_type == "sde-dpmsolver++"
    assert dpm_multistep_sde(DPMMultistepOptions(), config).config.solver_order == 3
    chosen = DPMMultistepOptions(algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min", solver_order=2)
    assert dpm_multistep_sde(chosen, config).config.algorithm_type == "sde-dpmsolver"


@pytest.mark.parametrize(
    ("name", "config", "steps", "message"),
    [
        ("ddim", {"new_option": 0}, 4, "'new_option' is not one of DDIMScheduler's"),
        ("euler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, 4, "exclude each other"),
        ("euler", {"beta_schedule": "sigmoid"}, 4, "beta_schedule"),
        ("euler-ancestral", {"prediction_type": "sample"}, 4, "prediction_type"),
        ("ddpm", {"variance_type": "fixed_large_log"}, 4, "scheduler.variance_type"),
        ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 4, "rescale_betas_zero_snr"),
        ("lms", {"trained_betas": [0.5, 1.0], "num_train_timesteps": 2}, 1, "trained_betas"),
        ("heun", {"trained_betas": [0.5]}, 4, "1 trained_betas"),
        ("lms", {"beta_end": 0.2}, 4, "scheduler.beta_end: beta_end leaves nothing of the picture"),
        ("euler", {"beta_start": 0.1, "beta_end": 0.2, "rescale_betas_zero_snr": True}, 4, "scheduler.beta_end"),
        ("pndm", {}, 3, "too few for PNDM"),
        ("euler", {}, 1001, "1001 is out of range"),
        ("euler", {}, 0, "0 is out of range"),
        ("euler", {"timestep_spacing": "trailing"}, 61, "timestep -1"),
        ("ddim", {"steps_offset": 1}, 1000, "timestep 1000"),
        ("dpmpp-2m", {"timestep_spacing": "leading"}, 1000, "too many for this schedule"),
        ("dpmpp-2m", {"algorithm_type": "dpmsolver"}, 4, "final_sigmas_type"),
        ("dpmpp-2m", {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3}, 4, "order"),
        ("dpmpp-2m", {"use_flow_sigmas": True, "use_karras_sigmas": True}, 4, "use_flow_sigmas"),
        ("dpm-singlestep", {"solver_order": 4}, 4, "solver_order"),
        ("unipc", {"use_dynamic_shifting": True, "use_flow_sigmas": True}, 4, "use_dynamic_shifting"),
        ("unipc", {"use_dynamic_shifting": True}, 4, "use_dynamic_shifting is for flows"),
        ("flow-euler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, 4, "exclude each other"),
        ("unipc", {"solver_p": {"a": 1}}, 4, "solver_p"),
        ("unipc", {"shift_terminal": 0.1}, 4, "shift_terminal"),
        ("unipc", {"lower_order_final": False}, 4, "lower_order_final"),
        ("deis", {"algorithm_type": "sde-dpmsolver++"}, 4, "algorithm_type"),
        ("edm-euler", {"sigma_schedule": "beta"}, 4, "sigma_schedule"),
        ("dpmpp-sde", {"noise_sampler_seed": 3}, 4, "noise_sampler_seed"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(name: str, config: dict[str, Any], steps: int, message: str) -> None:
    with pytest.raises((ConfigError, InputError), match=message) as raised:
        make(EXTENSIONS[name], config).start(steps)
    assert raised.value.hint or isinstance(raised.value, ConfigError)


def test_a_strength_that_leaves_no_step_is_said() -> None:
    with pytest.raises(InputError, match="less than one"):
        make(EXTENSIONS["euler"]).start(4, 0.2)


LOOKING_BACK = [
    "pndm",
    "lms",
    "heun",
    "dpm2",
    "dpm2-ancestral",
    "dpmpp-sde",
    "dpmpp-2m",
    "dpmpp-2m-sde",
    "dpm-singlestep",
    "unipc",
    "deis",
    "flow-heun",
]


@pytest.mark.parametrize("name", LOOKING_BACK)
def test_steps_out_of_order_are_refused(name: str) -> None:
    run, latents = make(EXTENSIONS[name]).start(6), network(0)
    latents = run.step(network(1), 0, latents, Generator(1))
    with pytest.raises(ValueError, match="step 3 where 1 is due"):
        run.step(network(2), 3, latents, Generator(1))


@pytest.mark.parametrize("name", EXTENSIONS)
def test_a_sample_of_a_batch_is_what_it_would_be_alone(name: str) -> None:
    check_rows_alone(make(EXTENSIONS[name]))


def test_beta_quantiles_equal_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    probability = np.concatenate([np.linspace(0, 1, 1001), np.logspace(-12, -1, 50), 1 - np.logspace(-12, -1, 50)])
    for shape in (0.3, 0.6, 1.0, 2.0):
        wanted = stats.beta.ppf(probability, shape, shape)
        np.testing.assert_allclose(symmetric_beta_quantile(probability, shape), wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"])
@pytest.mark.parametrize("count", [2, 777, 1000])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_schedules_equal_diffusers(schedule: str, count: int, zero_snr: bool) -> None:
    """A few last bits at most: roots are the processor's own in torch, and sums may be fused there."""
    diffusers = pytest.importorskip("diffusers")
    config = {"beta_schedule": schedule, "num_train_timesteps": count}
    name = "HeunDiscreteScheduler" if schedule == "exp" else "DDPMScheduler"
    if schedule != "exp":
        config |= {"rescale_betas_zero_snr": zero_snr, "prediction_type": "v_prediction"}
    theirs = getattr(diffusers, name)(**config).alphas_cumprod.numpy()
    np.testing.assert_allclose(make(CLASSES[name], config).alphas_cumprod, theirs, rtol=2e-6, atol=1e-9)
