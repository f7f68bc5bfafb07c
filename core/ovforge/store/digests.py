"""Digests: of what a result depends on, and of files, remembered between runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovforge.store.files import atomic_write

__all__ = ["Dependencies", "DigestMemo", "checksum", "digest_file", "fingerprint"]

Dependencies = Mapping[str, Any]
"""JSON-able: all that a result depends on, such as stage, input digest, plugin, version, options."""


def fingerprint(dependencies: Dependencies) -> str:
    """Return the sha256 (hex) of the canonical JSON of `dependencies`."""
    text = json.dumps(dependencies, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def checksum(path: Path) -> str:
    """Return the XXH3 checksum (128 bits, hex) of a file's content, to find damage: it is as fast as memory is.

    It does not withstand somebody who forges files; `digest_file` does.
    """
    import xxhash

    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return str(xxhash.xxh3_128(b"").hexdigest())
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as content:
            return str(xxhash.xxh3_128(content).hexdigest())


def digest_file(path: Path, memo: DigestMemo | None = None) -> str:
    """Return the sha256 (hex) of a file's content; `memo` remembers it."""
    before = path.stat()
    if memo is not None and (known := memo.get(path, before)):
        return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if memo is not None:
        memo.put(path, before, digest)
    return digest


def state_of(stat: os.stat_result) -> list[int]:
    """Return what changes with a file's content.

    The time of its last change of any kind (ctime) cannot be set by programs: a file that was replaced by another of
    the same size and time of modification (`cp -p`, an unpacked archive) has another one.
    """
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino]


class DigestMemo:
    """Remembers digests of files, so that gigabytes are not hashed at each start.

    A digest counts as long as the file's `state_of` is the same. A file that changed within the last two seconds is not
    remembered, because it could change again within the resolution of its times; nor is one that changed while it
    was read.
    """

    _RACY = 2.0

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, list[Any]] | None = None

    def get(self, path: Path, stat: os.stat_result) -> str | None:
        """Return the digest if the file is as it was."""
        *state, digest = self._load().get(str(path.resolve()), [None])
        return str(digest) if state == state_of(stat) else None

    def put(self, path: Path, stat: os.stat_result, digest: str) -> None:
        """Remember the digest of a file that was as `stat` says before it was read; not writing is not a failure."""
        if time.time() - max(stat.st_mtime, stat.st_ctime) < self._RACY or state_of(path.stat()) != state_of(stat):
            return
        known = {name: state for name, state in self._load().items() if _is_there(Path(name))}
        known[str(path.resolve())] = [*state_of(stat), digest]
        self._known = known
        with contextlib.suppress(OSError):
            atomic_write(self.path, json.dumps(known).encode())

    def _load(self) -> dict[str, list[Any]]:
        if self._known is None:
            try:
                read = dict(json.loads(self.path.read_bytes()))
            except (OSError, ValueError, TypeError, RecursionError):
                read = {}
            self._known = {name: state for name, state in read.items() if isinstance(state, list) and len(state) == 6}
        return self._known


def _is_there(path: Path) -> bool:
    """Say whether there is such a path and it can be seen (Path.exists raises for one in a forbidden folder)."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True
