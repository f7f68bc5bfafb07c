"""Encrypted files as a Source, and the protection of what is made from them."""

from __future__ import annotations

import hmac
import io
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from ovforge.errors import ConfigError, ModelError
from ovforge.sources import FileSource, Protection, Source
from ovforge_aes_loader.container import (
    MAGIC,
    Container,
    Header,
    Set,
    listing_of,
    new_header,
    private_file,
    with_key,
    write_container,
)
from ovforge_aes_loader.keys import Key, Master, hkdf, known_keys
from ovforge_aes_loader.openssl import SALTED, OpensslFile, check_graph

__all__ = ["SUFFIX", "DecryptedSource", "Sealer", "open_encrypted", "plain_name"]

SUFFIX = ".ovenc"
_SUFFIXES = (SUFFIX, ".enc", ".aes")
_BESIDE = {".xml": ".bin", ".pdmodel": ".pdiparams"}
"""Files that a single one takes along."""

_ALLOWED_PLAIN = {".md", ""}
"""Suffixes of files for people, which may lie beside containers: README.md, LICENSE."""


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
                container = Container(partial(_open, files, path), size, f"{folder}: {path}", self._find)
                if container.header.name != _cached_name(purpose, plain):
                    raise ModelError("it was stored for something else", where=container.where)
                contents[plain] = container
        return DecryptedSource(str(folder), contents, {path: c.digest for path, c in contents.items()}, self)

    def _find(self, header: Header, where: str) -> Master:
        if not hmac.compare_digest(header.key_id, self._master.id):
            raise ModelError("it was stored with another key", where=where)
        return self._master


def open_encrypted(source: Source, key: Key | None) -> Source:
    """Return the plain source behind an encrypted one. `key` is None where any known key may open it."""
    files = dict(source.files())
    if isinstance(source, FileSource) and source.path.is_file():
        files |= _beside(source.path)
    starts: dict[str, bytes] = {}
    for path in files:
        with _open(source, path) as file:
            starts[path] = file.read(len(MAGIC))
    if MAGIC in starts.values():
        return _containers(source, files, starts, key)
    return _openssl_files(source, files, starts, key)


def plain_name(path: str) -> str:
    """Return a file's name without what tells that it is encrypted: x.xml.ovenc, x.xml.enc and x_enc.xml are x.xml."""
    file = PurePosixPath(path)
    if file.suffix in _SUFFIXES and file.stem:
        return file.with_suffix("").as_posix()
    return file.with_stem(file.stem.removesuffix("_enc")).as_posix() if file.stem != "_enc" else path


def _open(source: Source, path: str) -> BinaryIO:
    if isinstance(source, FileSource):
        return (source.root / path).open("rb", buffering=0)
    return io.BytesIO(source.read(path))


def _beside(file: Path) -> dict[str, int]:
    """Return the weights of a single model file, where they lie beside it under the same name."""
    plain = PurePosixPath(plain_name(file.name))
    if plain.suffix not in _BESIDE:
        return {}
    head, _, ending = file.name.rpartition(plain.suffix)
    weights = file.with_name(f"{head}{_BESIDE[plain.suffix]}{ending}")
    return {weights.name: weights.stat().st_size} if weights.is_file() else {}


# -- containers -----------------------------------------------------------------------------------------------------


def _containers(
    source: Source, files: Mapping[str, int], starts: Mapping[str, bytes], key: Key | None
) -> DecryptedSource:
    """Open containers that belong together; a plain file among them could be anybody's, and is refused."""
    opened: dict[str, Container] = {}
    for path, start in starts.items():
        if start == MAGIC:
            opened[path] = Container(partial(_open, source, path), files[path], f"{source.name}: {path}", with_key(key))
        elif PurePosixPath(path).suffix not in _ALLOWED_PLAIN:
            raise ModelError(
                f"{path} is not encrypted, and the files beside it are",
                where=source.name,
                hint="Somebody may have put it there: encrypt the whole folder again, or take the file away.",
            )
    single = isinstance(source, FileSource) and source.path.is_file()
    names = _names(source, opened, single)
    contents = {names[path]: container for path, container in opened.items()}
    first = next(iter(opened.values()))
    digests = {path: container.digest for path, container in contents.items()}
    return DecryptedSource(source.name, contents, digests, Sealer(first.master))


