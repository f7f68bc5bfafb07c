"""The container .ovenc: AES-256-GCM in chunks. docs/encryption.md describes it byte for byte.

The STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizar, 2015): a chunk's nonce holds its number and whether it is
the last, so that no chunk can be left out, repeated, moved or put behind the last. The header is associated data of
every chunk, and has a tag of its own: it can be trusted before anything of the size that it states is allocated.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ovforge.errors import ModelError
from ovforge_aes_loader.keys import Key, Master, Scrypt, find_master
from ovforge_aes_loader.parallel import for_each

__all__ = [
    "CHUNK",
    "HEADER_LIMIT",
    "MAGIC",
    "Container",
    "Header",
    "Set",
    "new_header",
    "parse_header",
    "private_file",
    "with_key",
    "write_container",
]

MAGIC = b"\x89OVENC\r\n"
VERSION = 1
TAG = 16
CHUNK = 20
"""Binary logarithm of a chunk's size in bytes."""

_CHUNKS = range(12, 27)
_FIXED = struct.Struct("<8sBBBBBBHQ16s16s32s16s32sH")
_NAME_LIMIT = 1024
HEADER_LIMIT = _FIXED.size + _NAME_LIMIT + TAG
"""Largest header, in bytes."""

_BY_KEY, _BY_PASSPHRASE = 0, 1
_MOST_CHUNKS = 2**32 - 1
"""A nonce has four bytes for a chunk's number."""


@dataclass(frozen=True, slots=True)
class Set:
    """What binds the files of one model together: a random id, and a digest of all their names."""

    id: bytes = bytes(16)
    listing: bytes = bytes(32)

    @classmethod
    def of(cls, names: Iterable[str]) -> Set:
        """Return a new one for files of these names."""
        return cls(os.urandom(16), listing_of(names))


def listing_of(names: Iterable[str]) -> bytes:
    """Return the sha256 of the sorted names, each with a line's end."""
    return hashlib.sha256("".join(f"{name}\n" for name in sorted(names)).encode()).digest()


