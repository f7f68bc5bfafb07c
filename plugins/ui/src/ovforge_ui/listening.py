"""Listening: uvicorn, until a signal ends it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import uvicorn

from ovforge.errors import ConfigError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

__all__ = ["listen"]

_CLOSING = 3
"""Seconds that open connections get when the server ends."""


class _Server(uvicorn.Server):
    """Says where it listens."""

    say: Callable[[str], None]

    async def startup(self, sockets: object = None) -> None:
        await super().startup(sockets)  # type: ignore[arg-type]
        for server in getattr(self, "servers", ()):
            for socket in server.sockets:
                host, port = socket.getsockname()[:2]
                self.say(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")


def listen(app: ASGIApp, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; `say` is told the address. Raises ConfigError if it cannot be listened on."""
    logging.getLogger("uvicorn").addHandler(logging.NullHandler())
    config = uvicorn.Config(
        app, host=host, port=port, ws="none", log_config=None, access_log=False, server_header=False, lifespan="on",
        timeout_graceful_shutdown=_CLOSING,
    )  # fmt: skip
    server = _Server(config)
    server.say = say
    try:
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn hands the signal on when it has ended
            server.run()
    except (OSError, SystemExit) as error:  # uvicorn has logged why
        raise ConfigError("cannot listen there", where=f"{host}:{port}", hint="Name a free --port.") from error