def _names(source: Source, opened: Mapping[str, Container], single: bool) -> dict[str, str]:
    """Return path -> plain name, as the headers state it; refuse files that were exchanged, left out or added."""

    def refuse(what: str) -> ModelError:
        return ModelError(what, where=source.name, hint="Fetch or encrypt the whole model again.")

    headers = {path: container.header for path, container in opened.items()}
    if len({header.set.id for header in headers.values()}) > 1:
        raise refuse("its files are of several models, or of one that was encrypted several times")
    if single:
        return {path: PurePosixPath(header.name).name for path, header in headers.items()}
    names = {path: path.removesuffix(SUFFIX) for path in headers}
    above = set()
    for path, header in headers.items():
        if header.name != names[path] and not header.name.endswith(f"/{names[path]}"):
            raise refuse(f"{path} is {header.name} under another name")
        above.add(header.name.removesuffix(names[path]))
    if len(above) > 1:
        raise refuse("its files are in other folders than they were encrypted in")
    if above == {""} and {header.set.listing for header in headers.values()} != {listing_of(names.values())}:
        raise refuse("a file is missing, or there is one too many")
    return names


# -- what openssl wrote -----------------------------------------------------------------------------------------------


class _Plain:
    """A file beside encrypted ones that is not."""

    def __init__(self, source: Source, path: str, size: int) -> None:
        self._source, self._path, self.size = source, path, size

    def read_into(self, buffer: memoryview) -> None:
        """Fill `buffer` with the file's first bytes, or all."""
        with _open(self._source, self._path) as file:
            buffer.cast("B")[:] = file.read(buffer.nbytes)

    def pieces(self) -> Iterator[memoryview]:
        """Yield the whole content in order."""
        with _open(self._source, self._path) as file:
            while data := file.read(2**20):
                yield memoryview(data)


def _openssl_files(source: Source, files: Mapping[str, int], starts: Mapping[str, bytes], key: Key | None) -> Source:
    contents: dict[str, Content] = {}
    paths: dict[str, str] = {}
    for path, size in files.items():
        name = plain_name(path)
        if name in contents:
            raise ModelError(
                f"{paths[name]} and {path} are both {name}", where=source.name, hint="Keep plain and encrypted apart."
            )
        paths[name] = path
        if _is_plain(name, starts[path], key):
            contents[name] = _Plain(source, path, size)
        else:
            contents[name] = _openssl_file(partial(_open, source, path), size, f"{source.name}: {path}", name, key)
    _check_graphs(source, contents)
    encrypted = [content for content in contents.values() if isinstance(content, OpensslFile)]
    if not encrypted:
        return source
    warnings.warn(
        f"{source.name}: what `openssl enc` wrote carries no authentication: whoever can write the files can change "
        "the model. `ovforge encrypt` makes containers that cannot be changed.",
        stacklevel=2,
    )
    first = encrypted[0].parameters
    # Results are stored in containers, whose keys have 32 bytes.
    master = Master.of(hkdf(first.key, b"ovenc cache of openssl", b""))
    return DecryptedSource(
        source.name, contents, {name: partial(source.digest, paths[name]) for name in paths}, Sealer(master)
    )


def _is_plain(name: str, start: bytes, key: Key | None) -> bool:
    """Say whether a file is not encrypted: where options name an iv, all are but .xml and .json that begin as such."""
    if start == SALTED:
        return False
    if key is None or key.options.iv is None:
        return True
    wanted = {".xml": b"<", ".json": b"{["}.get(PurePosixPath(name).suffix, b"")
    first = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return bool(first) and first in wanted and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start)


def _openssl_file(open_file: Callable[[], BinaryIO], size: int, where: str, name: str, key: Key | None) -> OpensslFile:
    """Open with a key; without one, with the known passphrase that fits."""
    candidates = [key] if key else [known for known in known_keys() if known.is_passphrase]
    failed: ModelError | None = None
    for candidate in candidates:
        try:
            content = OpensslFile(open_file, size, where, candidate)
            content.check_form(name)
        except ModelError as error:
            failed = error
        else:
            return content
    raise failed or ConfigError(
        "it is encrypted with a passphrase by `openssl enc`, and none is given",
        where=where,
        hint='Set load.key = {env = "NAME", form = "passphrase"}, or the environment variable OVFORGE_PASSPHRASE.',
    )


def _check_graphs(source: Source, contents: Mapping[str, Content]) -> None:
    """Check every encrypted IR against the size of its weights."""
    for name, content in contents.items():
        weights = contents.get(PurePosixPath(name).with_suffix(".bin").as_posix())
        if not name.endswith(".xml") or not isinstance(weights or content, OpensslFile):
            continue
        xml = bytearray(content.size)
        content.read_into(memoryview(xml))
        padded = isinstance(weights, OpensslFile) and weights.parameters.is_cbc
        size = weights.size if weights else sys.maxsize
        check_graph(bytes(xml), size, padded, f"{source.name}: {name}")


def _cached_name(purpose: str, path: str) -> str:
    return f"cache/{purpose}/{path}"
