"""Encrypted files as a Source, and the protection of what is made from them."""

from __future__ import annotations

import hmac
import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from ovforge.errors import ModelError
from ovforge.model import FileSource, Protection, Source
from ovforge_aes_loader.container import (
    Container,
    Header,
    Set,
    new_header,
    private_file,
    write_container,
)
from ovforge_aes_loader.keys import Master

__all__ = ["SUFFIX", "Content", "DecryptedSource", "Sealer", "open_file"]

SUFFIX = ".ovenc"


class Content(Protocol):
    """A file's content, decrypted when it is asked for."""

    @property
    def size(self) -> int:
        """Bytes of the plain file."""
        ...

    def read_into(self, buffer: memoryview) -> None:
        """Fill `buffer` with the file's first bytes, or all."""
        ...

    def pieces(self) -> Iterator[memoryview]:
        """Yield the whole content in order; each piece is gone when the next one comes."""
        ...


class DecryptedSource:
    """Files whose plain content is in memory alone."""

    def __init__(
        self,
        name: str,
        contents: Mapping[str, Content],
        digests: Mapping[str, Callable[[], str]],
        protection: Protection | None,
    ) -> None:
        self.name = name
        self.protection = protection
        self.contents = contents
        self._digests = digests

    def files(self) -> Mapping[str, int]:
        """Return relative path -> size in bytes, of the plain files."""
        return {path: content.size for path, content in self.contents.items()}

    def read(self, path: str, limit: int | None = None) -> bytes:
        """Return a file's first `limit` bytes, or all of it."""
        size = self._content(path).size
        data = bytearray(size if limit is None else min(limit, size))
        self._content(path).read_into(memoryview(data))
        return bytes(data)

    def read_into(self, path: str, buffer: memoryview) -> None:
        """Fill `buffer`, of the file's size, with the file."""
        content = self._content(path)
        if buffer.nbytes != content.size:
            raise ModelError(f"{path} has {content.size} bytes, not {buffer.nbytes}", where=self.name)
        content.read_into(buffer)

    def local(self, path: str) -> Path | None:
        """Return None: there are no plain files."""
        return None

    def digest(self, path: str) -> str:
        """Return a digest of the encrypted form: that of the plain one would tell who has it what this is."""
        self._content(path)
        return self._digests[path]()

    def _content(self, path: str) -> Content:
        if path not in self.contents:
            raise ModelError(f"{path} is missing", where=self.name)
        return self.contents[path]


class Sealer:
    """Writes what is made from an encrypted model as containers of the same key."""

    def __init__(self, master: Master) -> None:
        self._master = master
        self.identity = master.id.hex()

    def write(self, folder: Path, path: str, data: bytes | memoryview, purpose: str) -> None:
        """Write a container below `folder`; its name says what it is for, so that it is taken for nothing else."""
        view = memoryview(data).cast("B")
        header = new_header(_cached_name(purpose, path), view.nbytes, self._master, Set())
        target = folder / f"{path}{SUFFIX}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with private_file(target) as file:
            write_container(file, header, [view], self._master)

    def open(self, folder: Path, purpose: str) -> Source:
        """Return what was written below `folder` for `purpose`. Raises ModelError for a container of anything else."""
        files = FileSource(folder)
        contents = {}
        for path, size in files.files().items():
            if path.endswith(SUFFIX):
                plain = path.removesuffix(SUFFIX)
                container = Container(partial(open_file, files, path), size, f"{folder}: {path}", self._find)
                if container.header.name != _cached_name(purpose, plain):
                    raise ModelError("it was stored for something else", where=container.where)
                contents[plain] = container
        return DecryptedSource(str(folder), contents, {path: c.digest for path, c in contents.items()}, self)

    def _find(self, header: Header, where: str) -> Master:
        if not hmac.compare_digest(header.key_id, self._master.id):
            raise ModelError("it was stored with another key", where=where)
        return self._master


def open_file(source: Source, path: str) -> BinaryIO:
    """Open a file of a source, at its first byte."""
    if isinstance(source, FileSource):
        return (source.root / path).open("rb", buffering=0)
    return io.BytesIO(source.read(path))


def _cached_name(purpose: str, path: str) -> str:
    return f"cache/{purpose}/{path}"
