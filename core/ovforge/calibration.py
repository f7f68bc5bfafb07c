"""Recorded inputs for quantizers: the task exercises itself, and what its models are given is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ovforge.errors import ModelError

if TYPE_CHECKING:
    import openvino as ov
    from numpy.typing import NDArray

    from ovforge.compiled import CompiledBundle
    from ovforge.stages import Task

__all__ = ["TaskCalibration"]

Record = dict[str, "NDArray[Any]"]


class TaskCalibration:
    """A `stages.Calibration` that runs the pipeline as it is, before quantization.

    `start` builds the compiled models and a task on them; it is called when inputs are first asked for.
    """

    def __init__(self, start: Callable[[], tuple[CompiledBundle, Callable[[CompiledBundle], Task]]]) -> None:
        self._start = start

    def inputs(self, role: str, count: int) -> Sequence[Record]:
        """Return `count` input sets of `role` by input name, in the order in which the task gave them.

        Raises ModelError where the task never runs that role.
        """
        compiled, make_task = self._start()
        records: list[Record] = []
        compiled.wrap(role, lambda model: _Recorded(model, records))
        task = make_task(compiled)
        task.exercise(1)
        if not records:
            raise ModelError(f"the task never runs {role!r}, so there is nothing to calibrate it with", where=role)
        if len(records) < count:
            samples = math.ceil(count / len(records))
            records.clear()
            task.exercise(samples)
        return records[:count]


class _Recorded:
    """A compiled model whose requests tell what they are given; all else is the model's own."""

    def __init__(self, model: ov.CompiledModel, records: list[Record]) -> None:
        self._model = model
        self._records = records

    def create_infer_request(self) -> _RecordedRequest:
        return _RecordedRequest(self._model.create_infer_request(), self._records)

    def __call__(self, inputs: Any = None, *arguments: Any, **options: Any) -> Any:
        return self.create_infer_request().infer(inputs, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _RecordedRequest:
    def __init__(self, request: ov.InferRequest, records: list[Record]) -> None:
        self._request = request
        self._records = records

    def infer(self, inputs: Any = None, *arguments: Any, **options: Any) -> Any:
        results = self._request.infer(inputs, *arguments, **options)
        self._record()
        return results

    def wait(self) -> None:
        self._request.wait()
        self._record()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)

    def _record(self) -> None:
        # After the run: its inputs are set by then, however the caller sets them, and a run leaves them as they are.
        self._records.append(
            {port.any_name: self._request.get_tensor(port).data.copy() for port in self._request.model_inputs}
        )
