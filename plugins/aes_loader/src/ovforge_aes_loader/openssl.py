"""What `openssl enc` reads and writes: AES in CBC or CTR, by key and iv, or by passphrase with a salt and PBKDF2.

None of it is authenticated: a changed file decrypts to something else. What can be found out is: the padding, the form
of .xml and .json files, and whether a .bin has the size that its graph uses.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from ovforge.errors import ConfigError, ModelError
from ovforge_aes_loader.keys import Key
from ovforge_aes_loader.parallel import for_each

__all__ = [
    "SALTED",
    "SALTED_TEXT",
    "OpensslFile",
    "Parameters",
    "binary_of",
    "check_graph",
    "parameters_of",
    "write_openssl",
]

SALTED = b"Salted__"
SALTED_TEXT = b"U2FsdGVk"
"""How a salted file begins in base64, which `openssl enc -a` writes."""
BLOCK = 16
_PIECE = 2**20
_DEFAULT = "aes-256-cbc"
_WRONG = "The key or the iv is another one than it was encrypted with, or the file is damaged: this form cannot tell."


@dataclass(frozen=True, slots=True, repr=False)
class Parameters:
    """All that a file is encrypted with; `begin` is where the ciphertext begins."""

    cipher: str
    key: bytes
    iv: bytes
    begin: int = 0

    @property
    def is_cbc(self) -> bool:
        """Whether blocks are chained, and padded to whole blocks."""
        return self.cipher.endswith("cbc")

    def at(self, offset: int, before: bytes) -> Cipher[Any]:
        """Return the cipher from `offset` (whole blocks) on; `before` is the block of ciphertext before it."""
        if self.is_cbc:
            return Cipher(algorithms.AES(self.key), modes.CBC(before if offset else self.iv))
        counter = (int.from_bytes(self.iv, "big") + offset // BLOCK) % 2**128
        return Cipher(algorithms.AES(self.key), modes.CTR(counter.to_bytes(BLOCK, "big")))


def key_size(cipher: str) -> int:
    """Return the bytes of a cipher's key."""
    return int(cipher.split("-")[1]) // 8


def parameters_of(key: Key, salt: bytes | None) -> Parameters:
    """Return the parameters that a key and its options give: for a salted file, or for one without a header."""
    options = key.options
    cipher = options.cipher or _DEFAULT
    size = key_size(cipher)
    if salt is not None:
        # `openssl enc` derives key and iv together.
        if options.kdf == "legacy":
            derived = _legacy(options.digest, key.passphrase(), salt, size + BLOCK)
        else:
            derived = _pbkdf2(options.digest, key.passphrase(), salt, options.iterations, size + BLOCK)
        return Parameters(cipher, derived[:size], derived[size:], begin=len(SALTED) + len(salt))
    if options.iv is None:
        raise ConfigError(
            f"{cipher} without a salt needs the iv", where="load.key.iv", hint="It is what `openssl enc -iv` was given."
        )
    return Parameters(cipher, key.raw(size), bytes.fromhex(options.iv))


@functools.lru_cache(maxsize=256)
def _pbkdf2(digest: str, passphrase: bytes, salt: bytes, iterations: int, size: int) -> bytes:
    return hashlib.pbkdf2_hmac(digest, passphrase, salt, iterations, size)


def _legacy(digest: str, passphrase: bytes, salt: bytes, size: int) -> bytes:
    """Return what `openssl enc` derives without -pbkdf2: OpenSSL's EVP_BytesToKey with a count of one."""
    derived = block = b""
    while len(derived) < size:
        block = hashlib.new(digest, block + passphrase + salt, usedforsecurity=False).digest()
        derived += block
    return derived[:size]


