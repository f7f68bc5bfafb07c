"""PNDM in numpy: pseudo linear multistep, after pseudo Runge-Kutta steps or without them.

Source of the method: Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds" (2022), equations 9 to
13; the numbers are those of `diffusers.PNDMScheduler`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import RandomStream
from ovforge.errors import InputError
from ovforge_sampling import ONE, AlphaSampling, Array, BetaSchedule, NoiseOptions, NoiseScheduler, SpacingOptions
from ovforge_schedulers.runs import Turns
from ovforge_schedulers.spacing import in_range, spaced

__all__ = ["PNDMOptions", "PNDMSampling", "PNDMScheduler"]

MULTISTEP = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Adams and Bashforth's weights of the newest predictions, by how many there are."""
SIXTH, THIRD, HALF = np.float32(1 / 6), np.float32(1 / 3), np.float32(0.5)


class PNDMOptions(NoiseOptions, SpacingOptions):
    """Options of diffusers' PNDMScheduler."""

    original: ClassVar[str] = "PNDMScheduler"

    beta_schedule: BetaSchedule = "linear"
    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"


class PNDMScheduler(NoiseScheduler[PNDMOptions]):
    """PNDM: one call of the network more than steps, or nine more with the Runge-Kutta steps."""

    def run(self, steps: int) -> PNDMSampling:
        """Return a run from the first step on; raises InputError for fewer steps than Runge and Kutta need."""
        config = self.config
        if not config.skip_prk_steps and steps < 4:
            raise InputError(
                f"{steps} is too few for PNDM with Runge-Kutta steps",
                where="steps",
                hint="Give 4 or more, or set scheduler.skip_prk_steps = true.",
            )
        train = config.num_train_timesteps
        times = spaced(config.timestep_spacing, train, steps, config.steps_offset).round().astype(np.int64)
        in_range(times, train, steps)
        if config.skip_prk_steps:
            # The second step is taken twice, to start the history.
            return PNDMSampling(self, steps, np.concatenate([times[:1], times[1:2], times[1:]]), times[:0])
        halves = times[:4][::-1].repeat(2) + np.tile([0, train // steps // 2], 4)
        kutta = halves[:-1].repeat(2)[1:-1][::-1].copy()
        return PNDMSampling(self, steps, np.concatenate([kutta, times[3:]]), kutta)


class PNDMSampling(AlphaSampling):
    """One run of PNDM."""

    def __init__(
        self, scheduler: PNDMScheduler, steps: int, timesteps: NDArray[np.int64], kutta: NDArray[np.int64]
    ) -> None:
        super().__init__(timesteps, scheduler.alphas_cumprod)
        self._v = scheduler.config.prediction_type == "v_prediction"
        self._final = ONE if scheduler.config.set_alpha_to_one else self.alphas[0]
        self._stride = scheduler.config.num_train_timesteps // steps
        self._kutta = kutta
        self._turns = Turns()
        self._history: list[Array] = []
        self._sum: Array | None = None
        self._start: Array | None = None

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return the latents after step `index`. Raises ValueError out of order."""
        taken = self._turns.take(index)
        timestep = int(self.timesteps[index])
        if taken < len(self._kutta):
            return self._runge_kutta(output, taken, timestep, latents)
        return self._multistep(output, taken, timestep, latents)

    def _runge_kutta(self, output: Array, taken: int, timestep: int, latents: Array) -> Array:
        part = taken % 4
        if part == 0:
            self._history.append(output.copy())
            self._start, self._sum = latents.copy(), output * SIXTH
            slope = output
        elif part < 3:
            assert self._sum is not None
            self._sum += output * THIRD
            slope = output
        else:
            assert self._sum is not None
            slope = self._sum + output * SIXTH
        assert self._start is not None
        following = timestep - (0 if part % 2 else self._stride // 2)
        return self._moved(self._start, int(self._kutta[taken // 4 * 4]), following, slope)

    def _multistep(self, output: Array, taken: int, timestep: int, latents: Array) -> Array:
        following = timestep - self._stride
        if taken == 1:  # the first step again, with the slope at its end
            assert self._start is not None
            timestep, following = timestep + self._stride, timestep
            return self._moved(self._start, timestep, following, (output + self._history[-1]) * HALF)
        self._history = [*self._history[-3:], output.copy()]
        if taken == 0:
            self._start = latents.copy()
        weights = MULTISTEP[len(self._history) - 1]
        slope = self._history[-1] * np.float32(weights[0])
        for weight, older in zip(weights[1:], self._history[-2::-1], strict=True):
            slope += older * np.float32(weight)
        return self._moved(latents, timestep, following, slope)

    def _moved(self, latents: Array, timestep: int, following: int, slope: Array) -> Array:
        """Return latents moved from one timestep to another along the predicted noise (equation 9)."""
        alpha, later = self.alphas[timestep], self.alphas[following] if following >= 0 else self._final
        if self._v:
            slope = np.sqrt(alpha) * slope + np.sqrt(ONE - alpha) * latents
        width = alpha * np.sqrt(ONE - later) + np.sqrt(alpha * (ONE - alpha) * later)
        moved: Array = np.sqrt(later / alpha) * latents
        moved -= slope * ((later - alpha) / width)
        return moved
