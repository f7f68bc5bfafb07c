"""Where a batch writes: a folder of this machine (a Path), or a place behind a URL that fsspec opens (a Remote)."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ovforge.errors import ConfigError, InputError, OvforgeError
from ovforge.store import atomic_write

__all__ = ["Remote", "open_output", "write_file"]


class Remote:
    """A folder behind a URL. Whatever a file system raises becomes an OvforgeError that names the URL, no password."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url, self._shown = url, _shown(url)
        self._made: set[str] = set()
        try:
            self._files, root = url_to_fs(url)
        except ImportError as error:
            raise ConfigError(
                f"no package here opens it: {error}", where=self._shown, hint="Install the package that it names."
            ) from error
        except Exception as error:  # each file system has errors of its own
            kind = f"it cannot be opened: {type(error).__name__}: {error}"
            raise ConfigError(kind, where=self._shown, hint="URLs are those of fsspec, such as s3://BUCKET/FOLDER.") \
                from error  # fmt: skip
        self.root = str(root).rstrip("/")

    @property
    def folder(self) -> Path | None:
        """The folder of this machine that it is, if it is one."""
        from fsspec.implementations.local import LocalFileSystem

        return Path(self.root or "/") if isinstance(self._files, LocalFileSystem) else None

    @property
    def is_shared(self) -> bool:
        """Whether other processes can write there, too."""
        return "memory" not in _protocols(self._files)

    def write(self, name: str, data: bytes, *, new: bool = False) -> None:
        """Write a file. With `new`, InputError is raised if it is there."""
        path = f"{self.root}/{name}"
        self._make(path.rpartition("/")[0])
        try:
            self._files.pipe_file(path, data, **({"mode": "create"} if new else {}))
        except FileExistsError as error:
            raise InputError("another batch is writing there", where=self._shown) from error
        except Exception as error:  # each file system has errors of its own
            raise self._error(f"{name} cannot be written", error) from error

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        try:
            return bytes(self._files.cat_file(f"{self.root}/{name}"))
        except Exception as error:  # each file system has errors of its own
            raise self._error(f"{name} cannot be read", error) from error

    def names(self, folder: str) -> list[str]:
        """Return the names of files in a folder, sorted."""
        try:
            self._files.invalidate_cache()
            found = self._files.ls(f"{self.root}/{folder}", detail=False)
        except FileNotFoundError:
            return []
        except Exception as error:  # each file system has errors of its own
            raise self._error(f"{folder} cannot be read", error) from error
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def remove(self, name: str) -> None:
        """Remove a file."""
        try:
            self._files.rm_file(f"{self.root}/{name}")
        except Exception as error:  # each file system has errors of its own
            raise self._error(f"{name} cannot be removed", error) from error

    def _make(self, folder: str) -> None:
        """Make a folder; object stores have none, and if it is refused, writing may still work."""
        if folder not in self._made:
            self._made.add(folder)
            with contextlib.suppress(Exception):
                self._files.makedirs(folder, exist_ok=True)

    def __str__(self) -> str:
        return self._shown

    def _error(self, what: str, error: Exception) -> OvforgeError:
        return OvforgeError(
            f"{what}: {type(error).__name__}: {error}", where=self._shown,
            hint="Check the URL, and the rights that its package was given.",
        )  # fmt: skip


def open_output(place: str) -> Path | Remote:
    """Return a folder, or what a URL names; file:// URLs are folders. Raises ConfigError if nothing can open it."""
    if "://" not in place:
        return Path(place)
    remote = Remote(place)
    return remote.folder or remote


def write_file(output: Path | Remote, name: str, data: bytes) -> None:
    """Write a result's file there."""
    if isinstance(output, Remote):
        output.write(name, data)
    else:
        atomic_write(output / name, data)


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)


def _shown(url: str) -> str:
    """Return a URL without the password that it may hold."""
    host = urlsplit(url).netloc
    return url.replace(host, host.rpartition("@")[2], 1) if "@" in host else url
