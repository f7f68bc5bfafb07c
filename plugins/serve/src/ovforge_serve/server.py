"""The application: what all routes share, and the routes that tell how the server is."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ovforge import __version__
from ovforge.errors import InputError, OvforgeError
from ovforge.store import Cache, parse_object, scratch_folder
from ovforge_serve.files import Sent
from ovforge_serve.guard import Guard
from ovforge_serve.keys import Keys
from ovforge_serve.log import Log, note
from ovforge_serve.metrics import Metrics
from ovforge_serve.pipelines import Pipelines, Served
from ovforge_serve.queue import Queue
from ovforge_serve.remote import fetch
from ovforge_serve.settings import HttpError, Settings, error_body, status_of

__all__ = [
    "Pictures",
    "Server",
    "Serving",
    "answers",
    "at_once_or_aside",
    "inputs_of",
    "json_or_form",
    "make_app",
    "pipelines_for",
    "received",
]

T = TypeVar("T")

_SHARED_MEMORY, _ROOM = Path("/dev/shm"), 2**30
"""A file system in memory, and the bytes that must be free there."""

_SHORT = 2**14
"""Bytes of a body that are read without a thread."""

_FIELDS = 256
"""The most parts that a form may have."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """All that a server is made of, by value: it can be sent to another process, which makes the same server of it.

    `places` are configs and models as the command takes them, absolute ones if the other process is elsewhere.
    """

    places: Sequence[str]
    overrides: Sequence[str] = ()
    settings: Settings = field(default_factory=Settings)
    keys: Keys = field(default_factory=Keys)
    cache: str | None = "default"
    device: str = "CPU"
    """OpenVINO's name of the device that single models run on."""

    def server(self, log: Log | None = None, cache: Cache | None = None) -> Server:
        """Read the configs, and return a server that has loaded nothing. Raises what planning them raises.

        `cache` is used instead of the one that `self.cache` names, for machines that have one of their own.
        """
        log = log or Log()
        pipelines = Pipelines(
            self.places, overrides=self.overrides, memory=self.settings.memory, threads=self.settings.threads,
            cache=cache or self.cache, device=self.device, say=log,
        )  # fmt: skip
        return Server(pipelines, self.settings, self.keys, log)

    def app(self, cache: Cache | None = None) -> Any:
        """Return the ASGI application of a server of its own, when all is loaded."""
        server = self.server(cache=cache)
        server.pipelines.load_all()
        return make_app(server)


class Server:
    """What the routes share."""

    def __init__(self, pipelines: Pipelines, settings: Settings, keys: Keys, log: Log) -> None:
        self.pipelines, self.settings, self.keys, self.log = pipelines, settings, keys, log
        self.metrics = Metrics(pipelines)
        self.queue = Queue(pipelines, settings, self.metrics)
        self.pictures = Pictures(16 * settings.body)
        self.schemas: dict[str, Any] = {}
        """Definitions of the OpenAPI document, beside those that FastAPI makes."""
        self.ready = False
        self._scratch: Path | None = None

    @property
    def scratch(self) -> Path:
        """The folder of temporary files, which is there while the server runs."""
        assert self._scratch is not None
        return self._scratch

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """Hold the folder of temporary files; what a killed server left is removed before."""
        with scratch_folder(_scratch_parent()) as self._scratch:
            self.ready = True
            self.log("ready", pipelines=list(self.pipelines), models=list(self.pipelines.models))
            yield
            self.ready = False
            self.queue.stop_all()
            await asyncio.to_thread(self.pipelines.close)
            self.log("stopped")

    def sent(self) -> Sent:
        """Return what takes one request's files."""
        return Sent(self.scratch, self.settings, lambda url: fetch(url, self.settings.urls, self.settings.body))


class Pictures:
    """Pictures that answers name by URL: in memory, for an hour or until `size` bytes of newer ones came."""

    seconds = 3600.0

    def __init__(self, size: int) -> None:
        self._size, self._held = size, 0
        self._pictures: OrderedDict[str, tuple[float, str, bytes]] = OrderedDict()

    def add(self, kind: str, data: bytes) -> str:
        """Keep a picture of a media type; return its name, which nobody can guess."""
        name = secrets.token_urlsafe(24)
        self._pictures[name] = time.monotonic(), kind, data
        self._held += len(data)
        while self._held > self._size or time.monotonic() - next(iter(self._pictures.values()))[0] > self.seconds:
            self._held -= len(self._pictures.popitem(last=False)[1][2])
        return name

    def get(self, name: str) -> tuple[str, bytes] | None:
        """Return (media type, content), None if it is not there or too old."""
        since, kind, data = self._pictures.get(name, (0.0, "", b""))
        return (kind, data) if data and time.monotonic() - since <= self.seconds else None


