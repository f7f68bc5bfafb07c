"""Tensors as the Open Inference Protocol writes them, in JSON or in bytes, and as OpenVINO takes and gives them.

BF16 is in bytes alone, as the upper half of float32. Text (BYTES) is in JSON, or in bytes with the length of each
element before it, 32 bits, little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ovforge.errors import InputError

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["InputTensor", "OutputTensor", "Parameters", "datatype_of", "given_tensor", "port_name", "told_tensor"]

_TYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
    "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
    "BF16": "<u2",
}  # fmt: skip
"""Numpy's types by the protocol's names; numpy has no bfloat16, and takes its bits."""

_NAMES = {
    "boolean": "BOOL", "u8": "UINT8", "u16": "UINT16", "u32": "UINT32", "u64": "UINT64", "i8": "INT8", "i16": "INT16",
    "i32": "INT32", "i64": "INT64", "f16": "FP16", "f32": "FP32", "f64": "FP64", "bf16": "BF16", "string": "BYTES",
}  # fmt: skip
"""The protocol's names by OpenVINO's."""

_BYTES_ALONE = ("FP16", "BF16")
_LENGTH = struct.Struct("<I")
_MOST_TEXT = 2**26
"""Bytes of an array of text, in which OpenVINO's binding gives each element the room of the longest."""


class Parameters(BaseModel):
    """What the extension for binary tensors says of a tensor, or of all outputs."""

    binary_data_size: int | None = Field(None, ge=0)
    binary_data: bool = False
    binary_data_output: bool = False


class InputTensor(BaseModel):
    """A tensor that a client gives."""

    model_config = ConfigDict(extra="forbid")

    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: Parameters = Field(default_factory=Parameters)


class OutputTensor(BaseModel):
    """A tensor that a client asks for."""

    model_config = ConfigDict(extra="forbid")

    name: str
    parameters: Parameters = Field(default_factory=Parameters)


def port_name(port: Any) -> str:
    """Return the name that the protocol gives an input or output."""
    return min(port.names) if port.names else str(port.get_node().get_friendly_name())


def datatype_of(port: Any) -> str:
    """Return the protocol's name of a port's type, "" if it has none."""
    return _NAMES.get(port.get_element_type().get_type_name(), "")


def given_tensor(tensor: InputTensor, port: Any, binary: memoryview) -> tuple[ov.Tensor, memoryview]:
    """Return a tensor for an input of a model, and the binary data behind it. Raises InputError if it does not fit."""
    import openvino as ov

    where, datatype = f"inputs: {tensor.name}", datatype_of(port)
    shape = [-1 if side.is_dynamic else side.get_length() for side in port.get_partial_shape()]
    if tensor.datatype != datatype or not datatype:
        raise InputError(f"{tensor.datatype} is not {datatype or 'known'}, the input's type", where=where)
    if len(tensor.shape) != len(shape) or any(
        side < 0 or fixed not in (-1, side) for side, fixed in zip(tensor.shape, shape, strict=True)
    ):
        raise InputError(f"the shape {tensor.shape} does not fit {shape}", where=where)
    size, elements = tensor.parameters.binary_data_size, math.prod(tensor.shape)
    if size is not None and (size > len(binary) or tensor.data is not None):
        raise InputError(f"{elements} elements are not {size} bytes, or not all are there", where=where)
    own, rest = (binary[:size], binary[size:]) if size is not None else (None, binary)
    if datatype == "BYTES":
        texts = _texts(tensor.data, where) if own is None else _texts_of_bytes(own, where)
        return _text_tensor(texts, tensor.shape, where), rest
    dtype = np.dtype(_TYPES[datatype])
    if own is None:
        if datatype in _BYTES_ALONE:
            raise InputError(f"{datatype} is not taken in JSON", where=where, hint="Send it as bytes.")
        array = _from_json(tensor.data, dtype, elements, where)
    else:
        if size != elements * dtype.itemsize:
            raise InputError(f"{elements} elements are not {size} bytes, or not all are there", where=where)
        array = np.frombuffer(own, np.uint8 if dtype.kind == "b" else dtype)
        array = array != 0 if dtype.kind == "b" else array
    array = np.ascontiguousarray(array.reshape(tensor.shape))
    if datatype != "BF16":
        return ov.Tensor(array), rest
    bits = ov.Tensor(ov.Type.bf16, ov.Shape(tensor.shape))
    bits.data[:] = array.view(np.float16)  # as which the binding shows them
    return bits, rest


