"""A weight plus a product of two thin matrices, on all cores: OpenVINO does it five times faster than numpy."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["add_product"]

Array = NDArray[np.float32]

_CACHED = 2**18
"""Numbers that are summed at a time: in float32 they fit in a core's cache."""


def add_product(constant: ov.Node, up: Array, down: Array) -> tuple[ov.Node, float]:
    """Return (a constant that is `constant` + up @ down, of the same type and shape; the largest number in it).

    The constant is f32, f16 or bf16, (rows, ...); up (rows, rank) and down (rank, ...) are float32. The sum is rounded
    once; the largest number is taken before that.
    """
    import openvino as ov
    from openvino import opset13 as ops

    kind = constant.get_element_type()
    shape = list(constant.get_output_shape(0))
    numpy_type = {"f32": np.float32, "f16": np.float16}.get(kind.get_type_name())
    # numpy asks for huge pages, which are mapped in half the time; it knows no bfloat16.
    total = ov.Tensor(kind, shape) if numpy_type is None else np.empty(shape, numpy_type)
    up, down = np.ascontiguousarray(up), np.ascontiguousarray(down.reshape(len(down), -1))
    # Tensors over memory that `constant`, `total`, `up` and `down` own.
    weight = constant.data.reshape(len(up), -1)
    result = (total if isinstance(total, np.ndarray) else total.data).reshape(len(up), -1)
    rows, largest = max(1, _CACHED // weight.shape[1]), 0.0
    lock, request = _adder(kind.get_type_name())
    with lock:
        request.set_input_tensor(2, ov.Tensor(down, shared_memory=True))
        for begin in range(0, len(up), rows):
            part = slice(begin, begin + rows)
            size = list(weight[part].shape)
            request.set_input_tensor(0, ov.Tensor(weight[part], size, kind))
            request.set_input_tensor(1, ov.Tensor(up[part], shared_memory=True))
            request.set_output_tensor(0, ov.Tensor(result[part], size, kind))
            request.infer()
            largest = float(np.maximum(largest, request.get_output_tensor(1).data))  # keeps NaN
    return ops.constant(total, shared_memory=True), largest


@functools.cache
def _adder(kind: str) -> tuple[threading.Lock, Any]:
    """Return a request of the sum, for weights of a type, and the lock that it is used under."""
    import openvino as ov
    from openvino import opset13 as ops

    from ovforge.runtime import core

    weight = ops.parameter([-1, -1], getattr(ov.Type, kind))
    up, down = (ops.parameter([-1, -1], np.float32) for _ in range(2))
    total = ops.add(ops.convert(weight, "f32"), ops.matmul(up, down, False, False))
    largest = ops.reduce_max(ops.absolute(total), ops.constant(np.array([0, 1], np.int64)), False)
    model = ov.Model([ops.convert(total, kind).output(0), largest.output(0)], [weight, up, down], "sum")
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return threading.Lock(), compiled.create_infer_request()
