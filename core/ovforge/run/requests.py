"""Compiled models whose requests are given values before they run, and are watched when they have run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openvino as ov

    from ovforge.contracts.stages import Inference
    from ovforge.run.adapters import Variables

__all__ = ["ObservedModel"]


class ObservedModel:
    """A compiled model whose requests take the values of `variables`, and report each inference to `observe` once.

    `observe` gets the request, as an Inference whose inputs have the names that `names` gives them in their order. All
    else is the model's own.
    """

    def __init__(
        self,
        model: ov.CompiledModel,
        role: str,
        *,
        variables: Variables | None = None,
        observe: Callable[[Inference], None] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self._model, self._role = model, role
        self._variables, self._observe, self._names = variables, observe, names

    def create_infer_request(self) -> _ObservedRequest:
        """Return a request."""
        values = self._variables.for_request(self._role) if self._variables else None
        return _ObservedRequest(self._model.create_infer_request(), values, self._observe, self._names)

    def __call__(self, inputs: Any = None, *arguments: Any, **options: Any) -> Any:
        return self.create_infer_request().infer(inputs, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _ObservedRequest:
    """An inference request. Waiting for one inference several times reports it once."""

    def __init__(
        self,
        request: ov.InferRequest,
        give_values: Callable[[ov.InferRequest], None] | None,
        observe: Callable[[Inference], None] | None,
        names: Sequence[str],
    ) -> None:
        self._request, self._give_values = request, give_values
        self._observe, self._names = observe, names
        self._running = False

    def infer(self, inputs: Any = None, *arguments: Any, **options: Any) -> Any:
        self._begin()
        results = self._request.infer(inputs, *arguments, **options)
        self._end()
        return results

    def start_async(self, *arguments: Any, **options: Any) -> None:
        self._begin()
        self._request.start_async(*arguments, **options)

    def wait(self) -> None:
        self._request.wait()
        self._end()

    def wait_for(self, timeout: int) -> bool:
        done = bool(self._request.wait_for(timeout))
        if done:
            self._end()
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)

    def _begin(self) -> None:
        if self._give_values is not None:
            self._give_values(self._request)
        self._running = True

    def _end(self) -> None:
        if self._running and self._observe is not None:
            self._observe(self)
        self._running = False

    @property
    def profiling_info(self) -> Sequence[Any]:
        infos: Sequence[Any] = self._request.profiling_info
        return infos

    def inputs(self) -> dict[str, Any]:
        # After the run: its inputs are set by then, however the caller sets them, and a run leaves them as they are.
        ports = self._request.model_inputs
        return {name: self._request.get_tensor(port).data.copy() for name, port in zip(self._names, ports, strict=True)}
