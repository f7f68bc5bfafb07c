"""Pictures and videos that a video shows at some of its frames, as diffusers' LTXConditionPipeline gives them to it.

What is for the first frames takes their place in the latents. What is for later ones stands before them, as tokens that
are told the seconds of those frames; of a long video only the first latents do, and the others take their place, too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import RandomStream, Sampling
from ovforge_diffusion.architectures.ltx import LTXVideo
from ovforge_diffusion.diffusion import Start
from ovforge_diffusion.graph.video_places import PLACES

__all__ = ["Conditions"]

Array = NDArray[np.float32]

_PREFIX = 2
"""Latents of a video that stand before those of the frames that it is for."""
_NEAR = 1e-6


class Conditions:
    """Latents to begin with, (videos, channels, frames, height, width), and the conditions that are added to them."""

    def __init__(self, architecture: LTXVideo, latents: Array, rate: float) -> None:
        self._architecture, self._latents, self._rate = architecture, latents, rate
        self._shares = np.zeros(latents.shape[2], np.float32)
        """How far each frame of the latents is given."""
        self._tokens: list[Array] = []
        self._places: list[Array] = []
        self._parts: list[Array] = []

    def add(self, given: Array, frame: int, strength: float, rng: RandomStream) -> None:
        """Add latents of a picture or video, (videos, channels, frames, height, width), at a frame of the video."""
        if not frame:
            self._mix(0, given, strength)
            return
        if given.shape[2] > _PREFIX:
            self._mix(frame // self._architecture.frame_factor + _PREFIX, given[:, :, _PREFIX:], strength)
            given = given[:, :, :_PREFIX]
        tokens = self._architecture.pack(_between(rng.randn(given.shape), given, strength))
        self._tokens.append(tokens)
        self._places.append(self._architecture.places(given.shape[2:], self._rate, frame))
        self._parts.append(np.full(tokens.shape[1], strength, np.float32))

    def start(self, sampling: Sampling, first: int, noise: float, rng: RandomStream) -> Start:
        """Return where the run begins; `noise` is the deviation of what is added to tokens that are wholly given."""
        pack, size = self._architecture.pack, self._latents.shape[2:]
        whole = np.concatenate([*self._tokens, pack(self._latents)], axis=1)
        places = np.concatenate([*self._places, self._architecture.places(size, self._rate)], axis=1)
        shares = np.concatenate([*self._parts, np.repeat(self._shares, size[1] * size[2])])
        steps = _Steps(whole, shares, sampling.timesteps / self._architecture.train_timesteps, noise, rng)
        return Start(
            whole, first, renew=steps.renew, blend=steps.blend, still=shares, held={PLACES: places},
            before=sum(tokens.shape[1] for tokens in self._tokens),
        )  # fmt: skip

    def _mix(self, frame: int, given: Array, strength: float) -> None:
        part = slice(frame, frame + given.shape[2])
        self._latents[:, :, part] = _between(self._latents[:, :, part], given, strength)
        self._shares[part] = strength


class _Steps:
    """What happens to given tokens around each step: `times` are parts of noise that steps begin with."""

    def __init__(
        self, begin: Array, shares: Array, times: NDArray[np.floating], noise: float, rng: RandomStream
    ) -> None:
        self._begin, self._rest, self._times = begin, (1 - shares)[:, None], times
        self._whole = (shares > 1 - _NEAR)[:, None]
        self._noise, self._rng = np.float32(noise), rng
        self._held = begin

    def renew(self, latents: Array, index: int) -> Array:
        """Return the latents before a step, with new noise on the tokens that are wholly given."""
        if self._noise:
            noise = self._noise * self._rng.randn(latents.shape) * np.float32(self._times[index]) ** 2
            latents = np.where(self._whole, self._begin + noise, latents)
        self._held = latents
        return latents

    def blend(self, latents: Array, index: int) -> Array:
        """Return the latents after a step, in which tokens with less noise than the step begins with stay."""
        return np.where(self._times[index] - _NEAR < self._rest, latents, self._held)


def _between(one: Array, other: Array, share: float) -> Array:
    """Return `other` for a share of 1, `one` for 0: torch.lerp, which is exact at both ends."""
    weight = np.float32(share)
    return one + weight * (other - one) if weight < 0.5 else other - (other - one) * (np.float32(1) - weight)
