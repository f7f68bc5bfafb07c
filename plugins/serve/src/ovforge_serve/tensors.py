"""The Open Inference Protocol (KServe v2) over REST, for single models: metadata, readiness, inference, what is loaded.

Source: the protocol's text at github.com/kserve/open-inference-protocol, and its extension for binary tensors. A source
with one role is the model NAME; of one with several, each is NAME.ROLE.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from ovforge import Stop, __version__
from ovforge.config import checked
from ovforge.errors import InputError
from ovforge.model import OPENVINO_ERRORS, reason_of
from ovforge.store import parse_object
from ovforge_serve.arrays import (
    InputTensor,
    OutputTensor,
    Parameters,
    datatype_of,
    given_tensor,
    port_name,
    told_tensor,
)
from ovforge_serve.log import note
from ovforge_serve.pipelines import Model
from ovforge_serve.server import Server, answers
from ovforge_serve.settings import HttpError

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["InferenceRequest", "add_routes"]

_HEADER = "inference-header-content-length"


class InferenceRequest(BaseModel):
    """What the protocol's inference takes."""

    model_config = ConfigDict(extra="forbid")

    id: str = ""
    inputs: list[InputTensor]
    outputs: list[OutputTensor] | None = None
    parameters: Parameters = Field(default_factory=Parameters)


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
        return {"name": "ovforge", "version": __version__, "extensions": ["binary_tensor_data", "model_repository"]}

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

    @app.post("/v2/repository/index", summary="Models, and whether they are loaded", tags=["Open Inference Protocol"])
    async def index(request: Request) -> list[dict[str, str]]:
        content = await request.body()
        asked = checked(
            _IndexRequest, parse_object(content or b"{}", "body", size=2**31, error=InputError), where="body"
        )
        each = [entry for model in server.pipelines.models.values() for entry in _states(model)]
        return [entry for entry in each if entry["state"] == "READY" or not asked.ready]

    async def load(request: Request, name: str) -> Response:
        model, _ = _find(server, name, "1")
        note(model=model.name)
        await server.queue.run(request, model, lambda requests, stop: None)
        return Response()

    async def unload(request: Request, name: str) -> Response:
        model, _ = _find(server, name, "1")
        note(model=model.name)
        if not await asyncio.to_thread(server.pipelines.release, model):
            raise HttpError(409, f"the model {model.name} is in use", hint="Unload it when its requests have ended.")
        return Response()

    for action, handler, summary in (("load", load, "Load a model now"), ("unload", unload, "Release a model")):
        app.add_api_route(
            f"/v2/repository/models/{{name}}/{action}", handler, methods=["POST"], summary=summary,
            tags=["Open Inference Protocol"], responses=answers(400, 404), operation_id=f"{action}_model",
        )  # fmt: skip

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


class _IndexRequest(BaseModel):
    """What the extension for repositories takes."""

    ready: bool = False


def _states(model: Model) -> list[dict[str, str]]:
    """Return whether a model is loaded; of one that is, each role by its name."""
    requests = model.content
    if requests is None:
        reason = "it is loaded when it is first used"
        return [{"name": model.name, "version": "1", "state": "UNAVAILABLE", "reason": reason}]
    names = [model.name] if len(requests) == 1 else [f"{model.name}.{role}" for role in requests]
    return [{"name": name, "version": "1", "state": "READY", "reason": ""} for name in names]


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
    return {"name": port_name(port), "datatype": datatype_of(port), "shape": shape}


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
    names = [port_name(port) for port in compiled.inputs]
    numbers = {alias: n for n, port in enumerate(compiled.inputs) for alias in (names[n], *port.names)}
    given: dict[int, ov.Tensor] = {}
    for tensor in asked.inputs:
        if tensor.name not in numbers:
            known = ", ".join(names)
            raise InputError(f"there is no input {tensor.name!r}", where="inputs", hint=f"There are: {known}.")
        number = numbers[tensor.name]
        given[number], binary = given_tensor(tensor, compiled.inputs[number], binary)
    if len(binary):
        raise InputError(f"{len(binary)} bytes follow the last tensor", where="body")
    missing = [name for n, name in enumerate(names) if n not in given]
    if missing or len(given) != len(asked.inputs):
        raise InputError(f"each input is given once; missing: {', '.join(missing) or 'none'}", where="inputs")
    wanted = _wanted(asked, compiled.outputs)
    try:
        request.infer(given)
    except OPENVINO_ERRORS as error:
        raise InputError(f"the model does not take these: {reason_of(error)}", where="inputs") from error
    return _answer(name, asked.id, [(port, request.get_tensor(port), raw) for port, raw in wanted])


def _wanted(asked: InferenceRequest, outputs: Sequence[Any]) -> list[tuple[Any, bool]]:
    """Return (output, whether it is given as bytes) in the order that was asked for. Raises InputError."""
    if asked.outputs is None:
        return [(port, asked.parameters.binary_data_output) for port in outputs]
    known = {alias: port for port in outputs for alias in (port_name(port), *port.names)}
    for one in asked.outputs:
        if one.name not in known:
            raise InputError(
                f"there is no output {one.name!r}", where="outputs", hint=f"There are: {', '.join(known)}."
            )
    return [
        (known[one.name], one.parameters.binary_data or asked.parameters.binary_data_output) for one in asked.outputs
    ]


def _answer(name: str, number: str, results: Sequence[tuple[Any, ov.Tensor, bool]]) -> Response:
    parts = [told_tensor(port, tensor, raw) for port, tensor, raw in results]
    told, pieces = [entry for entry, _ in parts], [content for _, content in parts if content is not None]
    head = json.dumps({"model_name": name, "model_version": "1", "id": number, "outputs": told}).encode()
    if not pieces:
        return Response(head, media_type="application/json")
    content = b"".join([head, *pieces])
    return Response(content, media_type="application/octet-stream", headers={_HEADER: str(len(head))})
