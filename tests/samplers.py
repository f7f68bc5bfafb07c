"""Runs of ours beside runs of diffusers, with the same outputs of a network and the same noise."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from ovforge.contracts import SchedulerExtension
from ovforge.model.random import BatchGenerator, Generator

SHAPE = (2, 4, 6, 5)


class TorchStream:
    """torch's own numbers, so that what differs is the scheduler alone (ovforge.model.random has tests of its own)."""

    def __init__(self, seed: int) -> None:
        import torch

        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, shape: Any) -> Any:
        import torch

        return torch.randn(tuple(shape), generator=self.generator).numpy()


class BrownianPath:
    """What torchsde does for diffusers, from a torch generator: increments of one path, divided by their deviation."""

    def __init__(self, shape: tuple[int, ...], generator: Any) -> None:
        self.shape, self.generator = shape, generator
        self.known: tuple[float, float, Any] | None = None

    def __call__(self, begin: Any, end: Any) -> Any:
        import torch

        begin, end = float(begin), float(end)
        fresh = torch.randn(self.shape, generator=self.generator)
        if self.known is not None and self.known[0] == begin:
            _, middle, increment = self.known
            increment = increment + fresh * (middle - end) ** 0.5
        else:
            increment = fresh * (begin - end) ** 0.5
        self.known = begin, end, increment
        return increment / (begin - end) ** 0.5


def smooth(seen: np.ndarray, timestep: float) -> np.ndarray:
    """Stand in for a network: its answers change little from step to step."""
    return (np.tanh(0.7 * seen + 0.1 * np.sin(timestep / 100)) * 0.9).astype(np.float32)


def run_both(
    ours: Any,
    theirs: Any,
    seed: int,
    *,
    random: bool = True,
    arguments: dict[str, Any] | None = None,
    tolerance: float = 1e-5,
    time_tolerance: float = 1e-6,
    shape: tuple[int, ...] = SHAPE,
    widen: int = 1,
) -> None:
    """Go through both runs from `ours.first` on, and compare timesteps, first latents and every step.

    `random` networks answer with noise; others with a smooth function of diffusers' latents, the same for both: else
    a last bit would grow by the width of a step. Neither run sees the other's latents, so errors add up. They are
    relative to the largest latents there were: random answers blow latents up where alpha is small.
    """
    import torch

    times = theirs.timesteps if theirs.timesteps.dtype == torch.int64 else theirs.timesteps.to(torch.float32)
    if type(theirs).__name__ == "SCMScheduler":
        times = times[:-1]  # the end of the run, which its pipeline leaves out
    assert ours.timesteps.dtype in (np.int64, np.float32)
    assert np.isfinite(ours.timesteps).all()
    if not bool(torch.isfinite(times).all()):  # diffusers takes the root of less than nothing, by rounding
        return
    np.testing.assert_allclose(ours.timesteps, times.numpy(), rtol=2e-6, atol=time_tolerance)
    if ours.timesteps.dtype == np.int64 and time_tolerance < 1:
        np.testing.assert_array_equal(ours.timesteps, times.numpy())
    np.testing.assert_allclose(ours.init_noise_sigma, float(getattr(theirs, "init_noise_sigma", 1)), rtol=1e-6)
    network, stream, first = Generator(seed ^ 1), TorchStream(seed), ours.first
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(first)
    mine = stream.randn(shape)
    if first:
        clean = network.randn(shape)
        wanted = noised(theirs, torch.from_numpy(clean), theirs.timesteps[first], torch.from_numpy(mine.copy()))
        mine = ours.add_noise(clean, mine, first)
        np.testing.assert_allclose(mine, wanted.numpy(), rtol=0, atol=1e-6 * max(1.0, float(wanted.abs().max())))
    else:
        mine *= np.float32(ours.init_noise_sigma)
        wanted = torch.from_numpy(mine.copy())
    extra = dict(arguments or {})
    twin = stream_twin(stream)
    extra |= {"generator": twin} if takes_generator(theirs) else {}
    if hasattr(theirs, "noise_sampler"):
        theirs.noise_sampler = BrownianPath(shape, twin)
    scale = 1.0
    for index in range(first, len(times)):
        seen, theirs_seen = ours.scale_input(mine, index), wanted
        if hasattr(theirs, "scale_model_input"):
            theirs_seen = theirs.scale_model_input(wanted, theirs.timesteps[index])
        scale = max(scale, float(wanted.abs().max()))
        np.testing.assert_allclose(seen, theirs_seen.numpy(), rtol=0, atol=tolerance * scale)
        if random:
            output = network.randn((shape[0], shape[1] * widen, *shape[2:]))
        else:
            output = smooth(theirs_seen.numpy(), float(times[index]))
        said = torch.from_numpy(output.copy())
        before = output.copy(), mine.copy()
        kept = mine
        mine = ours.step(output, index, mine, stream)
        np.testing.assert_array_equal(output, before[0], "a step changes the network's output")
        np.testing.assert_array_equal(kept, before[1], "a step changes its latents")
        assert not np.shares_memory(mine, output) and not np.shares_memory(mine, kept)
        output.fill(np.nan), kept.fill(np.nan)  # callers reuse their buffers: a history must have copies
        assert mine.dtype == np.float32
        with torch.no_grad():
            wanted = theirs.step(said, theirs.timesteps[index], wanted, return_dict=False, **extra)[0]
        if not bool(torch.isfinite(wanted).all()):  # as UniPC's "bh1" at zero noise: infinity times no correction
            assert np.isfinite(mine).all()
            return
        scale = max(scale, float(wanted.abs().max()))
        np.testing.assert_allclose(mine, wanted.numpy(), rtol=0, atol=tolerance * scale)


