"""Listening: uvicorn, with our bounds on connections, until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from ovforge.cli import print_line
from ovforge.errors import ConfigError
from ovforge_serve.protocol import bounded_protocol
from ovforge_serve.server import Server, make_app

__all__ = ["Address", "listen"]

_HEAD, _IDLE = 10.0, 5
"""Seconds for a request's head, and between requests of one connection."""

_OTHER_FILES, _MOST_FILES = 256, 65_536
"""Files that a server has open beside its connections, and as many as it may need in a crowd."""


@dataclass(frozen=True)
class Address:
    """Where to listen, and with which certificate."""

    host: str
    port: int
    certificate: Path | None = None
    private_key: Path | None = None


class _Uvicorn(uvicorn.Server):
    """Says where it listens, and lets runs go on for as long as a request may take."""

    async def startup(self, sockets: object = None) -> None:
        if self.config.is_ssl:  # a handshake comes before the protocol, which bounds all that follows
            loop: Any = asyncio.get_running_loop()
            loop.create_server = partial(loop.create_server, ssl_handshake_timeout=_HEAD)
        await super().startup(sockets)  # type: ignore[arg-type]
        for server in getattr(self, "servers", ()):
            for each in server.sockets:
                host, port = each.getsockname()[:2]
                name = f"[{host}]" if ":" in host else host
                print_line(f"{'https' if self.config.is_ssl else 'http'}://{name}:{port}")


def listen(server: Server, address: Address, *, connections: int = 1000, preload: bool = False) -> None:
    """Serve until SIGINT or SIGTERM. Raises ConfigError if the address or the certificate cannot be used."""
    _allow_files(connections + _OTHER_FILES)
    listening = _listening(address)
    if preload:
        server.pipelines.load_all()
    config = uvicorn.Config(
        make_app(server), http=bounded_protocol(connections, _HEAD), ws="none", loop="asyncio",
        ssl_certfile=address.certificate, ssl_keyfile=address.private_key, log_config=None, access_log=False,
        server_header=False, timeout_keep_alive=_IDLE, lifespan="on",
        timeout_graceful_shutdown=int(server.settings.timeout) + 1,
    )  # fmt: skip
    try:
        config.load()
    except OSError as error:
        raise ConfigError(
            f"the certificate and its key cannot be used: {error.strerror or error}",
            where=f"--tls-cert {address.certificate} --tls-key {address.private_key}",
            hint="Both are files in PEM form, and belong together.",
        ) from error
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn hands the signal on when it has ended
        _Uvicorn(config).run(sockets=[listening])


def _listening(address: Address) -> socket.socket:
    """Return a socket at an address. Raises ConfigError that says why there can be none."""
    where = f"{address.host}:{address.port}"
    try:
        family, *_, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.create_server(place[:2], family=family)
        # Connections inherit it. asyncio sets it only for sockets that name their protocol, which these do not;
        # without it an answer's body waits until the client has confirmed its head: 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        hint = "Name a free --port." if error.errno == errno.EADDRINUSE else "Name an address of this machine."
        raise ConfigError(f"cannot listen there: {error.strerror or error}", where=where, hint=hint) from error


def _allow_files(wanted: int) -> None:
    """Raise the limit of open files as far as this user may: a crowd has to be accepted before it can be refused.

    Raises ConfigError if it stays below what the connections need.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, max(wanted, _MOST_FILES))
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raise ConfigError(
            f"this user may have {soft} files open, and {wanted} are needed", where="--connections",
            hint="Name fewer, or raise the limit (ulimit -n).",
        )  # fmt: skip
