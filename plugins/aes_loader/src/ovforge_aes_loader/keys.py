"""Keys: where they are, how they are written, and what is derived from them. They are never shown.

An option names the place of a key. The key itself is read when it is first needed, stays inside `Key`, and is in no
repr, error, pickle or dump. A container names the one that it wants by an id.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ovforge.errors import ConfigError, ModelError, OvforgeError
from ovforge_aes_loader.options import KeyOptions
from ovforge_aes_loader.places import fetch

__all__ = ["KEY_SIZE", "Key", "Master", "Scrypt", "default_keys", "find_master", "hkdf"]

KEY_SIZE = 32
"""Bytes of a container's key."""


@dataclass(frozen=True, slots=True)
class Scrypt:
    """Cost of deriving a key from a passphrase (RFC 7914): 128 * 2**log_n * r bytes of memory, p times."""

    log_n: int = 17
    r: int = 8
    p: int = 1

    def check(self, where: str) -> None:
        """Raise ModelError for a cost too low to protect, or too high to pay: a stranger's file may ask for any."""
        if not (14 <= self.log_n <= 20 and 1 <= self.r <= 16 and 1 <= self.p <= 4 and self.memory <= 2**30):
            raise ModelError(f"its passphrase would be derived at a cost out of bounds: {self}", where=where)

    @property
    def memory(self) -> int:
        """Bytes that deriving takes."""
        return 128 * (1 << self.log_n) * self.r


@dataclass(frozen=True, slots=True)
class Master:
    """The 32 bytes that a container's keys are derived from. `id` tells nothing of them."""

    secret: bytes
    id: bytes
    scrypt: Scrypt | None = None
    salt: bytes = bytes(16)

    def __repr__(self) -> str:
        return f"<master key {self.id.hex()}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys are not pickled")

    def derive(self, info: bytes, salt: bytes) -> bytes:
        """Return 32 bytes (HKDF-SHA256, RFC 5869)."""
        return hkdf(self.secret, info, salt)

    @classmethod
    def of(cls, secret: bytes, scrypt: Scrypt | None = None, salt: bytes = bytes(16)) -> Master:
        """Return the master key of 32 bytes, with its id."""
        return cls(secret, hkdf(secret, b"ovenc key id", b"")[:16], scrypt, salt)


def hkdf(secret: bytes, info: bytes, salt: bytes) -> bytes:
    """Return 32 bytes of HKDF-SHA256."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    derived: bytes = HKDF(SHA256(), KEY_SIZE, salt, info).derive(secret)
    return derived


class Key:
    """A key, read from its place when first needed."""

    def __init__(self, options: KeyOptions) -> None:
        self.options = options
        self._secret: bytes | None = None
        self._masters: dict[tuple[Scrypt | None, bytes], Master] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<key from {self.options.place}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys are not pickled")

    @property
    def is_passphrase(self) -> bool:
        """Whether it is a passphrase."""
        return self.options.form == "passphrase"

    def raw(self, size: int) -> bytes:
        """Return a key of `size` bytes. Raises ConfigError if it is not such a key."""
        if self.is_passphrase:
            raise self.options.unfit("a passphrase is given where a key is wanted")
        secret, form = self._fetched(), self.options.form
        text = secret.strip()
        if form in ("auto", "hex") and re.fullmatch(rb"[0-9a-fA-F]{%d}" % (2 * size), text):
            return bytes.fromhex(text.decode())
        if form in ("auto", "base64") and (decoded := _base64(text)) is not None and len(decoded) == size:
            return decoded
        if form in ("auto", "raw") and size in (len(secret), len(text)):
            return secret if len(secret) == size else text
        wanted = {
            "hex": f"{2 * size} hexadecimal digits",
            "base64": f"{(size + 2) // 3 * 4} characters of base64",
            "raw": f"{size} raw bytes",
        }
        raise self.options.unfit(f"expected {', '.join(wanted.values()) if form == 'auto' else wanted[form]}")

    def passphrase(self) -> bytes:
        """Return a passphrase without the line's end."""
        if not self.is_passphrase:
            raise self.options.unfit('a key is given where a passphrase is wanted (form = "passphrase")')
        return self._fetched().rstrip(b"\r\n")

    def new_master(self, scrypt: Scrypt | None = None) -> Master:
        """Return a master key to encrypt with; a passphrase's has a new salt. `scrypt` is its cost."""
        if not self.is_passphrase:
            return self.master(None, bytes(16))
        return self.master(scrypt or Scrypt(), os.urandom(16))

    def master(self, scrypt: Scrypt | None, salt: bytes) -> Master:
        """Return the master key that a container with these parameters wants."""
        with self._lock:
            if (scrypt, salt) not in self._masters:
                self._masters[scrypt, salt] = self._derived(scrypt, salt)
            return self._masters[scrypt, salt]

    def _derived(self, scrypt: Scrypt | None, salt: bytes) -> Master:
        if scrypt is None:
            return Master.of(self.raw(KEY_SIZE))
        from cryptography.hazmat.primitives.kdf.scrypt import Scrypt as Derivation

        derivation = Derivation(salt, KEY_SIZE, 2**scrypt.log_n, scrypt.r, scrypt.p)
        return Master.of(derivation.derive(self.passphrase()), scrypt, salt)

    def same_as(self, other: Key) -> bool:
        """Say whether both are one key, without reading either."""
        if self._secret is not None and other._secret is not None:
            same = hmac.compare_digest(self._secret, other._secret)
            return same and self.options.form == other.options.form
        return self.options == other.options

    def _fetched(self) -> bytes:
        if self._secret is None:
            self._secret = fetch(self.options)
        return self._secret


