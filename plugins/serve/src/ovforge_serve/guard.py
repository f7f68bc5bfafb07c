"""What every request passes: its id, the page and host that it comes from, its key, the size of its body, the log."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
import traceback
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders

from ovforge.errors import OvforgeError
from ovforge_serve.keys import Keys
from ovforge_serve.log import REQUEST, Log
from ovforge_serve.metrics import Metrics
from ovforge_serve.settings import HttpError, Settings, error_body, status_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["OPEN", "Guard"]

_FILES = "/v1/files/"
OPEN = ("/health", "/ready", "/v2/health/live", "/v2/health/ready", _FILES)
"""Paths that need no key: they say nothing but yes or no, or are secrets themselves."""

_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_BODIES = 16
"""Bodies of the largest size that are held at a time, all requests together."""


class Guard:
    """Middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys, metrics: Metrics, log: Log) -> None:
        self._app, self._settings, self._keys = app, settings, keys
        self._metrics, self._log = metrics, log
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        number = asked if _ID.fullmatch(asked) else os.urandom(8).hex()
        record: dict[str, Any] = {"request": number, "method": scope["method"], "path": _shown(scope["path"])}
        REQUEST.set(record)
        began = time.perf_counter()
        answer = _Answer(send, number, scope["path"])
        try:
            await self._pass(scope, headers, receive, answer, record)
        except OvforgeError as error:
            await answer.refuse(error)
        except Exception as error:
            record["error"] = "".join(traceback.format_exception(error))
            await answer.refuse(OvforgeError("the server failed", where=f"request {number}", hint="Its log says why."))
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(answer.status)).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            self._log("request", **record, status=answer.status, seconds=round(seconds, 4))

    async def _pass(
        self, scope: Scope, headers: Headers, receive: Receive, answer: _Answer, record: dict[str, Any]
    ) -> None:
        self._check_place(headers)
        if scope["path"].startswith(OPEN):
            await self._app(scope, receive, answer)
            return
        key = self._keys.find(headers.get("authorization"))
        if key is not None:
            record["key"] = key
        with self._keys.hold(key):
            body = await self._body(headers, receive)
            self._held += len(body)
            try:
                await self._app(scope, _replayed(body, receive), answer)
            finally:
                self._held -= len(body)

    def _check_place(self, headers: Headers) -> None:
        """Refuse what a browser sends for a page of somebody else, and names that lead here by a stranger's zone."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._settings.hosts and _name(host) not in self._settings.hosts:
            raise HttpError(403, "the Host header names another server", hint="Use localhost, or start with --host.")
        if origin is not None and origin not in self._settings.origins and urlsplit(origin).netloc != host:
            raise HttpError(403, "pages of other origins may not send requests", hint="See --cors.")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """Return the whole body. Raises HttpError if it is too large, or comes too slowly."""
        most, length = self._settings.body, headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length[:20]) > most:
            raise HttpError(413, f"the body has more than {most} bytes")
        if self._held > _BODIES * most:
            raise HttpError(429, "too many bodies are held", retry_after=1)
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise HttpError(499, "the client went away")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise HttpError(413, f"the body has more than {most} bytes")
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise HttpError(408, f"the body took more than {self._settings.body_timeout:g} s") from None


class _Answer:
    """Sends an answer with our headers, and remembers its status."""

    def __init__(self, send: Send, number: str, path: str) -> None:
        self._send, self._number, self._path = send, number, path
        self.status = 499
        self._began = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self._began = message["status"], True
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._number
            headers["x-content-type-options"] = "nosniff"
            headers.setdefault("cache-control", "no-store")
        await self._send(message)

    async def refuse(self, error: OvforgeError) -> None:
        """Answer with an error, unless an answer has begun; the connection ends, since a body may be unread."""
        if self._began:
            return
        body = json.dumps(error_body(error, self._path)).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        headers |= getattr(error, "headers", {})
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": status_of(error), "headers": raw})
        await self._send({"type": "http.response.body", "body": body})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return what gives the body once, and then what comes after it: the end of the connection."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


def _shown(path: str) -> str:
    """Return a path for the log, without the name of a file, which is a secret."""
    return f"{_FILES}*" if path.startswith(_FILES) else path


def _name(host: str) -> str:
    """Return the name in a Host header, without the port."""
    return host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0].lower()
