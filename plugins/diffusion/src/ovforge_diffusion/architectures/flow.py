"""What transformers that predict a flow have in common: how their runs begin (Esser et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import FlowRun, FlowScheduler, Sampling, Scheduler
from ovforge.errors import InputError

__all__ = ["begin_flow", "grid", "sequence_length"]

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


def sequence_length(given: object, default: int) -> int:
    """Return how many tokens the longest text encoder reads. Raises InputError for what diffusers refuses, too."""
    if given is None:
        return default
    if not isinstance(given, int) or not 1 <= given <= _LONGEST:
        raise InputError(f"{given} is out of range", where="max_sequence_length", hint=f"Give 1 to {_LONGEST}.")
    return given