@dataclass(frozen=True)
class Header:
    """A container's header. `length` is that of the plain file, `chunk` of a whole chunk, both in bytes."""

    scrypt: Scrypt | None
    chunk: int
    length: int
    key_id: bytes
    password_salt: bytes
    salt: bytes
    set: Set
    name: str
    raw: bytes
    tag: bytes = b""

    @property
    def size(self) -> int:
        """Bytes that it takes, with its tag."""
        return len(self.raw) + TAG

    @property
    def chunks(self) -> int:
        """How many chunks there are; an empty file has one."""
        return max(1, -(-self.length // self.chunk))

    @property
    def total(self) -> int:
        """Bytes of the whole container."""
        return self.size + self.length + self.chunks * TAG

    def nonce(self, number: int) -> bytes:
        """Return a chunk's nonce: 7 zeros, its number, whether it is the last."""
        return bytes(7) + number.to_bytes(4, "big") + bytes([number == self.chunks - 1])

    def cipher(self, master: Master) -> AESGCM:
        """Return the cipher of the content; each file has a key of its own, so that nonces can begin at 0."""
        return AESGCM(master.derive(b"ovenc 1 content", self.salt))

    def make_tag(self, master: Master) -> bytes:
        """Return the tag of the header itself."""
        tag: bytes = AESGCM(master.derive(b"ovenc 1 header", self.salt)).encrypt(bytes(12), b"", self.raw)
        return tag


def new_header(name: str, length: int, master: Master, files: Set, chunk: int = CHUNK) -> Header:
    """Return the header of a new container, with a new salt. `chunk` is a binary logarithm."""
    encoded = name.encode()
    if not 0 < len(encoded) <= _NAME_LIMIT:
        raise ModelError(f"the name has {len(encoded)} bytes, more than {_NAME_LIMIT}", where=name[:80])
    scrypt, salt = master.scrypt, os.urandom(32)
    raw = _FIXED.pack(
        MAGIC,
        VERSION,
        _BY_PASSPHRASE if scrypt else _BY_KEY,
        scrypt.log_n if scrypt else 0,
        scrypt.r if scrypt else 0,
        scrypt.p if scrypt else 0,
        chunk,
        _FIXED.size + len(encoded) + TAG,
        length,
        master.id,
        master.salt,
        salt,
        files.id,
        files.listing,
        len(encoded),
    )
    header = Header(scrypt, 2**chunk, length, master.id, master.salt, salt, files, name, raw + encoded)
    return Header(**{**vars(header), "tag": header.make_tag(master)})


def parse_header(data: bytes, size: int, where: str) -> Header:
    """Return the header at the start of `data`, of a container of `size` bytes. Raises ModelError for any other.

    Nothing in it is to be trusted yet but that its lengths fit the file: `Container` checks its tag.
    """

    def refuse(what: str) -> ModelError:
        return ModelError(f"not a whole .ovenc container: {what}", where=where, hint="Fetch or encrypt it again.")

    if len(data) < _FIXED.size or not data.startswith(MAGIC):
        raise refuse("it has no header")
    if data[8] != VERSION:
        raise ModelError(
            f"it is of version {data[8]}, and this reads {VERSION}", where=where, hint="Update ovforge-aes-loader."
        )
    _, _, kdf, log_n, r, p, chunk, end, length, key_id, password_salt, salt, set_id, listing, name_size = (
        _FIXED.unpack_from(data)
    )
    if name_size > _NAME_LIMIT or end != _FIXED.size + name_size + TAG or len(data) < end:
        raise refuse("its header is cut off or damaged")
    if kdf not in (_BY_KEY, _BY_PASSPHRASE) or chunk not in _CHUNKS or length >> chunk >= _MOST_CHUNKS:
        raise refuse("its header is damaged")
    scrypt = Scrypt(log_n, r, p) if kdf == _BY_PASSPHRASE else None
    if scrypt:
        scrypt.check(where)
    elif (log_n, r, p, password_salt) != (0, 0, 0, bytes(16)):
        raise refuse("its header is damaged")
    raw = data[: end - TAG]
    try:
        name = raw[_FIXED.size :].decode()
    except UnicodeDecodeError:
        raise refuse("its name is not text") from None
    if not _is_inside(name):
        raise refuse("its name is not a relative path")
    files = Set(set_id, listing)
    header = Header(scrypt, 2**chunk, length, key_id, password_salt, salt, files, name, raw, data[end - TAG : end])
    if header.total != size:
        raise refuse(f"it has {size} bytes instead of {header.total}")
    return header


def with_key(key: Key | None) -> Callable[[Header, str], Master]:
    """Return what finds a header's master key: of `key`, or of any key that is known where that is None."""
    return lambda header, where: find_master(header.scrypt, header.password_salt, header.key_id, key, where)


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\\" not in name and "\0" not in name


class Container:
    """A container's content, decrypted when it is asked for. `open_file` gives its bytes from their start.

    `find` returns the master key that a header asks for, or raises.
    """

    def __init__(
        self, open_file: Callable[[], BinaryIO], size: int, where: str, find: Callable[[Header, str], Master]
    ) -> None:
        self._open, self.where = open_file, where
        with open_file() as file:
            self.header = parse_header(file.read(HEADER_LIMIT), size, where)
        header = self.header
        self.master = find(header, where)
        if not hmac.compare_digest(header.make_tag(self.master), header.tag):
            raise self._damaged("its header was changed")
        self._cipher = header.cipher(self.master)

    @property
    def size(self) -> int:
        """Bytes of the plain file."""
        return self.header.length

    def digest(self) -> str:
        """Return the sha256 of the header: its salt is drawn anew for each encryption, and no other content fits it."""
        return hashlib.sha256(self.header.raw + self.header.tag).hexdigest()

    def read_into(self, buffer: memoryview) -> None:
        """Fill `buffer` with the file's first bytes, or all, each chunk checked. Raises ModelError for any damage.

        What the buffer holds is of no use where this raises.
        """
        header, wanted = self.header, len(buffer)
        if wanted > header.length:
            raise self._damaged(f"it has {header.length} bytes, not {wanted}")
        buffer = buffer.cast("B")
        needed = header.chunks if wanted == header.length else -(-wanted // header.chunk)

        @contextlib.contextmanager
        def worker() -> Iterator[Callable[[int], None]]:
            sealed = memoryview(bytearray(min(header.chunk, max(header.length, 1)) + TAG))
            with self._open() as file:

                def work(number: int) -> None:
                    chunk = self._sealed(file, number, sealed)
                    target = buffer[number * header.chunk : number * header.chunk + len(chunk) - TAG]
                    if len(target) == len(chunk) - TAG:
                        self._decrypt(number, chunk, target)
                    else:  # the last chunk of a part that is asked for
                        whole = memoryview(bytearray(len(chunk) - TAG))
                        self._decrypt(number, chunk, whole)
                        target[:] = whole[: len(target)]

                yield work

        for_each(needed, worker)

    def pieces(self) -> Iterator[memoryview]:
        """Yield the whole content, chunk by chunk, each checked; the last one proves that there is no more."""
        header = self.header
        size = min(header.chunk, max(header.length, 1))
        sealed, plain = memoryview(bytearray(size + TAG)), memoryview(bytearray(size))
        with self._open() as file:
            for number in range(header.chunks):
                chunk = self._sealed(file, number, sealed)
                self._decrypt(number, chunk, plain[: len(chunk) - TAG])
                yield plain[: len(chunk) - TAG]

    def _sealed(self, file: BinaryIO, number: int, into: memoryview) -> memoryview:
        """Return an encrypted chunk with its tag."""
        header = self.header
        into = into[: min(header.chunk, header.length - number * header.chunk) + TAG]
        file.seek(header.size + number * (header.chunk + TAG))
        done = 0
        while done < len(into) and (count := file.readinto(into[done:])):  # type: ignore[attr-defined]
            done += count
        if done < len(into):
            raise self._damaged("it was cut off while it was read")
        return into

    def _decrypt(self, number: int, chunk: memoryview, target: memoryview) -> None:
        try:
            self._cipher.decrypt_into(self.header.nonce(number), chunk, self.header.raw, target)
        except InvalidTag:
            raise self._damaged(f"chunk {number} of {self.header.chunks} was changed") from None

    def _damaged(self, what: str) -> ModelError:
        return ModelError(
            f"it is damaged or was tampered with: {what}",
            where=self.where,
            hint="Nothing of it is used. Fetch or encrypt it again.",
        )


def write_container(file: BinaryIO, header: Header, pieces: Iterable[bytes | memoryview], master: Master) -> None:
    """Encrypt `pieces`, together of the header's length, into a file. Raises ModelError if they are not."""
    cipher, written = header.cipher(master), 0
    file.write(header.raw + header.tag)
    sealed = memoryview(bytearray(header.chunk + TAG))
    for number, chunk in enumerate(_chunks(pieces, header.chunk)):
        written += len(chunk)
        if written > header.length:
            break
        cipher.encrypt_into(header.nonce(number), chunk, header.raw, sealed[: len(chunk) + TAG])
        file.write(sealed[: len(chunk) + TAG])
    if written != header.length:
        raise ModelError("it changed while it was read", where=header.name)


def private_file(path: Path) -> BinaryIO:
    """Make a file that only its owner can read. Raises FileExistsError if there is one."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600), "wb")


def _chunks(pieces: Iterable[bytes | memoryview], size: int) -> Iterator[bytes | memoryview]:
    """Yield all bytes again, `size` at a time, the last ones fewer; one empty chunk if there are none."""
    pending, empty = bytearray(), True
    for piece in pieces:
        view = memoryview(piece).cast("B")
        while view:
            empty = False
            if not pending and len(view) >= size:
                chunk, view = view[:size], view[size:]
                yield chunk
                continue
            count = size - len(pending)
            pending += view[:count]
            view = view[count:]
            if len(pending) == size:
                yield bytes(pending)
                pending.clear()
    if pending or empty:
        yield bytes(pending)
