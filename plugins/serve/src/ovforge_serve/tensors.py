"""The Open Inference Protocol (KServe v2) over REST, for single models: metadata, readiness, inference.

Source: the protocol's text at github.com/kserve/open-inference-protocol, and its extension for binary tensors. A source
with one role is the model NAME; of one with several, each is NAME.ROLE. Text (BYTES) is not taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ovforge import __version__
from ovforge.config import checked
from ovforge.errors import InputError
from ovforge.model import OPENVINO_ERRORS, reason_of
from ovforge.store import parse_object
from ovforge_serve.log import note
from ovforge_serve.pipelines import Model
from ovforge_serve.server import Server, answers
from ovforge_serve.settings import HttpError
from ovforge_serve.stop import Stop

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["InferenceRequest", "add_routes"]

_TYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "u2", "UINT32": "u4", "UINT64": "u8",
    "INT8": "i1", "INT16": "i2", "INT32": "i4", "INT64": "i8", "FP16": "f2", "FP32": "f4", "FP64": "f8",
}  # fmt: skip
"""Numpy's little-endian types by the protocol's names."""

_NAMES = {
    "boolean": "BOOL", "u8": "UINT8", "u16": "UINT16", "u32": "UINT32", "u64": "UINT64", "i8": "INT8", "i16": "INT16",
    "i32": "INT32", "i64": "INT64", "f16": "FP16", "f32": "FP32", "f64": "FP64", "string": "BYTES",
}  # fmt: skip
"""The protocol's names by OpenVINO's."""

_HEADER = "inference-header-content-length"


class _Parameters(BaseModel):
    binary_data_size: int | None = Field(None, ge=0)
    binary_data: bool = False
    binary_data_output: bool = False


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: _Parameters = Field(default_factory=_Parameters)


class _Output(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    parameters: _Parameters = Field(default_factory=_Parameters)


class InferenceRequest(BaseModel):
    """What the protocol's inference takes."""

    model_config = ConfigDict(extra="forbid")

    id: str = ""
    inputs: list[_Input]
    outputs: list[_Output] | None = None
    parameters: _Parameters = Field(default_factory=_Parameters)


def add_routes(app: FastAPI, server: Server) -> None:
    """Add the protocol's routes; a version may be named, and there is one, "1"."""
    request_schema = InferenceRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    for name, definition in request_schema.pop("$defs", {}).items():
        server.schemas[name] = definition
    server.schemas["InferenceRequest"] = request_schema
    body = {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/InferenceRequest"}}},
        }
    }

    @app.get("/v2", summary="The server", tags=["Open Inference Protocol"])
    async def about() -> dict[str, Any]:
        return {"name": "ovforge", "version": __version__, "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live", summary="Whether the process answers", tags=["Open Inference Protocol"])
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", summary="Whether requests are taken", tags=["Open Inference Protocol"])
    async def ready() -> dict[str, bool]:
        if not server.ready:
            raise HttpError(503, "the server is stopping")
        return {"ready": True}

    async def metadata(request: Request, name: str, version: str = "1") -> dict[str, Any]:
        model, role = _find(server, name, version)

        def describe(requests: Mapping[str, ov.InferRequest], stop: Stop) -> dict[str, Any]:
            compiled = _of_role(requests, name, role).get_compiled_model()
            ports = {"inputs": compiled.inputs, "outputs": compiled.outputs}
            told = {key: [_port(port) for port in each] for key, each in ports.items()}
            return {"name": name, "versions": ["1"], "platform": "openvino", **told}

        return await server.queue.run(request, model, describe)

    async def is_ready(name: str, version: str = "1") -> dict[str, Any]:
        _find(server, name, version)
        return {"name": name, "ready": True}

    async def infer(request: Request, name: str, version: str = "1") -> Response:
        model, role = _find(server, name, version)
        note(model=name)
        content = await request.body()
        asked, binary = _parsed(content, request.headers.get(_HEADER))

        def call(requests: Mapping[str, ov.InferRequest], stop: Stop) -> Response:
            return _infer(_of_role(requests, name, role), name, asked, binary)

        return await server.queue.run(request, model, call)

    for prefix, operation in (("/v2/models/{name}", ""), ("/v2/models/{name}/versions/{version}", "_of_version")):
        tags: list[Any] = ["Open Inference Protocol"]
        common: dict[str, Any] = {"tags": tags, "responses": answers(400, 404)}
        app.add_api_route(
            prefix, metadata, methods=["GET"], summary="Inputs and outputs of a model",
            operation_id=f"metadata{operation}", **common,
        )  # fmt: skip
        app.add_api_route(
            f"{prefix}/ready", is_ready, methods=["GET"], summary="Whether a model can be used",
            operation_id=f"model_ready{operation}", **common,
        )  # fmt: skip
        app.add_api_route(
            f"{prefix}/infer", infer, methods=["POST"], summary="Run a model on tensors",
            operation_id=f"infer{operation}", openapi_extra=body, **common,
        )  # fmt: skip


def _find(server: Server, name: str, version: str) -> tuple[Model, str]:
    first, _, role = name.partition(".")
    model = server.pipelines.models.get(first)
    if model is None or version != "1":
        names = ", ".join(server.pipelines.models) or "none"
        raise HttpError(404, f"there is no model {name!r} of version {version}", hint=f"There are: {names}.")
    return model, role


def _of_role(requests: Mapping[str, ov.InferRequest], name: str, role: str) -> ov.InferRequest:
    if not role and len(requests) == 1:
        return next(iter(requests.values()))
    if role not in requests:
        first = name.partition(".")[0]
        raise HttpError(
            404, f"there is no model {name!r}", hint=f"There are: {', '.join(f'{first}.{r}' for r in requests)}."
        )
    return requests[role]


