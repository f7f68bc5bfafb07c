"""What command lines name: configs and models (NAME=PATH), and addresses to listen on."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

from ovforge.errors import InputError

__all__ = ["is_loopback", "split_name"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def split_name(place: str) -> tuple[str, str]:
    """Return (name, path) of "NAME=PATH", or of a path alone, which is called as its file. Raises InputError."""
    name, equals, source = place.partition("=")
    if not equals:
        name, source = Path(place).stem, place
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} is not a valid name",
            where=place,
            hint="Write NAME=CONFIG, with a name of letters, digits, - and _.",
        )
    return name, source


def is_loopback(host: str) -> bool:
    """Say whether only this machine reaches an address or name that a server listens on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
