"""Where bytes come from. Loaders and adapters never open paths themselves: they ask a Source.

Plain files are the default. A plugin that keeps models elsewhere, or encrypted, gives another Source, and everything
downstream works from it: models, adapters, tokenizers.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ovforge.errors import ModelError

if TYPE_CHECKING:
    from ovforge.cache import DigestMemo

__all__ = ["PACKAGE", "FileSource", "Source", "open_source"]

PACKAGE = "package:"
"""Prefix of sources that lie inside an installed Python package."""


class Source(Protocol):
    """A file or a folder of files, by relative POSIX path."""

    name: str
    """What the user called it; for messages and provenance."""

    def files(self) -> Mapping[str, int]:
        """Return every file: relative path -> size in bytes."""
        ...

    def read(self, path: str, limit: int | None = None) -> bytes:
        """Return a file's first `limit` bytes, or all of it. Raises ModelError where it is not there."""
        ...

    def local(self, path: str) -> Path | None:
        """Return the plain file, for readers that map it into memory; None where there is none."""
        ...

    def digest(self, path: str) -> str:
        """Return the sha256 (hex) of a file's content."""
        ...


class FileSource:
    """Plain files on disk: one file, or a folder without its hidden files.

    A single `x.xml` takes its `x.bin` along. `memo` remembers digests between runs.
    """

    def __init__(self, path: Path, name: str | None = None, memo: DigestMemo | None = None) -> None:
        if not path.exists():
            raise ModelError("no such file or folder", where=name or str(path))
        self.name = name or str(path)
        self.path = path
        self._memo = memo

    @property
    def root(self) -> Path:
        """The folder that paths are relative to."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def _files(self) -> dict[str, int]:
        if self.path.is_file():
            beside = [self.path]
            if self.path.suffix == ".xml" and (weights := self.path.with_suffix(".bin")).is_file():
                beside.append(weights)
            return {file.name: file.stat().st_size for file in beside}
        paths = ((file, file.relative_to(self.path)) for file in sorted(self.path.rglob("*")))
        return {
            relative.as_posix(): file.stat().st_size
            for file, relative in paths
            if not any(part.startswith(".") for part in relative.parts) and file.is_file()
        }

    def files(self) -> Mapping[str, int]:
        """Return relative path -> size in bytes."""
        return self._files

    def read(self, path: str, limit: int | None = None) -> bytes:
        """Return a file's bytes."""
        if path not in self._files:
            raise ModelError(f"{path} is missing", where=self.name)
        with (self.root / path).open("rb") as file:
            return file.read(-1 if limit is None else limit)

    def local(self, path: str) -> Path | None:
        """Return the file itself."""
        return self.root / path

    def digest(self, path: str) -> str:
        """Return the sha256 of a file."""
        from ovforge.cache import digest_file

        return digest_file(self.root / path, self._memo)


def open_source(text: str, base: Path, memo: DigestMemo | None = None) -> Source:
    """Open what a config's `source` says: a path (relative to `base`), or "package:NAME/PATH" in a Python package."""
    if text.startswith(PACKAGE):
        package, _, inside = text.removeprefix(PACKAGE).partition("/")
        found = importlib.util.find_spec(package) if package.isidentifier() else None
        if found is None or not found.submodule_search_locations:
            raise ModelError(
                f"the Python package {package!r} is not installed", where=text, hint="Install the plugin that ships it."
            )
        return FileSource(Path(found.submodule_search_locations[0]) / inside, text, memo)
    return FileSource(base / Path(text).expanduser(), text, memo)


def source_digest(source: Source) -> str:
    """Return one sha256 over the names and contents of all files."""
    total = hashlib.sha256()
    for path in sorted(source.files()):
        total.update(f"{path}\0{source.digest(path)}\n".encode())
    return total.hexdigest()
