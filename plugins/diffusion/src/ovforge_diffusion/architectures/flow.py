"""What transformers that predict a flow have in common: how their runs begin (Esser et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import FlowRun, FlowScheduler, Sampling, Scheduler
from ovforge.errors import InputError

__all__ = ["SIDE", "begin_flow", "grid", "packed", "sequence_length", "unpacked"]

SIDE = 2
"""Latents along each side of what is packed into one token."""

_LONGEST = 512


def begin_flow(
    scheduler: Scheduler,
    steps: int,
    strength: float,
    *,
    tokens: int,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> Sampling:
    """Begin a run over pictures of so many `tokens`; `sigmas` are levels of noise before any shift, one a step.

    `mu` is the shift of families that have a formula of their own.
    """
    if not isinstance(scheduler, FlowScheduler):  # a third party's, which knows one schedule only
        return scheduler.start(steps, strength)
    own = None if scheduler.own_sigmas else sigmas
    return scheduler.start_flow(steps, FlowRun(image_seq_len=tokens, sigmas=own, mu=mu), strength)


def grid(picture: int, height: int, width: int, axes: int) -> NDArray[np.float32]:
    """Return the places of a picture's tokens, (height * width, axes): the picture's number, row, column, zeros."""
    places = np.zeros((height, width, axes), np.float32)
    places[..., 0] = picture
    places[..., 1] = np.arange(height)[:, None]
    places[..., 2] = np.arange(width)[None]
    return places.reshape(-1, axes)


def packed(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a token for each square of 2 x 2 latents (pictures, channels, height, width): (pictures, tokens, ...)."""
    pictures, channels, height, width = latents.shape
    squares = latents.reshape(pictures, channels, height // SIDE, SIDE, width // SIDE, SIDE)
    return squares.transpose(0, 2, 4, 1, 3, 5).reshape(pictures, -1, channels * SIDE**2)


def unpacked(latents: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Return packed latents as (pictures, channels, height, width) again."""
    pictures, _, channels = latents.shape
    squares = latents.reshape(pictures, height // SIDE, width // SIDE, channels // SIDE**2, SIDE, SIDE)
    return squares.transpose(0, 3, 1, 4, 2, 5).reshape(pictures, -1, height, width)


def sequence_length(given: object, default: int, longest: int = _LONGEST) -> int:
    """Return how many tokens the longest text encoder reads. Raises InputError for what diffusers refuses, too."""
    if given is None:
        return default
    if not isinstance(given, int) or not 1 <= given <= longest:
        raise InputError(f"{given} is out of range", where="max_sequence_length", hint=f"Give 1 to {longest}.")
    return given
