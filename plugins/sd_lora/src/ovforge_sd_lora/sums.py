"""A weight plus a product of two thin matrices, on all cores: OpenVINO does it five times faster than numpy."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["Room", "add_product"]

Array = NDArray[np.float32]

_CACHED = 2**20
"""Numbers that are summed at a time: in float32 they fit in the caches of two cores."""

_BLOCK = 2**25


class Room:
    """Memory for new weights, in blocks of 32 MiB: the system maps those in large pages, in a third of the time.

    A block lives for as long as any array in it.
    """

    def __init__(self) -> None:
        self._block = np.empty(0, np.uint8)

    def take(self, size: int) -> NDArray[np.uint8]:
        """Return `size` bytes, not set to anything."""
        if size > len(self._block):
            block = np.empty(max(size, _BLOCK), np.uint8)
            if size >= _BLOCK:
                return block
            self._block = block
        taken = self._block[:size]
        self._block = self._block[-(-size // 64) * 64 :]
        return taken


def add_product(constant: ov.Node, up: Array, down: Array, room: Room) -> tuple[ov.Node, float]:
    """Return (a constant that is `constant` + up @ down, of the same type and shape; the largest number in it).

    The constant is f32, f16 or bf16, (rows, ...); up (rows, rank) and down (rank, ...) are float32. The sum is rounded
    once; the largest number is taken before that.
    """
    import openvino as ov
    from openvino import opset13 as ops

    kind = constant.get_element_type()
    shape = list(constant.get_output_shape(0))
    up, down = np.ascontiguousarray(up), np.ascontiguousarray(down.reshape(len(down), -1))
    # Tensors over memory that `constant`, `total`, `up` and `down` own.
    weight = constant.data.reshape(len(up), -1)
    # numpy knows no bfloat16, and a tensor of a type of its own does not own an array's memory.
    total = ov.Tensor(kind, shape) if kind == ov.Type.bf16 else room.take(constant.get_byte_size()).view(weight.dtype)
    result = (total.data if isinstance(total, ov.Tensor) else total).reshape(weight.shape)
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
    whole = total if isinstance(total, ov.Tensor) else total.reshape(shape)
    return ops.constant(whole, shared_memory=True), largest


@functools.cache
def _adder(kind: str) -> tuple[threading.Lock, Any]:
    """Return a request of the sum, for weights of a type, and the lock that it is used under."""
    import openvino as ov
    from openvino import opset13 as ops

    from ovforge.model import core

    weight = ops.parameter([-1, -1], getattr(ov.Type, kind))
    up, down = (ops.parameter([-1, -1], np.float32) for _ in range(2))
    total = ops.add(ops.convert(weight, "f32"), ops.matmul(up, down, False, False))
    largest = ops.reduce_max(ops.absolute(total), ops.constant(np.array([0, 1], np.int64)), False)
    model = ov.Model([ops.convert(total, kind).output(0), largest.output(0)], [weight, up, down], "sum")
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return threading.Lock(), compiled.create_infer_request()
