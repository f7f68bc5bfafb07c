"""A torch module into an ov.Model: without its random initial weights, and with the same bytes each time."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ovforge_convert as conversion
from ovforge.errors import ModelError
from ovforge_diffusers.ports import Submodel
from ovforge_diffusers.requirements import need

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["convert", "quiet", "without_initial_weights"]

_FREQUENCIES = ("rope", "time_proj", "pos_embed", "rotary_emb", "rotary_pos_emb", "rope_embedder", "t_embedder")
_TAKES_FREQUENCY = re.compile(rf"__module\.(?:.+\.)?(?:{'|'.join(_FREQUENCIES)})/")
_ONE = threading.Lock()
"""Held while a module is traced: forms that replace diffusers' own in the meantime, and warnings, are the process's."""

_DRAWS = frozenset({"uniform_", "normal_", "trunc_normal_", "exponential_"})

_CALLS = 200_000
"""Calls of torch while a module is made. Those with the most layers take some ten thousand."""


@contextlib.contextmanager
def without_initial_weights() -> Iterator[None]:
    """Leave the parameters of modules made inside uninitialised, in this thread.

    Filling a large UNet with random numbers takes longer than converting it, and makes its memory real. Buffers
    that are computed (CLIP's position ids) stay as they should be. Raises ValueError if a config asks for more
    layers than any model has, which would go on for hours.
    """
    overrides = need("torch.overrides", "converting a diffusers folder")

    class SkipDraws(overrides.TorchFunctionMode):  # type: ignore[misc, name-defined]
        calls = 0

        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            self.calls += 1
            if self.calls > _CALLS:
                raise ValueError("it asks for more layers than any model has")
            initial = getattr(function, "__module__", None) == "torch.nn.init"
            if initial or getattr(function, "__name__", "") in _DRAWS:
                return args[0] if args else kwargs["tensor"]
            return function(*args, **kwargs)

    with SkipDraws():
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what diffusers logs about old configs to itself, and what conversion.quiet does."""
    need("transformers", "converting")  # conversion.quiet imports it, and cannot say how to install it
    log = need("diffusers.utils.logging", "converting")
    level = log.get_verbosity()
    with conversion.quiet():
        log.set_verbosity_error()
        try:
            yield
        finally:
            log.set_verbosity(level)


def convert(
    role: str,
    module: Any,
    submodel: Submodel,
    weights: conversion.Stored,
    values: Mapping[str, conversion.Weight],
    *,
    disk: bool,
) -> ov.Model:
    """Trace and convert; the result owns or maps its weights and nothing else of torch.

    `values` are put in last, and lie on the `disk` while they are not used if they are large. Raises ModelError for a
    module that cannot be traced.
    """
    try:
        with _ONE, quiet():
            model = conversion.convert_module(
                role,
                module,
                submodel.forward,
                submodel.inputs,
                submodel.outputs,
                weights,
                exact=_is_frequency,
                values=values,
                disk=disk,
            )
    except RuntimeError as error:  # what torch and OpenVINO raise for a module that cannot run, or be traced
        kind, cause = type(module).__name__, error.__cause__ or error.__context__ or error
        raise ModelError(
            f"a {kind} of this config cannot be converted: {str(cause).strip().splitlines()[0]}",
            where=f"{role}/config.json",
            hint="Expected are the kinds of blocks that published models have. If this is one, please report it.",
        ) from error
    for name, value in submodel.runtime_options:
        model.set_rt_info(value, ["runtime_options", name])
    return model


def _is_frequency(constant: ov.Node) -> bool:
    """Say whether a constant belongs to the frequencies of timesteps or places, which stay in float32.

    They are multiplied by timesteps of up to 1000: rounded to float16 they put phases wrong by up to 0.2 radians, which
    is more than all other rounding together. One that a transformation made has a name of its own, and is known by what
    takes it.
    """
    name, size = constant.get_friendly_name(), constant.data.size
    if size > conversion.SMALL:
        return False
    if name.startswith("__module.") and any(f in name for f in _FREQUENCIES):
        return True
    return any(
        _TAKES_FREQUENCY.match(port.get_node().get_friendly_name()) for port in constant.output(0).get_target_inputs()
    )
