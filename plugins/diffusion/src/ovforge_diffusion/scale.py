"""The scale of latents: what lies between an autoencoder's and the denoiser's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovforge.errors import ModelError

__all__ = ["FRAMED", "Scale"]

FRAMED = "AutoencoderKLQwenImage"
"""Class of autoencoders for videos, which take a picture as one frame."""

_UNSCALED = ("AutoencoderTiny", FRAMED, "AutoencoderKLLTXVideo")
"""Classes of autoencoders whose latents have no factor if their configs name none."""


@dataclass(frozen=True)
class Scale:
    """How an autoencoder's latents become the denoiser's: less a shift or a mean, times a factor, by a deviation."""

    factor: float
    shift: float
    mean: tuple[float, ...] | None
    deviation: tuple[float, ...] | None

    @classmethod
    def of(cls, config: Mapping[str, Any], family: tuple[float, float] | None = None) -> Scale:
        """Read an autoencoder's config.json. Defaults are those of its class.

        A scaling_factor of null is one that its file does not tell: factor and shift are then those of the `family`.
        Raises ModelError if that has none, and for what is not a number, or not one to multiply or divide by.
        """
        if (mean := _numbers(config, "bn_running_mean_data")) and (
            variance := _numbers(config, "bn_running_var_data", positive=True)
        ):  # of FLUX.2, whose statistics are those of a batch normalization
            eps = _number(config.get("bn_eps", 1e-4), "bn_eps", positive=True)
            spread = np.sqrt(np.array(variance, np.float32) + np.float32(eps))
            return cls(factor=1.0, shift=0.0, mean=mean, deviation=tuple(spread.tolist()))
        if config.get("scaling_factor", 1.0) is None:
            if family is None:
                raise ModelError(
                    "its scaling_factor is null: the file that it was made of does not tell it",
                    where="vae_decoder/config.json",
                    hint="Convert it again with the option config = FOLDER, a diffusers folder of the same model.",
                )
            return cls(factor=family[0], shift=family[1], mean=None, deviation=None)
        plain = config.get("_class_name") in _UNSCALED
        return cls(
            factor=_number(config.get("scaling_factor", 1.0 if plain else 0.18215), "scaling_factor", positive=True),
            shift=_number(config.get("shift_factor") or 0.0, "shift_factor"),
            mean=_numbers(config, "latents_mean", "latents_mean_data"),
            deviation=_numbers(config, "latents_std", "latents_std_data", positive=True),
        )


_LARGEST = 1e30
"""Beyond any number of an autoencoder; float32 holds it, too."""


def _numbers(config: Mapping[str, Any], *names: str, positive: bool = False) -> tuple[float, ...] | None:
    """Return the numbers of the first name that has some."""
    name = next((name for name in names if config.get(name)), None)
    if name is None:
        return None
    values = config[name] if isinstance(config[name], list | tuple) else [config[name]]
    return tuple(_number(value, name, positive=positive) for value in values)


def _number(value: Any, name: str, *, positive: bool = False) -> float:
    if not isinstance(value, int | float) or not abs(value) <= _LARGEST or (positive and value <= 0):
        raise ModelError(
            f"{name} = {value!r} is not a number{' above 0' if positive else ''}",
            where="vae_decoder/config.json",
            hint="Take the config.json of the model's own autoencoder.",
        )
    return float(value)
