"""The code that does a stage, and what it works with: results depend on them.

A version tells the code of what came from a package index. What was installed from a folder or a file, or registered by
hand, may change under its version: its files count by their content, so that somebody who changes a plugin does not get
what it made before.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import sys
import uuid
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ovforge.plugins.manager import Offer

__all__ = ["code_of", "installed_requirements"]

# Read by pattern: a start asks for dozens of distributions, and parsing each one's whole metadata takes milliseconds.
_REQUIRES = re.compile(r"^Requires-Dist: *([A-Za-z0-9][A-Za-z0-9._-]*)", re.MULTILINE)
_VERSION = re.compile(r"^Version: *(\S+)", re.MULTILINE)

_LARGE = 2**20
"""Bytes from which a package's file counts by its size and time: the models that some ship."""

_THIS_PROCESS = uuid.uuid4().hex


def code_of(offer: Offer) -> str:
    """Return what names the code of an extension: its plugin's version, and a digest if that may not tell."""
    if offer.distribution:
        return f"{offer.version}{_build(offer.distribution)}"
    return f"{offer.version}+{_digest(_modules_of(offer))}"


def installed_requirements(name: str | None) -> dict[str, str]:
    """Return the distributions that `name` requires, those of its extras included -> version, if they are installed.

    Empty for a plugin without a distribution, such as one that was registered by hand.
    """
    return dict(_requirements(name)) if name else {}


@functools.cache
def _requirements(name: str) -> tuple[tuple[str, str], ...]:
    names = sorted(set(_REQUIRES.findall(_metadata(name))))
    found = ((each, _VERSION.search(_metadata(each))) for each in names)
    return tuple((each, f"{version[1]}{_build(each)}") for each, version in found if version)


@functools.cache
def _metadata(name: str) -> str:
    """Return the head of a distribution's metadata; "" if it is not installed."""
    found = _found(name)
    return (_text(found, "METADATA") if found else "").partition("\n\n")[0]


@functools.cache
def _found(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except (PackageNotFoundError, ValueError):
        return None


def _text(found: Distribution, file: str) -> str:
    try:
        return found.read_text(file) or ""
    except (OSError, ValueError):
        return ""


@functools.cache
def _build(name: str) -> str:
    """Return what tells builds of one version apart: "" for what came from an index, where a version is one build.

    pip notes where it found anything else. Of an editable distribution the files count as they are now, of another one
    the list of its files with their digests, which the installer wrote.
    """
    found = _found(name)
    origin = _text(found, "direct_url.json") if found else ""
    if not found or not origin:
        return ""
    try:
        editable = json.loads(origin)["dir_info"]["editable"] is True
    except (ValueError, KeyError, TypeError, RecursionError):
        editable = False
    if not editable:
        files = sorted(line for line in _text(found, "RECORD").splitlines() if ".dist-info/" not in line)
        return f"+{hashlib.sha256(chr(10).join(files).encode()).hexdigest()[:16]}"
    packages = {name.replace("-", "_").lower(), *(entry.module.partition(".")[0] for entry in found.entry_points)}
    return f"+{_digest(sorted(packages))}"


def _modules_of(offer: Offer) -> list[str]:
    """Return the modules that an extension's description names or holds things of."""
    modules = set()
    for _, reference in offer.extension.references():
        if isinstance(reference, str):
            modules.add(reference.partition(":")[0])
        elif reference is not None:
            inner = getattr(reference, "func", reference)  # of a partial
            modules.add(getattr(inner, "__module__", None) or type(inner).__module__)
    return sorted(modules)


def _digest(modules: Iterable[str]) -> str:
    """Return the digest of the packages that modules belong to, or of the files of those that belong to none.

    Code that stands in no file, such as that of a notebook, is known in this process alone.
    """
    total = hashlib.sha256()
    for place in dict.fromkeys(_place(module) for module in modules):
        if place is None:
            total.update(_THIS_PROCESS.encode())
            continue
        for file in _files(place):
            total.update(f"{file.relative_to(place.parent)}\0".encode())
            total.update(_content(file))
    return total.hexdigest()[:16]


def _content(file: Path) -> bytes:
    """Return what tells a file's content."""
    try:
        status = file.stat()
        if status.st_size >= _LARGE:
            return f"{status.st_size} {status.st_mtime_ns}".encode()
        return hashlib.sha256(file.read_bytes()).digest()
    except OSError:  # it went meanwhile, as an editor's own files do, or may not be read
        return _THIS_PROCESS.encode()


def _place(module: str) -> Path | None:
    """Return the folder of a module's outermost package, or the module's own file; None if it has none."""
    names = module.split(".")
    for name in (names[0], module):
        loaded = sys.modules.get(name)
        file = getattr(loaded, "__file__", None) if loaded else _origin(name)
        if file and os.path.isfile(file):  # noqa: PTH113 - what stands there may be any text
            path = Path(file)
            return path.parent if path.stem == "__init__" else path
    return None


def _origin(name: str) -> str | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None
    return spec.origin if spec else None


def _files(place: Path) -> Iterator[Path]:
    """Yield a module's file, or the files of a package but for compiled ones, always in the same order."""
    if place.is_file():
        yield place
        return
    for folder, folders, names in os.walk(place):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        yield from (Path(folder, name) for name in sorted(names))
