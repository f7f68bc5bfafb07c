"""Logs: one JSON object a line on standard error, with the request's id. Inputs are in them only if asked for."""

from __future__ import annotations

import json
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

__all__ = ["REQUEST", "Log", "note"]

REQUEST: ContextVar[dict[str, Any] | None] = ContextVar("request", default=None)
"""What the log says of the current request when it ends; handlers add to it."""


class Log:
    """Writes events."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr

    def __call__(self, event: str, **facts: Any) -> None:
        """Write one event. JSON in ASCII: what a client sends cannot make a second line, or steer a terminal."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._stream.write(json.dumps({"time": now, "event": event, **facts}, default=repr) + "\n")
        self._stream.flush()


def note(**facts: Any) -> None:
    """Add to what the log says of the current request."""
    if (record := REQUEST.get()) is not None:
        record.update(facts)