def noised(theirs: Any, clean: Any, timestep: Any, noise: Any) -> Any:
    """Return what a pipeline of diffusers starts from a picture with."""
    import torch

    if type(theirs).__name__ == "SCMScheduler":  # in the pipeline
        return torch.cos(timestep) * clean + torch.sin(timestep) * (noise * theirs.config.sigma_data)
    if type(theirs).__name__ == "FlowMatchHeunDiscreteScheduler":
        return theirs.scale_noise(clean, timestep, noise)
    if hasattr(theirs, "scale_noise"):
        return theirs.scale_noise(clean, timestep[None], noise)
    return theirs.add_noise(clean, noise, timestep[None])


def make(name: str, config: dict[str, Any], ours: Any) -> Any:
    """Return diffusers' scheduler `name`, with our alphas where betas are rescaled to zero SNR.

    That rescaling takes square roots, and torch's are a bit off in a way of the processor's own; where alpha is near 1
    or 0, a step multiplies it. `test_noise_schedules_equal_diffusers` compares the alphas themselves.
    """
    import diffusers
    import torch

    theirs = getattr(diffusers, name).from_config(config)  # which keeps the sigma_min of other classes
    if config.get("rescale_betas_zero_snr"):
        alphas = torch.from_numpy(ours.alphas_cumprod.copy())
        np.testing.assert_allclose(alphas, theirs.alphas_cumprod, rtol=2e-6, atol=1e-7)
        if getattr(theirs, "final_alpha_cumprod", None) is not None and not config.get("set_alpha_to_one", True):
            theirs.final_alpha_cumprod = alphas[0]
        theirs.alphas_cumprod = alphas
    return theirs


def takes_generator(theirs: Any) -> bool:
    return "generator" in inspect.signature(theirs.step).parameters


def stream_twin(stream: TorchStream) -> Any:
    """Return a generator that is where the stream is."""
    import torch

    twin = torch.Generator()
    twin.set_state(stream.generator.get_state())
    return twin


def tolerances(name: str, ours: Any) -> dict[str, float]:
    """Return what to allow a class by name: more where it takes `sqrt(to**2 - up**2)` in float32, nearly nothing.

    The level half way of DPM2's ancestral form has an error of 3e-8 * from / to, and so has its timestep, so to speak.
    """
    if name != "KDPM2AncestralDiscreteScheduler":
        return {}
    levels = ours.sigmas[:-1]
    steepest = float(np.max(levels[:-1] / levels[1:])) if len(levels) > 1 else 1.0
    return {"tolerance": max(1e-5, 2e-7 * steepest), "time_tolerance": 0.1}


class Both:
    """Runs ours beside theirs; `theirs` makes a scheduler of diffusers, `tolerances` says what to allow."""

    theirs = staticmethod(make)
    tolerances = staticmethod(tolerances)
    __call__ = staticmethod(run_both)


@pytest.fixture(scope="session")
def both() -> Both:
    """The comparison, where torch and diffusers are installed."""
    pytest.importorskip("torch").set_num_threads(1)
    pytest.importorskip("diffusers").utils.logging.set_verbosity_error()
    return Both()


def options_beside_diffusers(extension: SchedulerExtension) -> dict[str, Any]:
    """Check that a method's options are those of its class in diffusers, with the same defaults; return them."""
    diffusers = pytest.importorskip("diffusers")
    options: Any = extension.options_model()
    ours = {key: field.default for key, field in options.model_fields.items() if key not in options.ours}
    parameters = inspect.signature(getattr(diffusers, extension.implements[0]).__init__).parameters
    theirs = {key: parameter.default for key, parameter in parameters.items() if key != "self"}
    # diffusers reads these two from a config even where its class does not name them.
    assert set(ours) - set(theirs) <= {"sigma_min", "sigma_max"}
    assert set(theirs) <= set(ours)
    same = {"lambda_min_clipped": -float("inf"), "disable_corrector": []}
    for key, default in theirs.items():
        found = list(ours[key]) if isinstance(ours[key], tuple) else ours[key]
        assert same.get(key, found) == default, key
    return ours


def check_rows_alone(scheduler: Any) -> None:
    """Check that a sample of a batch is what it would be alone."""
    answers = [Generator(number).randn((2, 4, 8, 8)) for number in range(20)]
    start = Generator(3).randn((2, 4, 8, 8))

    def final(rows: slice) -> np.ndarray:
        run, rng, latents = scheduler.start(5), BatchGenerator([7, 8][rows]), start[rows].copy()
        for index in range(len(run.timesteps)):
            latents = run.step(answers[index][rows], index, latents, rng)
        return latents

    np.testing.assert_array_equal(final(slice(None))[1:], final(slice(1, 2)))