def _scratch_parent() -> Path | None:
    """Return where temporary files lie: in memory if there is room, since files on a disk wait for it."""
    if "TMPDIR" in os.environ or not os.access(_SHARED_MEMORY, os.W_OK):
        return None
    return _SHARED_MEMORY if shutil.disk_usage(_SHARED_MEMORY).free > _ROOM else None


def make_app(server: Server) -> Any:
    """Return the ASGI application."""
    from ovforge_serve import detections, images, runs, status, tensors, videos

    app = FastAPI(
        title="ovforge", version=__version__, lifespan=server.running, docs_url=None, redoc_url=None,
        exception_handlers={OvforgeError: _explain, HTTPException: _explain_http},
    )  # fmt: skip
    app.state.server = server
    for part in (status, runs, images, detections, videos, tensors):
        part.add_routes(app, server)
    app.openapi = lambda: _openapi(app, server)  # type: ignore[method-assign]
    guarded: Any = Guard(app, server.settings, server.keys, server.metrics, server.log)
    if server.settings.origins:
        guarded = CORSMiddleware(
            guarded, allow_origins=server.settings.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return guarded


async def received(request: Request) -> dict[str, Any]:
    """Return what a request sends, as JSON or as a form: fields by name, files as bytes, repeated ones as lists.

    The form's field `inputs` may hold a JSON object with more. Raises InputError for what is neither.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        body = await request.body()
        return await at_once_or_aside(request, lambda: parse_object(body, "body", size=2**31, error=InputError))
    if kind != "multipart/form-data":
        raise HttpError(415, f"{kind or 'nothing'} is not taken", hint="Send application/json or multipart/form-data.")
    found: dict[str, Any] = {}
    boundary = parse_options_header(request.headers["content-type"])[1].get(b"boundary", b"")
    if b"--%s--" % boundary not in await request.body():  # what was cut off would be left out in silence
        raise InputError("the form does not end with its boundary", where="body")
    async with request.form(max_files=_FIELDS, max_fields=_FIELDS, max_part_size=2**31) as form:
        for name, part in form.multi_items():
            value = await part.read() if isinstance(part, UploadFile) else part
            if name in found:
                found[name] = [*(found[name] if isinstance(found[name], list) else [found[name]]), value]
            else:
                found[name] = value
    if isinstance(more := found.pop("inputs", None), str | bytes):
        found = {**parse_object(more, "inputs", size=2**31, error=InputError), **found}
    return found


async def inputs_of(request: Request, sent: Sent, served: Served, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a pipeline is called with, as `Sent.inputs` does."""
    return await at_once_or_aside(request, lambda: sent.inputs(served, value))


async def at_once_or_aside(request: Request, work: Callable[[], T]) -> T:
    """Return what `work` makes of a request's body: in a thread if it may take long enough for others to notice.

    A thread for what is done in a fraction of a millisecond would make a request wait twice for a busy processor. A
    short body may still name a URL.
    """
    server: Server = request.app.state.server
    short = int(request.headers.get("content-length", _SHORT + 1)) <= _SHORT
    return work() if short and not server.settings.urls else await asyncio.to_thread(work)


def json_or_form(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return what OpenAPI says of a body that `received` reads."""
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema}, "multipart/form-data": {"schema": schema}},
        }
    }


def answers(*refusals: int) -> dict[int | str, dict[str, Any]]:
    """Return what OpenAPI says of a route's refusals."""
    words = {
        400: "an input is wrong",
        404: "there is no such thing",
        413: "the body is too large",
        415: "the body is of another kind",
        429: "too many requests wait",
        504: "it took too long",
    }
    return {number: {"description": words[number]} for number in refusals}


def pipelines_for(served: Sequence[Served], name: object, what: str) -> Served:
    """Return the pipeline of a name, by default the first of those that can do `what`. Raises HttpError."""
    names = ", ".join(one.name for one in served) or "none"
    if name is None and served:
        return served[0]
    for one in served:
        if one.name == name:
            return one
    raise HttpError(404, f"there is no pipeline {name!r} that can {what}", where="model", hint=f"There are: {names}.")


def _openapi(app: FastAPI, server: Server) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = document.setdefault("components", {})
        components.setdefault("schemas", {}).update(server.schemas)
        if server.keys:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
        app.openapi_schema = document
    return app.openapi_schema


async def _explain(request: Request, error: Exception) -> Response:
    assert isinstance(error, OvforgeError)
    status = status_of(error)
    if status == 500:
        note(error=str(error))
        error = OvforgeError("the run failed", hint="The server's log says why.")
    return JSONResponse(error_body(error, request.url.path), status, headers=getattr(error, "headers", None))


async def _explain_http(request: Request, error: Exception) -> Response:
    """Answer what the framework refuses (no such route, a wrong method, a damaged form) in the same form."""
    assert isinstance(error, HTTPException)
    return JSONResponse(
        error_body(HttpError(error.status_code, str(error.detail)), request.url.path),
        error.status_code,
        headers=error.headers,
    )
