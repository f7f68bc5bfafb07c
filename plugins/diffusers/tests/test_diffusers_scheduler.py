"""The adapter against diffusers run natively with the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from ovforge.contracts import FlowRun, FlowScheduler, GivenScheduler
from ovforge.errors import InputError, OvforgeError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from ovforge_diffusers.options import SchedulerOptions  # noqa: E402
from ovforge_diffusers.scheduler import DiffusersScheduler  # noqa: E402

SHAPE = (2, 4, 6, 5)
SD = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip
CASES: list[tuple[str, dict[str, Any]]] = [
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "trailing"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "prediction_type": "v_prediction"}),
    ("UniPCMultistepScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
    ("DDIMScheduler", {"prediction_type": "sample"}),
    ("DDPMScheduler", {}),
    ("PNDMScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": False}),
]

CLEAN = np.linspace(-1, 1, int(np.prod(SHAPE)), dtype=np.float32).reshape(SHAPE)


class Stream:
    """torch's own numbers, as a RandomStream."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def randn(self, shape: Sequence[int]) -> np.ndarray:
        return torch.randn(tuple(shape), generator=self.generator).numpy()


def network(sample: np.ndarray, t: float) -> np.ndarray:
    """Stand in for a UNet: depends on everything, not linear."""
    return (np.tanh(sample * 0.7 + 0.1 * np.sin(t)) * 0.9).astype(np.float32)


def native(name: str, config: dict[str, Any], steps: int, seed: int, strength: float = 1.0) -> np.ndarray:
    """Run as diffusers' own pipelines do; with `strength`, as those of image to image."""
    scheduler = getattr(diffusers, name).from_config({**SD, **config})
    scheduler.set_timesteps(steps)
    first = 0
    generator = torch.Generator("cpu").manual_seed(seed)
    latents = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    if strength < 1:
        first = (steps - int(steps * strength)) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        noise = torch.randn(SHAPE, generator=generator)
        latents = scheduler.add_noise(torch.from_numpy(CLEAN), noise, scheduler.timesteps[first : first + 1])
    import inspect

    given = {"generator": generator, "eta": 0.0}  # as pipelines pass them
    extra = {name: given[name] for name in given if name in inspect.signature(scheduler.step).parameters}
    for t in scheduler.timesteps[first:]:
        seen = scheduler.scale_model_input(latents, t)
        output = torch.from_numpy(network(seen.numpy(), float(t)))
        latents = scheduler.step(output, t, latents, **extra, return_dict=False)[0]
    return latents.numpy()


def adapted(name: str, config: dict[str, Any], steps: int, seed: int, strength: float = 1.0) -> np.ndarray:
    """Run through the adapter, with one buffer for all outputs and one for all latents."""
    sampling = DiffusersScheduler(SchedulerOptions(class_name=name, options=config), SD).start(steps, strength)
    stream = Stream(seed)
    latents = stream.randn(SHAPE) * np.float32(sampling.init_noise_sigma)
    if strength < 1:
        latents = sampling.add_noise(CLEAN, stream.randn(SHAPE), sampling.first)
    output = np.empty(SHAPE, np.float32)
    for index in range(sampling.first, len(sampling.timesteps)):
        t = sampling.timesteps[index]
        output[...] = network(sampling.scale_input(latents, index), float(t))
        result = sampling.step(output, index, latents, stream)
        assert result.dtype == np.float32 and result.shape == SHAPE
        latents[...] = result
        output.fill(np.nan)
    return latents


