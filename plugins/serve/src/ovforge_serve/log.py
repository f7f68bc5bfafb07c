"""Logs: one JSON object a line on standard error, with the request's id. Inputs are in them only if asked for."""

from __future__ import annotations

import json
import logging
import sys
import traceback
import warnings
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

    def take_others(self) -> None:
        """Write what libraries log and warn of as events, too: `warning` and what is worse, and nobody else's lines."""

        def warn(message: Warning | str, *_: object, **__: object) -> None:
            self("warning", message=str(message))

        warnings.showwarning = warn
        logging.getLogger().addHandler(_Records(self))


class _Records(logging.Handler):
    """Writes records of `logging` as events."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        error = {"error": "".join(traceback.format_exception(record.exc_info[1]))} if record.exc_info else {}
        self._log(record.levelname.lower(), source=record.name, message=record.getMessage(), **error)


def note(**facts: Any) -> None:
    """Add to what the log says of the current request."""
    if (record := REQUEST.get()) is not None:
        record.update(facts)