class OpensslFile:
    """A file's content, decrypted when it is asked for. Raises ModelError if this key cannot have made it."""

    def __init__(self, open_file: Callable[[], BinaryIO], size: int, where: str, key: Key) -> None:
        self._open, self.where = open_file, where
        with open_file() as file:
            start = file.read(BLOCK)
            salted = start.startswith(SALTED)
            if salted and len(start) < BLOCK:
                raise self._wrong("it ends inside its salt")
            self._key, self._salt = key, start[len(SALTED) :] if salted else None
            self.parameters = parameters_of(key, self._salt)
            self._sealed = size - self.parameters.begin
            if self.parameters.is_cbc:
                count = self._padding(file, self.parameters)
                if count is None:
                    raise self._without_pbkdf2(file) or self._wrong("its padding is wrong")
                self.size = self._sealed - count
            else:
                self.size = self._sealed

    def _padding(self, file: BinaryIO, parameters: Parameters) -> int | None:
        """Return how many bytes the last block is filled up with (PKCS 7); None if it is not filled up so."""
        sealed, begin = self._sealed, parameters.begin
        if sealed <= 0 or sealed % BLOCK:
            raise self._wrong(f"its {sealed} bytes are not whole blocks of {BLOCK}")
        offset = sealed - BLOCK
        before = self._bytes(file, begin + offset - BLOCK, BLOCK) if offset else b""
        last = self._bytes(file, begin + offset, BLOCK)
        decryptor = parameters.at(offset, before).decryptor()
        block = decryptor.update(last) + decryptor.finalize()
        count = block[-1]
        return count if 1 <= count <= BLOCK and block[-count:] == bytes([count]) * count else None

    def _without_pbkdf2(self, file: BinaryIO) -> ModelError | None:
        """Return the error of a file that this passphrase opens as one made without -pbkdf2; None for any other."""
        if self._salt is None or self._key.options.kdf == "legacy":
            return None
        for digest in (self._key.options.digest, "sha256", "md5"):
            size = key_size(self.parameters.cipher)
            derived = _legacy(digest, self._key.passphrase(), self._salt, size + BLOCK)
            legacy = Parameters(self.parameters.cipher, derived[:size], derived[size:], self.parameters.begin)
            if self._padding(file, legacy) is not None:
                more = "" if digest == "sha256" else f', digest = "{digest}"'
                return ModelError(
                    "it was made without -pbkdf2, whose keys are quick to guess", where=self.where,
                    hint=f'Open it with load.key = {{..., kdf = "legacy"{more}}} or --kdf legacy, and encrypt it anew.',
                )  # fmt: skip
        return None

    def read_into(self, buffer: memoryview) -> None:
        """Fill `buffer` with the file's first bytes, or all."""
        buffer = buffer.cast("B")
        if len(buffer) > self.size:
            raise self._wrong(f"it has {self.size} bytes, not {len(buffer)}")

        @contextlib.contextmanager
        def worker() -> Iterator[Callable[[int], None]]:
            scratch = memoryview(bytearray(_PIECE + BLOCK))
            with self._open() as file:

                def work(number: int) -> None:
                    offset = number * _PIECE
                    target = buffer[offset : offset + _PIECE]
                    sealed, cipher = self._piece(file, offset)
                    # Right into the target, but for the end: ciphers want room for one more block.
                    whole = len(buffer) - offset >= len(sealed) + BLOCK
                    into = buffer[offset : offset + len(sealed) + BLOCK - 1] if whole else scratch
                    cipher.decryptor().update_into(sealed, into)
                    if not whole:
                        target[:] = scratch[: len(target)]

                yield work

        for_each(-(-len(buffer) // _PIECE), worker)

    def pieces(self) -> Iterator[memoryview]:
        """Yield the whole content, piece by piece."""
        scratch = memoryview(bytearray(_PIECE + BLOCK))
        with self._open() as file:
            for offset in range(0, self.size, _PIECE):
                sealed, cipher = self._piece(file, offset)
                cipher.decryptor().update_into(sealed, scratch)
                yield scratch[: min(_PIECE, self.size - offset)]

    def _piece(self, file: BinaryIO, offset: int) -> tuple[bytes, Cipher[Any]]:
        begin = self.parameters.begin + offset
        before = self._bytes(file, begin - BLOCK, BLOCK) if offset and self.parameters.is_cbc else b""
        sealed = self._bytes(file, begin, min(_PIECE, self._sealed - offset))
        return sealed, self.parameters.at(offset, before)

    def _bytes(self, file: BinaryIO, position: int, count: int) -> bytes:
        file.seek(position)
        data = b""
        while len(data) < count and (part := file.read(count - len(data))):
            data += part
        if len(data) < count:
            raise self._wrong("it was cut off while it was read")
        return data

    def check_form(self, name: str) -> None:
        """Raise ModelError if an .xml or .json file does not begin like one."""
        wanted = {"xml": b"<", "json": b"{["}.get(name.rpartition(".")[2])
        if wanted and self.size:
            start = bytearray(min(self.size, 64))
            self.read_into(memoryview(start))
            first = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            if not first or first not in wanted:
                raise self._wrong(f"it is not {name.rpartition('.')[2].upper()} when it is decrypted")

    def _wrong(self, what: str) -> ModelError:
        return ModelError(what, where=self.where, hint=_WRONG)


def binary_of(open_file: Callable[[], BinaryIO], size: int, where: str) -> tuple[Callable[[], BinaryIO], int]:
    """Return how to open a file, and its size, as bytes if it is base64 (`openssl enc -a`, -base64, -A)."""
    with open_file() as file:
        start = file.read(65)
    if not start or not set(start) <= _BASE64:
        return open_file, size
    with open_file() as file:
        text = b"".join(iter(functools.partial(file.read, _PIECE), b""))
    try:
        data = base64.b64decode(b"".join(text.split()), validate=True)
    except ValueError as error:
        raise ModelError(f"it is not base64 to its end: {error}", where=where, hint="Fetch it again.") from None
    return lambda: io.BytesIO(data), len(data)


_BASE64 = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\r\n")


def check_graph(xml: bytes, weights: int, padded: bool, where: str) -> None:
    """Raise ModelError if an IR is not well-formed, or uses other bytes of its weights than there are.

    A wrong key passes for padding once in 256 times, and then gives a size that is some bytes off.
    """
    from xml.etree import ElementTree

    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise ModelError(f"the graph is not XML when it is decrypted: {error}", where=where, hint=_WRONG) from None
    try:
        ends = [int(data.get("offset", 0)) + int(data.get("size", 0)) for data in root.iter("data") if data.get("size")]
    except ValueError:
        ends = []
    used = max(ends, default=0)
    if used > weights or (padded and 0 < weights - used < BLOCK):
        raise ModelError(f"the graph uses {used} bytes of weights, and there are {weights}", where=where, hint=_WRONG)


def write_openssl(file: BinaryIO, pieces: Iterable[bytes | memoryview], key: Key) -> None:
    """Encrypt `pieces` as `openssl enc` does: with a new salt for a passphrase, else with the iv that is given."""
    salt = os.urandom(8) if key.is_passphrase else None
    parameters = parameters_of(key, salt)
    if salt is not None:
        file.write(SALTED + salt)
    encryptor, total = parameters.at(0, b"").encryptor(), 0
    for piece in pieces:
        total += memoryview(piece).nbytes
        file.write(encryptor.update(piece))
    count = BLOCK - total % BLOCK
    file.write(encryptor.update(bytes([count]) * count if parameters.is_cbc else b"") + encryptor.finalize())