@pytest.mark.parametrize(("name", "config"), CASES, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("steps", [4, 11])
def test_a_run_equals_a_native_one(name: str, config: dict[str, Any], steps: int) -> None:
    theirs = native(name, config, steps, 7)
    ours = adapted(name, config, steps, 7)
    assert np.isfinite(theirs).all()
    assert np.abs(ours - theirs).max() <= 1e-6 * max(1.0, np.abs(theirs).max())


@pytest.mark.parametrize(("name", "config"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_run_from_a_picture_equals_a_native_one(name: str, config: dict[str, Any]) -> None:
    if name == "LCMScheduler" or not config.get("skip_prk_steps", True):
        pytest.skip("LCM spreads its steps (tested with its plugin); PRK steps cannot begin later")
    theirs, ours = native(name, config, 11, 7, 0.6), adapted(name, config, 11, 7, 0.6)
    assert np.abs(ours - theirs).max() <= 1e-6 * max(1.0, np.abs(theirs).max())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True, "shift": 3.0}),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchLCMScheduler", {"use_karras_sigmas": True}),
    ],
)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_flow_equals_a_native_one(name: str, config: dict[str, Any], strength: float) -> None:
    """As FLUX's pipelines begin it, with the shift of 1024 tokens; Heun as those of SD 3."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    native, steps = getattr(diffusers, name)(**config), 7
    sigmas = None if "Heun" in name else np.linspace(1, 1 / steps, steps)
    said: dict[str, Any] = {"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}
    native.set_timesteps(**said | ({"mu": calculate_shift(1024)} if "use_dynamic_shifting" in config else {}))
    first, generator, stream = int(steps - steps * strength) * native.order, Stream(7).generator, Stream(7)
    sampling = DiffusersScheduler(SchedulerOptions(class_name=name), config).start_flow(
        steps, FlowRun(image_seq_len=1024, sigmas=sigmas), strength
    )
    assert isinstance(DiffusersScheduler(SchedulerOptions(class_name=name), config), FlowScheduler)
    assert sampling.first == first
    native.set_begin_index(first)
    wanted, mine = torch.randn(SHAPE, generator=generator), stream.randn(SHAPE)
    if first:
        wanted = native.scale_noise(torch.from_numpy(CLEAN), native.timesteps[first][None], wanted)
        mine = sampling.add_noise(CLEAN, mine, first)
    for index in range(first, len(native.timesteps)):
        time = native.timesteps[index]
        answer = torch.from_numpy(network(wanted.numpy(), float(time)))
        mine = sampling.step(network(sampling.scale_input(mine, index), float(time)), index, mine, stream)
        wanted = native.step(answer, time, wanted, generator=generator, return_dict=False)[0]
    np.testing.assert_allclose(mine, wanted.numpy(), atol=1e-6)


def test_a_flow_says_what_its_class_cannot_take() -> None:
    scheduler = DiffusersScheduler(SchedulerOptions(class_name="FlowMatchHeunDiscreteScheduler"), {})
    with pytest.raises(InputError, match="Heun.* takes no sigmas"):
        scheduler.start_flow(2, FlowRun(sigmas=[1.0, 0.5]))


def test_levels_of_a_call_are_those_of_the_class() -> None:
    """Its arguments are given what a call gives; of two calls a step, all count for the strength."""
    for name, given, first in [
        ("EulerDiscreteScheduler", {"sigmas": [9.0, 3.0, 0.5, 0.0]}, 1),
        ("HeunDiscreteScheduler", {"timesteps": [900, 500, 100]}, 4),
    ]:
        native = getattr(diffusers, name).from_config(SD)
        native.set_timesteps(**given)
        scheduler = DiffusersScheduler(SchedulerOptions(class_name=name), SD)
        assert isinstance(scheduler, GivenScheduler)
        sampling = scheduler.start_given(0.7, **given)
        assert sampling.first == first
        np.testing.assert_array_equal(sampling.timesteps, native.timesteps.numpy())
        np.testing.assert_array_equal(sampling._scheduler.sigmas, native.sigmas)
    with pytest.raises(InputError, match="DDIMScheduler takes no timesteps"):
        DiffusersScheduler(SchedulerOptions(class_name="DDIMScheduler"), SD).start_given(timesteps=[500])


def test_noise_is_of_the_step_asked_for() -> None:
    """Also in the middle of a run, where diffusers itself would take the run's own place."""
    sampling = DiffusersScheduler(SchedulerOptions(class_name="EulerDiscreteScheduler"), SD).start(6)
    sampling.scale_input(CLEAN, 0)
    noise = Stream(3).randn(SHAPE)
    reference = diffusers.EulerDiscreteScheduler.from_config(SD)
    reference.set_timesteps(6)
    for index in range(6):
        np.testing.assert_allclose(
            sampling.add_noise(CLEAN, noise, index), CLEAN + noise * reference.sigmas[index].numpy(), rtol=1e-6
        )
    with pytest.raises(InputError, match="less than one"):
        DiffusersScheduler(SchedulerOptions(class_name="EulerDiscreteScheduler"), SD).start(6, 0.1)


def test_threads_do_not_share_noise() -> None:
    expected = [adapted("EulerAncestralDiscreteScheduler", {}, 5, seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda seed: adapted("EulerAncestralDiscreteScheduler", {}, 5, seed), range(6)))
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.abs(expected[0] - expected[1]).max() > 0.1


def test_starting_in_the_middle_and_out_of_order() -> None:
    sampling = DiffusersScheduler(SchedulerOptions(class_name="EulerDiscreteScheduler"), SD).start(6)
    reference = diffusers.EulerDiscreteScheduler.from_config(SD)
    reference.set_timesteps(6)
    reference.set_begin_index(3)
    latents = Stream(1).randn(SHAPE)
    t = reference.timesteps[3]
    seen = reference.scale_model_input(torch.from_numpy(latents), t)
    want = reference.step(torch.from_numpy(network(seen.numpy(), 1.0)), t, torch.from_numpy(latents)).prev_sample
    got = sampling.step(network(sampling.scale_input(latents, 3), 1.0), 3, latents, Stream(1))
    np.testing.assert_allclose(got, want.numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="in order"):
        sampling.step(latents, 2, latents, Stream(1))


def test_options_lie_over_the_models_config() -> None:
    config = {**SD, "_class_name": "DDIMScheduler", "_use_default_values": ["timestep_spacing", "prediction_type"]}
    options = SchedulerOptions(options={"timestep_spacing": "trailing"})
    times = DiffusersScheduler(options, config).start(4).timesteps
    assert times.tolist() == [999, 749, 499, 249]
    assert times.dtype == np.int64


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({}, {}, "The model names none"),
        ({"class_name": "EulerDiscretScheduler"}, SD, "Did you mean 'EulerDiscreteScheduler'"),
        ({"class_name": "os"}, SD, "no scheduler"),
        ({"class_name": "DDIMScheduler", "options": {"beta_strat": 1}}, SD, "no option 'beta_strat'.*'beta_start'"),
        ({"class_name": "DDIMScheduler", "options": {"beta_schedule": "x"}}, SD, "refuses its config"),
        ({"class_name": "RePaintScheduler"}, SD, "samples in another way"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], config: dict[str, Any], message: str) -> None:
    with pytest.raises(OvforgeError, match=message):
        DiffusersScheduler(SchedulerOptions(**options), config)


def test_too_many_steps_are_an_input_error() -> None:
    scheduler = DiffusersScheduler(SchedulerOptions(class_name="LCMScheduler"), SD)
    with pytest.raises(InputError, match="5000 steps"):
        scheduler.start(5000)


def test_the_plugin_keeps_the_contract() -> None:
    import ovforge_diffusers
    from ovforge import testing

    testing.check_plugin(ovforge_diffusers)
    testing.check_scheduler(ovforge_diffusers, "diffusers", {"class_name": "EulerAncestralDiscreteScheduler"})
