"""What a server allows, and the errors that it answers with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ovforge.errors import Cancelled, ConfigError, InputError, OvforgeError

__all__ = ["CLIENT_GONE", "DEFAULT_BOUNDS", "HttpError", "Settings", "error_body", "status_of"]

DEFAULT_BOUNDS: Mapping[str, int] = {"width": 2048, "height": 2048, "steps": 200, "count": 8, "items": 64, "loop": 8}
"""Largest values of inputs with these names; `items` bounds the length of every list."""

CLIENT_GONE = 499
"""What logs say of a request whose client went away; nobody sees it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Bounds of one server. Sizes are bytes, times seconds."""

    queue: int = 64
    """Requests that may wait."""
    timeout: float = 300.0
    """Time from the first byte of a request's body to its answer, waiting included."""
    body: int = 16 * 2**20
    body_timeout: float = 30.0
    """Time in which a body must have arrived."""
    pixels: int = 2**24
    """Pixels of a picture that is sent."""
    bounds: Mapping[str, int] = field(default_factory=lambda: dict(DEFAULT_BOUNDS))
    memory: int | None = None
    """Resident memory above which pipelines that rest are released, the one that rested longest first."""
    batch: int = 1
    """Waiting requests that run as one call, if their task can do that."""
    threads: int = 4
    """Calls at a time of a task that may be called from several threads."""
    urls: tuple[str, ...] = ()
    """Origins (https://host[:port]) that files may be fetched from."""
    alone: bool = True
    """Whether one process answers all requests, so that it can keep pictures for later ones."""
    origins: tuple[str, ...] = ()
    """Web pages' origins that browsers may send requests from."""
    hosts: tuple[str, ...] = ()
    """Names that the Host header may give; all if there are none."""
    log_inputs: bool = False


class HttpError(OvforgeError):
    """An error with a status of HTTP."""

    def __init__(
        self,
        status: int,
        what: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.status = status
        self.headers = {} if retry_after is None else {"retry-after": str(max(1, math.ceil(retry_after)))}


def status_of(error: OvforgeError) -> int:
    """Return the status of HTTP that tells a client whose fault an error is."""
    if isinstance(error, HttpError):
        return error.status
    if isinstance(error, Cancelled):
        return CLIENT_GONE
    return 400 if isinstance(error, InputError | ConfigError) else 500


_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(error: OvforgeError, path: str = "") -> dict[str, object]:
    """Return an error in the form of OpenAI's API, with our hint beside it; below /v2, in that of its protocol."""
    if path.startswith("/v2"):
        return {"error": str(error)}
    status = status_of(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {
        "error": {"message": error.what, "type": kind, "param": error.where, "code": None, "hint": error.hint},
    }
