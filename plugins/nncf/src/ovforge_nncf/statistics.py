"""How NNCF collects statistics, in half the memory.

NNCF adds outputs to a copy of the model, the statistics of weights among them, and compiles the whole. What depends on
no input then is computed while it compiles, all at once: every weight as float32, and its magnitudes, beside
the weights that the model runs with. Here these outputs are computed apart, by the same runtime, a weight at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openvino as ov
    from numpy.typing import NDArray

__all__ = ["TRIED", "constant_results", "statistics_apart"]

TRIED = ("3.4.0",)
"""Releases of nncf whose engine is known."""


@contextlib.contextmanager
def statistics_apart() -> Iterator[None]:
    """Have NNCF run models with what depends on no input computed apart.

    Nothing public says how NNCF compiles a model; its engine's module is given another `openvino` to look at. Releases
    that this was not tried with compile models as they do.
    """
    import nncf

    if nncf.__version__ not in TRIED:
        yield
        return
    from nncf.openvino import engine

    original = engine.ov

    class Namespace:
        """Openvino as that module sees it."""

        Core = staticmethod(lambda *arguments: _Core(original.Core(*arguments)))

        def __getattr__(self, name: str) -> Any:
            return getattr(original, name)

    engine.ov = Namespace()
    try:
        yield
    finally:
        engine.ov = original


def constant_results(model: ov.Model) -> list[ov.Node]:
    """Return the results of `model` that depend on no input and no state."""
    varying = {"Parameter", "ReadValue", "RandomUniform", "Multinomial", "Loop", "TensorIterator", "If"}
    depends: set[str] = set()
    results = []
    for op in model.get_ordered_ops():
        kind, name = op.get_type_name(), op.get_name()
        if kind in varying or any(value.get_node().get_name() in depends for value in op.input_values()):
            depends.add(name)
        elif kind == "Result":
            results.append(op)
    return results


def _fed(result: ov.Node) -> tuple[ov.Model, list[NDArray[Any]]]:
    """Return a model of what `result` takes, with inputs instead of floating-point constants, and their values.

    As constants they would be folded by the runtime's reference code, which is slow.
    """
    import openvino as ov
    from openvino import opset13 as ops

    copy = ov.Model([result], [], result.get_name()).clone()
    inputs, values = [], []
    for op in copy.get_ops():
        if op.get_type_name() == "Constant" and op.get_element_type().get_type_name() in ("f16", "f32"):
            values.append(op.data)
            inputs.append(ops.parameter(op.shape, op.get_element_type()))
            op.output(0).replace(inputs[-1].output(0))
    return ov.Model(copy.get_results(), inputs, result.get_name()), values


class _Core:
    """A core that compiles as NNCF asks."""

    def __init__(self, core: ov.Core) -> None:
        self._core = core

    def compile_model(self, model: ov.Model, *arguments: Any, **options: Any) -> Any:
        import openvino as ov

        apart = constant_results(model)
        if not apart or len(apart) == len(model.outputs):
            return self._core.compile_model(model, *arguments, **options)
        known: dict[Any, NDArray[Any]] = {}
        for result in apart:
            alone, weights = _fed(result)
            compiled = self._core.compile_model(alone, *arguments, **options)
            known |= dict(compiled.create_infer_request().infer(weights, share_inputs=True).items())
        names = {result.get_name() for result in apart}
        rest = [result for result in model.get_results() if result.get_name() not in names]
        running = ov.Model(rest, model.get_sinks(), model.get_parameters(), model.get_friendly_name())
        return _Compiled(self._core.compile_model(running, *arguments, **options), known)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


class _Compiled:
    """A compiled model, and outputs that are known already."""

    def __init__(self, compiled: ov.CompiledModel, known: Mapping[Any, NDArray[Any]]) -> None:
        self._compiled, self._known = compiled, known

    def create_infer_request(self) -> _Request:
        return _Request(self._compiled.create_infer_request(), self._known)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)


class _Request:
    def __init__(self, request: ov.InferRequest, known: Mapping[Any, NDArray[Any]]) -> None:
        self._request, self._known = request, known

    def infer(self, *arguments: Any, **options: Any) -> dict[Any, NDArray[Any]]:
        return {**self._request.infer(*arguments, **options), **self._known}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)