def told_tensor(port: Any, tensor: ov.Tensor, raw: bool) -> tuple[dict[str, Any], bytes | None]:
    """Return what the answer's JSON says of an output, and its bytes, if it is to be given so, or can only be.

    Raises InputError for a type that the protocol does not know.
    """
    datatype = datatype_of(port)
    entry: dict[str, Any] = {"name": port_name(port), "datatype": datatype, "shape": list(tensor.shape)}
    content: bytes | None = None
    if datatype == "BYTES":
        texts = [bytes(text) for text in tensor.bytes_data.ravel()] if tensor.size else []
        if not raw:
            try:
                return {**entry, "data": [text.decode() for text in texts]}, None
            except UnicodeDecodeError:  # which JSON cannot hold
                pass
        content = b"".join(_LENGTH.pack(len(text)) + text for text in texts)
    elif not datatype:
        raise InputError(f"the output {entry['name']} is of a type that is not given", where="outputs")
    else:
        array = tensor.data
        # JSON has no number for what is not finite.
        if raw or datatype in _BYTES_ALONE or (array.dtype.kind == "f" and not np.isfinite(array).all()):
            content = np.ascontiguousarray(array).tobytes()
        else:
            entry["data"] = array.ravel().tolist()
    if content is not None:
        entry["parameters"] = {"binary_data_size": len(content)}
    return entry, content


def _from_json(data: Sequence[Any] | None, dtype: np.dtype[Any], elements: int, where: str) -> NDArray[Any]:
    """Return numbers of JSON, flat or nested, as an array; only what the type holds exactly, but for rounding."""
    try:
        array = np.asarray(data)
        if array.dtype.kind not in "biuf" and array.size:
            raise ValueError("they are not numbers")
        if array.size != elements:
            raise ValueError(f"there are {array.size} of them, and the shape has {elements}")
        with np.errstate(over="raise", invalid="raise"):
            cast = array.astype(dtype)
        if dtype.kind != "f" and not np.array_equal(cast, array):
            raise ValueError(f"{dtype.name} does not hold them")
    except (ValueError, OverflowError, FloatingPointError, TypeError) as error:
        raise InputError(f"the data are wrong: {error}", where=where) from error
    return cast


def _texts(data: Sequence[Any] | None, where: str) -> list[bytes]:
    """Return texts of JSON, flat or nested."""
    texts: list[bytes] = []
    waiting = list(data or ())[::-1]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part[::-1]
        elif isinstance(part, str):
            texts.append(part.encode())
        else:
            raise InputError("the data are wrong: they are not texts", where=where)
    return texts


def _texts_of_bytes(data: memoryview, where: str) -> list[bytes]:
    texts = []
    while data:
        length = _LENGTH.unpack(data[:4])[0] if len(data) >= 4 else len(data)
        if 4 + length > len(data):
            raise InputError("an element is longer than its bytes", where=where)
        texts.append(bytes(data[4 : 4 + length]))
        data = data[4 + length :]
    return texts


def _text_tensor(texts: Sequence[bytes], shape: Sequence[int], where: str) -> ov.Tensor:
    import openvino as ov

    if len(texts) != math.prod(shape):
        raise InputError(f"there are {len(texts)} texts, and the shape has {math.prod(shape)}", where=where)
    if any(text.endswith(b"\0") for text in texts):
        raise InputError("a text ends with a NUL, which the model would not see", where=where)
    if len(texts) * max(map(len, texts), default=0) > _MOST_TEXT:
        raise InputError(f"{len(texts)} texts as long as the longest have more than {_MOST_TEXT} bytes", where=where)
    if not texts:
        return ov.Tensor(ov.Type.string, ov.Shape(list(shape)))
    tensor = ov.Tensor(list(texts))
    tensor.shape = ov.Shape(list(shape))
    return tensor
