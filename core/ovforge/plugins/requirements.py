"""The versions of what a plugin works with: results depend on them, too."""

from __future__ import annotations

import functools
import re
from importlib.metadata import PackageNotFoundError, distribution

__all__ = ["installed_requirements"]

# Read by pattern: a start asks for dozens of distributions, and parsing each one's whole metadata takes milliseconds.
_REQUIRES = re.compile(r"^Requires-Dist: *([A-Za-z0-9][A-Za-z0-9._-]*)", re.MULTILINE)
_VERSION = re.compile(r"^Version: *(\S+)", re.MULTILINE)


@functools.cache
def _metadata(name: str) -> str:
    """Return the head of a distribution's metadata; "" if it is not installed."""
    try:
        return (distribution(name).read_text("METADATA") or "").partition("\n\n")[0]
    except (PackageNotFoundError, OSError, ValueError):
        return ""


@functools.cache
def _requirements(name: str) -> tuple[tuple[str, str], ...]:
    names = sorted(set(_REQUIRES.findall(_metadata(name))))
    return tuple((each, version[1]) for each in names if (version := _VERSION.search(_metadata(each))))


def installed_requirements(name: str | None) -> dict[str, str]:
    """Return the distributions that `name` requires, those of its extras included -> version, if they are installed.

    Empty for a plugin without a distribution, such as one that was registered by hand.
    """
    return dict(_requirements(name)) if name else {}
