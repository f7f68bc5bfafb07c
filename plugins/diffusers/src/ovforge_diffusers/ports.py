"""What describes a submodel to the converter: what is traced, its inputs and its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ovforge_convert import Port

__all__ = ["SCALE", "RuntimeOptions", "Sizes", "Submodel"]

RuntimeOptions = tuple[tuple[str, str], ...]

SCALE: RuntimeOptions = (("ACTIVATIONS_SCALE_FACTOR", "8.0"),)
"""The hint by which devices computing in float16 keep a model from overflowing, as in optimum-intel's export."""


@dataclass(frozen=True, slots=True)
class Submodel:
    """How a torch module becomes a role: what is traced, its inputs in order, its outputs' names."""

    forward: Callable[..., tuple[Any, ...]]
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    runtime_options: RuntimeOptions = ()


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of pictures or latents shared by the submodels; None is any.

    `beside` says that a denoiser may see other pictures beside the latents.
    """

    batch: int | None
    height: int | None
    width: int | None
    beside: bool = False
