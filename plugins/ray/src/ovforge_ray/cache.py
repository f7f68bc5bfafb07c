"""A cache that machines share: each keeps its own, and behind it lies one at a URL.

An entry is looked for at the URL when this machine has none, and is sent there when this machine has made it. So the
first process makes what is needed, and no later one, on whatever machine, converts or compiles it again. Compiled
models are found by the processor's instructions, too: machines of another kind make their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ovforge.errors import CacheError, ConfigError, OvforgeError
from ovforge.store import Cache, Entry, digest_file, fingerprint, parse_object

__all__ = ["SharedCache", "shared_cache"]

_MANIFEST = 2**24
"""Bytes that a manifest may have."""


class SharedCache(Cache):
    """A machine's own cache, and the one at a URL. What is read there is checked as what is stored here.

    Whoever can write at the URL can have the machines run what he likes, since compiled models are code: it must be
    yours alone. If it cannot be read or written, the machine makes what it needs, with a warning.
    """

    def __init__(self, own: Cache, url: str) -> None:
        from fsspec.core import url_to_fs

        super().__init__(own.root, own.max_bytes)
        self._own = own
        try:
            self._files, root = url_to_fs(url)
        except Exception as error:  # each file system has errors of its own
            raise ConfigError(
                f"it cannot be opened: {type(error).__name__}: {error}", where="--engine-option cache",
                hint="URLs are those of fsspec, such as s3://BUCKET/FOLDER; its package must be on every machine.",
            ) from error  # fmt: skip
        self._root = str(root).rstrip("/")
        self.fetched = self.made = 0
        """Entries that came from the URL, and those that this process has made."""

    def told(self) -> str:
        """Return what it did so far, in words."""
        return f"{self.fetched} entries fetched from the shared cache, {self.made} made here"

    def get(self, dependencies: Mapping[str, Any]) -> Entry | None:
        """Return this machine's entry, or the one at the URL, which then is this machine's, too; or None."""
        return super().get(dependencies) or self._fetch(dependencies)

    def get_or_make(
        self,
        dependencies: Mapping[str, Any],
        write: Callable[[Path], Any],
        *,
        label: str,
        parents: Iterable[str] = (),
        inputs: Callable[[], Iterable[Path]] = tuple,
    ) -> tuple[Entry, bool]:
        """Return (entry, whether it was there). What is made is sent to the URL."""
        entry, there = super().get_or_make(dependencies, write, label=label, parents=parents, inputs=inputs)
        if not there:
            self.made += 1
            self._send(entry)
        return entry, there

    def _fetch(self, dependencies: Mapping[str, Any]) -> Entry | None:
        key = fingerprint(dependencies)
        try:
            data = self._files.cat_file(f"{self._root}/{key}.json", end=_MANIFEST)
        except FileNotFoundError:
            return None
        except Exception as error:  # each file system has errors of its own
            self._warn("read", error)
            return None
        try:
            told = parse_object(data, f"{key}.json", size=_MANIFEST, error=CacheError)
            facts, read = told["files"], {Path(path): digest for path, digest in told["inputs"].items()}
            if told["fingerprint"] != fingerprint({name: told[name] for name in told if name != "fingerprint"}):
                raise CacheError("its manifest is damaged")
            if not all(path.is_file() and digest_file(path) == digest for path, digest in read.items()):
                return None  # it was made from files that are others here
            entry = self._own.put(
                dependencies, lambda folder: self._load(folder, told["folder"], facts), label=str(told["label"]),
                parents=told["parents"], inputs=lambda: read,
            )  # fmt: skip
        except Exception as error:  # each file system has errors of its own; a stranger's manifest any of ours
            self._warn("read", error)
            return None
        self.fetched += 1
        return entry

    def _load(self, folder: Path, theirs: str, facts: Mapping[str, Any]) -> None:
        """Write the files of an entry into a folder. Raises CacheError if one is not what was stored."""
        for name, fact in facts.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise CacheError(f"{name!r} leads out of the entry")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            self._files.get_file(f"{self._root}/{PurePosixPath(theirs).name}/{name}", str(folder / path))
            if digest_file(folder / path) != fact["sha256"]:
                raise CacheError(f"{name} is not what was stored")

    def _send(self, entry: Entry) -> None:
        """Write an entry to the URL, its manifest last: it is there whole, or not at all."""
        folder = f"{entry.key}-{os.urandom(4).hex()}"  # two machines may send it at once
        told = {
            "folder": folder, "label": entry.label, "files": entry.files, "inputs": entry.inputs,
            "parents": list(entry.parents),
        }  # fmt: skip
        try:
            with contextlib.suppress(Exception):  # object stores have no folders
                for name in entry.files:
                    self._files.makedirs(str(PurePosixPath(self._root, folder, name).parent), exist_ok=True)
            for name in entry.files:
                self._files.put_file(str(entry.checked(name)), f"{self._root}/{folder}/{name}")
            data = json.dumps({**told, "fingerprint": fingerprint(told)}).encode()
            self._files.pipe_file(f"{self._root}/{entry.key}.json", data)
        except Exception as error:  # each file system has errors of its own
            self._warn("written", error)

    def _warn(self, done: str, error: Exception) -> None:
        reason = error.what if isinstance(error, OvforgeError) else f"{type(error).__name__}: {error}"
        warnings.warn(f"the shared cache cannot be {done}: {reason}", stacklevel=4)


def shared_cache(url: str) -> SharedCache:
    """Return the user's cache of this machine, with the shared one behind it."""
    return SharedCache(Cache.default(), url)