def _base64(text: bytes) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return None


# -- finding a key --------------------------------------------------------------------------------------------------


def default_keys() -> Iterator[Key]:
    """Yield the keys of $OVFORGE_KEY, $OVFORGE_KEY_FILE and $OVFORGE_PASSPHRASE, where they are set."""
    if "OVFORGE_KEY" in os.environ:
        yield Key(KeyOptions(env="OVFORGE_KEY"))
    if "OVFORGE_KEY_FILE" in os.environ:
        yield Key(KeyOptions(file=Path(os.environ["OVFORGE_KEY_FILE"])))
    if "OVFORGE_PASSPHRASE" in os.environ:
        yield Key(KeyOptions(env="OVFORGE_PASSPHRASE", form="passphrase"))


def find_master(scrypt: Scrypt | None, salt: bytes, key_id: bytes, key: Key | None, where: str) -> Master:
    """Return the master key of this id: from `key`, or else from the first key in a default place that has it.

    Raises ConfigError if there is none, with the ids.
    """
    problems: list[OvforgeError] = []
    tried: list[str] = []
    for candidate in [*([key] if key else []), *default_keys()]:
        if candidate.is_passphrase != (scrypt is not None):
            kind = "a passphrase" if scrypt else "a key"
            problems.append(
                ConfigError(f"it is encrypted with {kind}, which {candidate.options.place} is not", where=where)
            )
            continue
        try:
            master = candidate.master(scrypt, salt)
        except OvforgeError as error:
            problems.append(error)
            continue
        if hmac.compare_digest(master.id, key_id):
            return master
        tried.append(f"{candidate.options.place} ({'a wrong passphrase' if scrypt else master.id.hex()})")
    if tried:
        raise ModelError(
            f"it is encrypted with the key {key_id.hex()}, and this is another one: {', '.join(tried)}",
            where=where,
            hint="See `ovforge inspect` for the key that it wants.",
        )
    if problems:
        raise problems[0]
    kind = "OVFORGE_PASSPHRASE" if scrypt else "OVFORGE_KEY or OVFORGE_KEY_FILE"
    raise ConfigError(
        f"it is encrypted with {'a passphrase' if scrypt else 'the key ' + key_id.hex()}, and no key is given",
        where=where,
        hint=f"Set load.key to its place, or the environment variable {kind}.",
    )
