"""A run of a sampling method as tables of numbers, found by running the method itself on basis vectors.

Nearly all methods are linear: the latents after each step are a sum of the first latents, the predictions so far and
the noise drawn so far, each times a number. What the numbers are, a run on unit vectors says: one row of a batch for
each of them. No method is written a second time here, and those that remember several predictions, call the network
twice a step or add noise need nothing of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import Sampling
from ovforge.errors import ConfigError
from ovforge_diffusion.architectures.base import Architecture

__all__ = ["LinearSampler", "linear_sampler"]

Array = NDArray[np.float32]

_TOLERANCE = 1e-3
"""How far a linear method may be from its table, as a part of all that is added up: rounding stays far below."""

_SIZES = (1.0, 1000.0)
"""Deviations of the numbers that linearity is tried with: small ones reach no bound, large ones every bound."""


@dataclass(frozen=True)
class LinearSampler:
    """A run of `calls` calls of the network, all float32. Latents number n are those that call n begins with.

    latents[n] = start[n] * noise before the run + outputs[n] @ the network's outputs + noise[n] @ the noise drawn later
    """

    timesteps: Array
    """What the network is told, (calls,)."""

    scales: Array
    """What the network sees of the latents is their product with these, (calls,)."""

    start: Array
    """(calls + 1,)"""

    outputs: Array
    """(calls + 1, calls); 0 for calls that are still to come."""

    noise: Array
    """(calls + 1, draws)"""

    drawn_at: tuple[int, ...]
    """The call after which each draw of noise is needed, (draws,)."""

    @property
    def calls(self) -> int:
        """How often the network is called."""
        return len(self.timesteps)

    @property
    def draws(self) -> int:
        """How many draws of noise a run takes, after the first latents."""
        return len(self.drawn_at)


def linear_sampler(begin: Callable[[], Sampling], architecture: Architecture) -> LinearSampler:
    """Return the tables of a run; `begin` begins it anew each time.

    What the architecture makes of timesteps and outputs is part of them. Raises ConfigError for a method that is not
    linear in latents, predictions and noise.
    """
    sampling = begin()
    calls = len(sampling.timesteps)
    counting = _Stream(lambda draw, shape: np.zeros(shape, np.float32))
    nothing = np.zeros((1, 1, 1, 1), np.float32)
    _latents(sampling, architecture, nothing, [nothing] * calls, counting)
    drawn_at = counting.steps

    unit = np.eye(1 + calls + len(drawn_at), dtype=np.float32)[:, :, None, None, None]
    stream = _Stream(lambda draw, shape: unit[1 + calls + draw].copy())
    found = _latents(begin(), architecture, unit[0], [unit[1 + call] for call in range(calls)], stream)
    table: Array = found[:, :, 0, 0, 0]
    table[:, 0] *= np.float32(sampling.init_noise_sigma)
    scales = np.array([sampling.scale_input(np.ones_like(nothing), n).item() for n in range(calls)], np.float32)
    told = [architecture.timestep(float(timestep)) for timestep in sampling.timesteps]
    made = LinearSampler(
        np.array(told, np.float32), scales, table[:, 0], table[:, 1 : 1 + calls], table[:, 1 + calls :], drawn_at
    )
    _check(made, begin, architecture)
    used = [draw for draw in range(made.draws) if made.noise[:, draw].any()]
    kept = used[-1] + 1 if used else 0  # methods draw noise in their last step, too, and multiply it by zero
    return replace(made, noise=made.noise[:, :kept], drawn_at=drawn_at[:kept])


class _Stream:
    """A stream of what `draw(number, shape)` returns; `steps` are the steps that drew."""

    def __init__(self, draw: Callable[[int, Sequence[int]], Array]) -> None:
        self._draw, self._at, self._step = draw, list[int](), 0

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(self._at)

    def go_to(self, step: int) -> None:
        self._step = step

    def randn(self, shape: Sequence[int]) -> Array:
        self._at.append(self._step)
        return self._draw(len(self._at) - 1, shape)


def _latents(
    sampling: Sampling, architecture: Architecture, latents: Array, outputs: Sequence[Array], rng: _Stream
) -> Array:
    """Return the latents before the run and after each call, (calls + 1, ...)."""
    found = [latents]
    for index, output in enumerate(outputs):
        rng.go_to(index)
        found.append(sampling.step(architecture.predicted(output), index, found[-1], rng))
    return np.stack(found)


def _check(table: LinearSampler, begin: Callable[[], Sampling], architecture: Architecture) -> None:
    """Raise ConfigError if a run on random numbers is not what the tables say."""
    random = np.random.default_rng(0)
    shape = (2, 4, 8, 8)
    for size in _SIZES:
        sampling = begin()
        first, outputs, noise = (
            np.float32(size) * random.standard_normal((count, *shape), np.float32)
            for count in (1, table.calls, table.draws)
        )
        stream = _Stream(lambda draw, shape, noise=noise: noise[draw].copy())  # type: ignore[misc]
        begun = first[0] * np.float32(sampling.init_noise_sigma)
        wanted = _latents(sampling, architecture, begun, list(outputs), stream)
        weights = np.concatenate([table.start[:, None], table.outputs, table.noise], axis=1)
        values = np.concatenate([first, outputs, noise])
        made, most = np.tensordot(weights, values, 1), np.tensordot(np.abs(weights), np.abs(values), 1)
        seen = [sampling.scale_input(latents, index) for index, latents in enumerate(wanted[:-1])]
        scaled = table.scales[:, None, None, None, None] * wanted[:-1]
        exact = np.abs(made - wanted) <= _TOLERANCE * most
        if not (exact.all() and np.allclose(seen, scaled, rtol=_TOLERANCE, atol=0)):
            raise ConfigError(
                "its steps are not linear in latents, predictions and noise, so that no table of numbers does",
                where="scheduler",
                hint="Set scheduler.clip_sample = false and scheduler.thresholding = false if it has them, or choose "
                "another method, such as 'euler' or 'dpmpp-2m'.",
            )