def _port(port: Any) -> dict[str, Any]:
    shape = [-1 if side.is_dynamic else side.get_length() for side in port.get_partial_shape()]
    return {
        "name": _port_name(port),
        "datatype": _NAMES.get(port.get_element_type().get_type_name(), ""),
        "shape": shape,
    }


def _port_name(port: Any) -> str:
    return min(port.names) if port.names else str(port.get_node().get_friendly_name())


def _parsed(content: bytes, length: str | None) -> tuple[InferenceRequest, memoryview]:
    """Return the request, and the binary tensors behind its JSON. Raises InputError."""
    end = len(content)
    if length is not None:
        if not (length.isascii() and length.isdigit()) or int(length[:12]) > end:
            raise InputError("it is not a length within the body", where=_HEADER)
        end = int(length)
    value = parse_object(content[:end], "body", size=2**31, error=InputError)
    return checked(InferenceRequest, value, where="body"), memoryview(content)[end:]


def _infer(request: ov.InferRequest, name: str, asked: InferenceRequest, binary: memoryview) -> Response:
    compiled = request.get_compiled_model()
    names = [_port_name(port) for port in compiled.inputs]
    numbers = {alias: n for n, port in enumerate(compiled.inputs) for alias in (names[n], *port.names)}
    given: dict[int, NDArray[Any]] = {}
    for tensor in asked.inputs:
        if tensor.name not in numbers:
            known = ", ".join(names)
            raise InputError(f"there is no input {tensor.name!r}", where="inputs", hint=f"There are: {known}.")
        number = numbers[tensor.name]
        given[number], binary = _array(tensor, _port(compiled.inputs[number]), binary)
    if len(binary):
        raise InputError(f"{len(binary)} bytes follow the last tensor", where="body")
    missing = [name for n, name in enumerate(names) if n not in given]
    if missing or len(given) != len(asked.inputs):
        raise InputError(f"each input is given once; missing: {', '.join(missing) or 'none'}", where="inputs")
    wanted = _wanted(asked, compiled.outputs)
    try:
        request.infer({number: np.ascontiguousarray(array) for number, array in given.items()})
    except OPENVINO_ERRORS as error:
        raise InputError(f"the model does not take these: {reason_of(error)}", where="inputs") from error
    return _answer(name, asked.id, [(port, request.get_tensor(port).data, raw) for port, raw in wanted])


def _array(tensor: _Input, port: Mapping[str, Any], binary: memoryview) -> tuple[NDArray[Any], memoryview]:
    """Return a tensor as an array, and the binary data behind it. Raises InputError if it does not fit the input."""
    where = f"inputs: {tensor.name}"
    if tensor.datatype != port["datatype"] or tensor.datatype not in _TYPES:
        raise InputError(f"{tensor.datatype} is not {port['datatype']}, the input's type", where=where)
    if len(tensor.shape) != len(port["shape"]) or any(
        side < 0 or fixed not in (-1, side) for side, fixed in zip(tensor.shape, port["shape"], strict=True)
    ):
        raise InputError(f"the shape {tensor.shape} does not fit {port['shape']}", where=where)
    dtype, size = np.dtype(f"<{_TYPES[tensor.datatype]}".replace("<?", "?")), tensor.parameters.binary_data_size
    elements = math.prod(tensor.shape)
    if size is not None:
        if size != elements * dtype.itemsize or size > len(binary) or tensor.data is not None:
            raise InputError(f"{elements} elements are not {size} bytes, or not all are there", where=where)
        array = np.frombuffer(binary[:size], np.uint8 if dtype.kind == "b" else dtype)
        return (array != 0 if dtype.kind == "b" else array).reshape(tensor.shape), binary[size:]
    return _from_json(tensor.data, dtype, elements, where).reshape(tensor.shape), binary


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


def _wanted(asked: InferenceRequest, outputs: Sequence[Any]) -> list[tuple[Any, bool]]:
    """Return (output, whether it is given as bytes) in the order that was asked for. Raises InputError."""
    if asked.outputs is None:
        return [(port, asked.parameters.binary_data_output) for port in outputs]
    known = {alias: port for port in outputs for alias in (_port_name(port), *port.names)}
    for one in asked.outputs:
        if one.name not in known:
            raise InputError(
                f"there is no output {one.name!r}", where="outputs", hint=f"There are: {', '.join(known)}."
            )
    return [
        (known[one.name], one.parameters.binary_data or asked.parameters.binary_data_output) for one in asked.outputs
    ]


def _answer(name: str, number: str, results: Sequence[tuple[Any, NDArray[Any], bool]]) -> Response:
    told, pieces = [], []
    for port, array, raw in results:
        kind = _NAMES.get(port.get_element_type().get_type_name(), "")
        if kind not in _TYPES:
            raise InputError(f"the output {_port_name(port)} is of a type that is not given", where="outputs")
        entry: dict[str, Any] = {"name": _port_name(port), "datatype": kind, "shape": list(array.shape)}
        # JSON has no number for what is not finite.
        if raw or kind == "FP16" or (array.dtype.kind == "f" and not np.isfinite(array).all()):
            pieces.append(np.ascontiguousarray(array).tobytes())
            entry["parameters"] = {"binary_data_size": len(pieces[-1])}
        else:
            entry["data"] = array.ravel().tolist()
        told.append(entry)
    head = json.dumps({"model_name": name, "model_version": "1", "id": number, "outputs": told}).encode()
    if not pieces:
        return Response(head, media_type="application/json")
    content = b"".join([head, *pieces])
    return Response(content, media_type="application/octet-stream", headers={_HEADER: str(len(head))})
