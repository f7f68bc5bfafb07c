"""A torch module into an ov.Model: without its random initial weights, and with the same bytes each time."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ovforge.conversion import halve_weights, settle_names
from ovforge_diffusers.requirements import need
from ovforge_diffusers.submodels import Submodel

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["convert", "quiet", "without_initial_weights"]

_FREQUENCIES = ("__module.time_proj", "__module.add_time_proj")
_DRAWS = frozenset({"uniform_", "normal_", "trunc_normal_", "exponential_"})


@contextlib.contextmanager
def without_initial_weights() -> Iterator[None]:
    """Leave the parameters of modules made inside uninitialised, in this thread.

    Filling a large UNet with random numbers takes longer than converting it, and makes its memory real. Buffers
    that are computed (CLIP's position ids) stay as they should be.
    """
    overrides = need("torch.overrides", "converting a diffusers folder")

    class SkipDraws(overrides.TorchFunctionMode):  # type: ignore[misc, name-defined]
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            initial = getattr(function, "__module__", None) == "torch.nn.init"
            if initial or getattr(function, "__name__", "") in _DRAWS:
                return args[0] if args else kwargs["tensor"]
            return function(*args, **kwargs)

    with SkipDraws():
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings of tracing, and what diffusers and transformers log about old configs, to themselves."""
    logs = [need(f"{name}.utils.logging", "converting") for name in ("diffusers", "transformers")]
    levels = [log.get_verbosity() for log in logs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for log in logs:
            log.set_verbosity_error()
        try:
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.set_verbosity(level)


def convert(role: str, module: Any, submodel: Submodel, weights: str) -> ov.Model:
    """Trace and convert; the result owns or maps its weights and nothing else of torch.

    The module itself is traced, its forward replaced, so that nodes have the names that its parameters have.
    """
    import openvino as ov

    torch = need("torch", "converting a diffusers folder")
    decoder = need("openvino.frontend.pytorch.ts_decoder", "converting a diffusers folder")
    types = {"f32": torch.float32, "i64": torch.int64}
    example = {i.name: torch.ones(i.example, dtype=types[i.type]) for i in submodel.inputs}
    shapes = [
        (i.name, ov.PartialShape([-1 if side is None else side for side in i.shape]), getattr(ov.Type, i.type))
        for i in submodel.inputs
    ]
    module.forward = submodel.forward
    with torch.no_grad(), quiet():
        traced = decoder.TorchScriptPythonDecoder(module, example_input=example, trace_kwargs={"check_trace": False})
        model = ov.convert_model(traced, example_input=example, input=shapes)
    for port, (name, *_) in zip(model.inputs, shapes, strict=True):
        port.get_tensor().set_names({name})
    for port, name in zip(model.outputs, submodel.outputs, strict=True):
        port.get_tensor().set_names({name})
    for name, value in submodel.runtime_options:
        model.set_rt_info(value, ["runtime_options", name])
    if weights == "f16":
        halve_weights(model, _is_frequency)
    settle_names(role, model)
    return model


def _is_frequency(constant: ov.Node) -> bool:
    """Say whether a constant belongs to the frequencies of the timestep's embedding, which stay in float32.

    They are multiplied by timesteps of up to 1000: rounded to float16 they put phases wrong by up to 0.2 radians, which
    is more than all other rounding together.
    """
    return bool(constant.get_friendly_name().startswith(_FREQUENCIES))
