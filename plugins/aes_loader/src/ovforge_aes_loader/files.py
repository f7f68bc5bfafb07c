"""Encrypting, decrypting and rekeying on disk. Files appear whole, for their owner alone, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ovforge.errors import ModelError
from ovforge.model import FileSource, Source, external_data
from ovforge.store import atomic_file, atomic_folder, check_apart
from ovforge_aes_loader.container import (
    CHUNK,
    HEADER_LIMIT,
    MAGIC,
    Container,
    Set,
    listing_of,
    new_header,
    parse_header,
    private_file,
    write_container,
)
from ovforge_aes_loader.keys import Key, Scrypt
from ovforge_aes_loader.opening import open_encrypted, plain_name
from ovforge_aes_loader.openssl import SALTED, SALTED_TEXT, write_openssl
from ovforge_aes_loader.source import SUFFIX, DecryptedSource

__all__ = ["decrypt", "describe", "encrypt", "encrypt_openssl", "rekey"]

_PIECE = 2**20

Write = Callable[[BinaryIO, str, int, Iterable[memoryview]], None]
"""Writes a file, given what to write to, its plain name, its size and its content."""


def encrypt(
    source: Path, output: Path, key: Key, *, replace: bool = False, chunk: int = CHUNK, scrypt: Scrypt | None = None
) -> list[Path]:
    """Write a file or folder as containers that belong together; return what was written.

    One file becomes one; a folder, an .xml with its .bin or an .onnx with its weights becomes a folder. `chunk` is the
    binary logarithm of the size of chunks, `scrypt` the cost of deriving a key from a passphrase.
    """
    plain = _plain(source)
    check_apart(output, source)
    for path in plain.files():
        with (plain.root / path).open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                raise ModelError(f"{path} is encrypted already", where=str(source), hint="See: ovforge rekey")
    master, files = key.new_master(scrypt), Set.of(plain.files())

    def write(file: BinaryIO, name: str, size: int, pieces: Iterable[memoryview]) -> None:
        write_container(file, new_header(name, size, master, files, chunk), pieces, master)

    return _write_all(_plain_files(plain), output, write, lambda name: name + SUFFIX, replace)


def encrypt_openssl(source: Path, output: Path, key: Key, *, replace: bool = False) -> list[Path]:
    """Write a file or folder as `openssl enc` does, by the cipher and the iv of the key's options, or by a passphrase.

    Raises ModelError if several files would be encrypted in counter mode with one iv: each would give away others.
    """
    plain = _plain(source)
    check_apart(output, source)
    cipher = key.options.cipher or ""
    if cipher.endswith("ctr") and not key.is_passphrase and len(plain.files()) > 1:
        raise ModelError(
            f"{len(plain.files())} files under one iv in counter mode can be read without the key",
            where=str(source),
            hint="Use a passphrase (each file has a salt of its own), CBC, or the .ovenc format.",
        )

    def write(file: BinaryIO, name: str, size: int, pieces: Iterable[memoryview]) -> None:
        write_openssl(file, pieces, key)

    return _write_all(_plain_files(plain), output, write, lambda name: name + ".enc", replace)


def decrypt(source: Path, output: Path, key: Key | None, *, replace: bool = False) -> list[Path]:
    """Write an encrypted file or folder as plain files, which only their owner can read; return them.

    Nothing appears under its name before all of it is found to be authentic.
    """
    opened = open_encrypted(FileSource(source), key)
    check_apart(output, source)
    if opened.protection is None:
        raise ModelError("it is not encrypted, or options of its cipher and iv are missing", where=str(source))
    assert isinstance(opened, DecryptedSource)

    def write(file: BinaryIO, name: str, size: int, pieces: Iterable[memoryview]) -> None:
        for piece in pieces:
            file.write(piece)

    files = {name: (content.size, content.pieces) for name, content in opened.contents.items()}
    return _write_all(files, output, write, lambda name: name, replace)


def rekey(source: Path, old: Key | None, new: Key, *, scrypt: Scrypt | None = None) -> list[Path]:
    """Encrypt containers under another key, in their place; a failure leaves the old ones. Return what was written."""
    opened = open_encrypted(FileSource(source), old)
    every = opened.contents if isinstance(opened, DecryptedSource) else {}
    contents = {name: content for name, content in every.items() if isinstance(content, Container)}
    if not contents or len(contents) < len(every):
        raise ModelError(
            "only .ovenc containers are rekeyed", where=str(source), hint="Use ovforge decrypt, then ovforge encrypt."
        )
    names = {container.header.name for container in contents.values()}
    if any(container.header.set.listing != listing_of(names) for container in contents.values()):
        raise ModelError("it is a part of a model, which has one key", where=str(source), hint="Name the whole folder.")
    if source.is_file() and len(contents) > 1:
        raise ModelError("its weights lie beside it", where=str(source), hint="Name the folder.")
    master, files = new.new_master(scrypt), Set.of(names)

    def write(file: BinaryIO, name: str, size: int, pieces: Iterable[memoryview]) -> None:
        header = contents[name].header
        chunk = header.chunk.bit_length() - 1
        write_container(file, new_header(header.name, size, master, files, chunk), pieces, master)

    sources = {name: (content.size, content.pieces) for name, content in contents.items()}
    own = [name + SUFFIX for name in sources]
    return _write_all(sources, source, write, lambda name: name + SUFFIX, replace=True, own=own)


def describe(source: Source) -> list[dict[str, Any]]:
    """Return what each file says of itself, without a key and therefore unchecked: form, name, size, key id, cost."""
    descriptions = []
    for path, size in source.files().items():
        start = source.read(path, HEADER_LIMIT)
        if start.startswith(MAGIC):
            header = parse_header(start, size, f"{source.name}: {path}")
            descriptions.append(
                {
                    "file": path,
                    "form": f".ovenc version {start[len(MAGIC)]}, AES-256-GCM",
                    "name": header.name,
                    "bytes": header.length,
                    "chunk": header.chunk,
                    "key": header.key_id.hex(),
                    "model": header.set.id.hex(),
                    "scrypt": None
                    if header.scrypt is None
                    else {"n": 2**header.scrypt.log_n, "r": header.scrypt.r, "p": header.scrypt.p},
                }
            )
        elif start.startswith((SALTED, SALTED_TEXT)):
            descriptions.append(
                {"file": path, "form": "openssl enc, with a salt; not authenticated", "name": plain_name(path)}
            )
        else:
            descriptions.append(
                {"file": path, "form": "plain, or openssl enc without a salt", "name": plain_name(path)}
            )
    return descriptions


def _plain(path: Path) -> FileSource:
    """Return a file, with what it keeps in others, or a folder. Raises ModelError if weights are missing."""
    source = FileSource(path)
    if path.suffix == ".onnx" and path.is_file():
        lost = [*external_data(path, outside=True), *(set(external_data(path)) - set(source.files()))]
        if lost:
            raise ModelError(
                f"its weights are not in its folder: {lost[0]}", where=str(path), hint="Put them beside the model."
            )
    return source


def _plain_files(source: FileSource) -> dict[str, tuple[int, Callable[[], Iterator[memoryview]]]]:
    return {path: (size, partial(_pieces, source.root / path)) for path, size in source.files().items()}


def _pieces(path: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def _write_all(
    files: Mapping[str, tuple[int, Callable[[], Iterable[memoryview]]]],
    output: Path,
    write: Write,
    named: Callable[[str], str],
    replace: bool,
    own: Iterable[str] | None = None,
) -> list[Path]:
    """Write one file as `output`, or several below it, instead of `own` or of what ovforge wrote there."""
    if not files:
        raise ModelError("there are no files", where=str(output))
    if output.exists() and not replace:
        raise ModelError("is there already", where=str(output), hint="Name another, or add --force.")
    if len(files) == 1 and not output.is_dir():
        [(name, (size, content))] = files.items()
        with atomic_file(output, private=True) as file:
            write(file, name, size, content())
        return [output]
    if output.is_file():
        raise ModelError("is a file, and a folder is to be written", where=str(output))
    with atomic_folder(output, replace=replace, own=own) as folder:
        for name, (size, content) in files.items():
            target = folder / named(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with private_file(target) as file:
                write(file, name, size, content())
    return [output / named(name) for name in files]
