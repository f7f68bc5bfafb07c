"""Files from other servers: only from origins that the operator named, and never from a private address.

A name is looked up once, all its addresses must be public, and the connection goes to the address that was checked: a
second answer of the name server cannot lead elsewhere. Redirects pass the same checks.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from urllib.parse import urljoin, urlsplit

from ovforge.errors import InputError

__all__ = ["fetch", "origin_of"]

_REDIRECTS = 3
_CONNECT, _WHOLE = 5.0, 20.0
"""Seconds for connecting and each read, and for one file."""

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetch(url: str, origins: Sequence[str], size: int) -> bytes:
    """Return the content behind a URL, of at most `size` bytes. Raises InputError, which says what is not allowed."""
    deadline = time.monotonic() + _WHOLE
    for _ in range(_REDIRECTS + 1):
        origin = origin_of(url)
        if origin not in origins:
            raise InputError(
                f"files of {origin} are not fetched" if origins else "URLs are not fetched",
                where="url",
                hint="Send the file itself, or ask the operator for --allow-url.",
            )
        try:
            content, location = _get(url, size, deadline)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise InputError(f"{origin} does not give the file: {type(error).__name__}", where="url") from error
        if location is None:
            return content
        url = urljoin(url, location)
    raise InputError(f"it is redirected more than {_REDIRECTS} times", where="url")


def origin_of(url: str, where: str = "url") -> str:
    """Return scheme://host[:port] of a URL. Raises InputError for one that is not valid, or holds a password."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InputError("it is not a valid URL", where=where) from error
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise InputError("it is not a valid http or https URL without a password", where=where)
    default = 443 if parts.scheme == "https" else 80
    name = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{name}" + (f":{port}" if port not in (None, default) else "")


def _get(url: str, size: int, deadline: float) -> tuple[bytes, str | None]:
    """Return (content, None), or (nothing, where a redirect leads)."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or (443 if secure else 80)
    connection = http.client.HTTPConnection(host, port, timeout=_CONNECT)
    # The connection is made here, to the address that was checked; http.client only speaks over it.
    connection.sock = socket.create_connection((public_address(host, port), port), timeout=_CONNECT)
    # Each read has a time of its own, and a server that sends byte by byte would never use it up.
    end = threading.Timer(max(0.0, deadline - time.monotonic()), _shut, (connection,))
    end.start()
    try:
        if secure:
            connection.sock = tls = ssl.create_default_context().wrap_socket(
                connection.sock, server_hostname=host, do_handshake_on_connect=False
            )
            tls.do_handshake()
        path = parts.path or "/"
        connection.request("GET", f"{path}?{parts.query}" if parts.query else path, headers={"accept": "*/*"})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308) and (location := answer.headers.get("location")):
            return b"", location
        if answer.status != 200:
            raise InputError(f"it is answered with status {answer.status}", where="url")
        content = bytearray()
        while part := answer.read1(2**16):
            content += part
            if len(content) > size:
                raise InputError(f"the file is larger than {size} bytes", where="url")
        if time.monotonic() > deadline:
            raise InputError(f"the file took more than {_WHOLE:g} s", where="url")
        if answer.length:
            raise InputError(f"{answer.length} bytes of the file are missing", where="url")
        return bytes(content), None
    finally:
        end.cancel()
        connection.close()


def _shut(connection: http.client.HTTPConnection) -> None:
    with contextlib.suppress(OSError, AttributeError):
        connection.sock.shutdown(socket.SHUT_RDWR)


def public_address(host: str, port: int) -> str:
    """Return an address of a host. Raises InputError if any of its addresses is not a public one."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(_is_public, addresses)):
        raise InputError("its address is not a public one", where="url")
    return addresses[0]


def _is_public(text: str) -> bool:
    """Say whether an address is reached over the internet; those that hold an IPv4 address may lead anywhere."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and (
        address.ipv4_mapped or address.sixtofour or address.teredo or address in _NAT64
    ):
        return False
    return address.is_global and not address.is_multicast
