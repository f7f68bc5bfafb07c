"""Opening encrypted files and folders: which files there are, and whether they belong together."""

from __future__ import annotations

import glob
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ovforge.errors import ConfigError, ModelError
from ovforge.model import FileSource, Source, external_data
from ovforge_aes_loader.container import MAGIC, Container, listing_of, with_key
from ovforge_aes_loader.keys import Key, Master, hkdf
from ovforge_aes_loader.openssl import SALTED, SALTED_TEXT, OpensslFile, binary_of, check_graph
from ovforge_aes_loader.source import SUFFIX, Content, DecryptedSource, Sealer, open_file

__all__ = ["open_encrypted", "plain_name"]

_SUFFIXES = (SUFFIX, ".enc", ".aes")
_BESIDE = {".xml": ".bin", ".pdmodel": ".pdiparams"}
"""Files that a single one takes along."""

_ALLOWED_PLAIN = {".md", ""}
"""Suffixes of files for people, which may lie beside containers: README.md, LICENSE."""


def open_encrypted(source: Source, key: Key | None) -> Source:
    """Return the plain source behind an encrypted one. `key` is None if any known key may open it."""
    files = dict(source.files())
    if isinstance(source, FileSource) and source.path.is_file():
        files |= _beside(source.path)
    starts: dict[str, bytes] = {}
    for path in files:
        with open_file(source, path) as file:
            starts[path] = file.read(len(MAGIC))
    opened = (_containers if MAGIC in starts.values() else _openssl_files)(source, files, starts, key)
    if not isinstance(source, FileSource) or not source.path.is_file():
        return opened
    more = _external(source, files, opened)
    return open_encrypted(source.with_beside([glob.escape(path) for path in more]), key) if more else opened


def _external(source: FileSource, files: Mapping[str, int], opened: Source) -> list[str]:
    """Return the encrypted files beside a single ONNX model that hold its weights."""
    graphs = [path for path in opened.files() if path.endswith(".onnx")]
    names = [name for path in graphs for name in external_data(opened.read(path))]
    sealed = (f"{name}{suffix}" for name in names for suffix in _SUFFIXES)
    return [path for path in sealed if path not in files and (source.root / path).is_file()]


def plain_name(path: str) -> str:
    """Return a file's name without what tells that it is encrypted: x.xml.ovenc, x.xml.enc and x_enc.xml are x.xml."""
    file = PurePosixPath(path)
    if file.suffix in _SUFFIXES and file.stem:
        return file.with_suffix("").as_posix()
    return file.with_stem(file.stem.removesuffix("_enc")).as_posix() if file.stem != "_enc" else path


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
            opened[path] = Container(
                partial(open_file, source, path), files[path], f"{source.name}: {path}", with_key(key)
            )
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
        plain = {path: PurePosixPath(header.name) for path, header in headers.items()}
        folder = next(iter(plain.values())).parent  # that of the model in its folder
        return {
            path: (name.relative_to(folder) if name.is_relative_to(folder) else PurePosixPath(name.name)).as_posix()
            for path, name in plain.items()
        }
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
        with open_file(self._source, self._path) as file:
            buffer.cast("B")[:] = file.read(buffer.nbytes)

    def pieces(self) -> Iterator[memoryview]:
        """Yield the whole content in order."""
        with open_file(self._source, self._path) as file:
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
            contents[name] = _openssl_file(partial(open_file, source, path), size, f"{source.name}: {path}", name, key)
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
    if start in (SALTED, SALTED_TEXT):
        return False
    if key is None or key.options.iv is None:
        return True
    wanted = {".xml": b"<", ".json": b"{["}.get(PurePosixPath(name).suffix, b"")
    first = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return bool(first) and first in wanted and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start)


def _openssl_file(open_file: Callable[[], BinaryIO], size: int, where: str, name: str, key: Key | None) -> OpensslFile:
    """Open by a key whose options name the cipher.

    Nothing else may lead here: whoever can write the files could put unauthenticated ones instead of containers.
    """
    if key is None or key.options.cipher is None:
        raise ConfigError(
            "`openssl enc` wrote it, without authentication, and it is opened only where load.key names its cipher",
            where=where,
            hint='If you trust the files: load.key = {env = "NAME", form = "passphrase", cipher = "aes-256-cbc"}, '
            "or --cipher.",
        )
    content = OpensslFile(*binary_of(open_file, size, where), where, key)
    content.check_form(name)
    return content


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
