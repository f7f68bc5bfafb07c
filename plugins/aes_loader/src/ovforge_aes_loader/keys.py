"""Keys: where they are, how they are written, and what is derived from them. They are never shown.

An option names the place of a key. The key itself is read when it is first needed, stays inside `Key`, and is in no
repr, error, pickle or dump. Several keys may be known to a process; a container names the one that it wants by an id.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from ovforge.errors import ConfigError, ModelError, OvforgeError, PluginError

__all__ = ["CIPHERS", "Key", "KeyOptions", "Master", "Scrypt", "default_keys", "known_keys", "remember"]

CIPHERS = tuple(f"aes-{bits}-{mode}" for mode in ("cbc", "ctr") for bits in (128, 192, 256))
"""OpenSSL's names of the ciphers that its own forms may have."""

KEY_SIZE = 32
"""Bytes of a container's key."""

_LIMIT = 4096
"""Most bytes that are read from a place: keys and passphrases are shorter."""

_PLACES = ("env", "file", "fd", "command", "keyring", "function")
_HOW = (
    'Name its place: {env = "NAME"}, {file = "PATH"}, {fd = 3}, {command = ["pass", "show", "NAME"]} or '
    '{keyring = "SERVICE/USER"}.'
)
_COMMAND_SECONDS = 120


class KeyOptions(BaseModel):
    """Where the key is and, for what `openssl enc` wrote, how it was used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    env: str | None = Field(None, description="The environment variable that holds it.")
    file: Path | None = Field(None, description="The file that holds it; only its owner may be able to read it.")
    fd: int | None = Field(None, ge=0, description="The file descriptor that it is read from.")
    command: tuple[str, ...] | None = Field(None, min_length=1, description="The command that prints it, in words.")
    keyring: str | None = Field(None, pattern="^[^/]+/.+$", description="SERVICE/USER in the system's keyring.")
    function: SkipJsonSchema[Callable[[], str | bytes] | None] = Field(
        None, description="A Python function that returns it."
    )
    form: Literal["auto", "hex", "base64", "raw", "passphrase"] = Field(
        "auto", description="How it is written there; a passphrase is never guessed."
    )
    cipher: Literal[CIPHERS] | None = Field(None, description="OpenSSL's forms: the cipher.")  # type: ignore[valid-type]
    iv: str | None = Field(
        None, pattern="^[0-9a-fA-F]{32}$", description="OpenSSL's form without a salt: the initialization vector, hex."
    )
    iterations: int = Field(10_000, ge=1, le=10_000_000, description="OpenSSL's salted form: -iter.")
    digest: Literal["sha1", "sha256", "sha384", "sha512"] = Field("sha256", description="OpenSSL's salted form: -md.")

    @model_validator(mode="after")
    def _one_place(self) -> KeyOptions:
        if len([name for name in _PLACES if getattr(self, name) is not None]) > 1:
            raise ValueError("names several places; a key has one")
        return self

    @property
    def named(self) -> bool:
        """Whether it names a place."""
        return any(getattr(self, name) is not None for name in _PLACES)


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

    return HKDF(SHA256(), KEY_SIZE, salt, info).derive(secret)


class Key:
    """A key, read from its place when first needed."""

    def __init__(self, options: KeyOptions) -> None:
        self.options = options
        self._secret: bytes | None = None
        self._masters: dict[tuple[Scrypt | None, bytes], Master] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<key from {self.place}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys are not pickled")

    @property
    def is_passphrase(self) -> bool:
        """Whether it is a passphrase."""
        return self.options.form == "passphrase"

    @property
    def place(self) -> str:
        """Where it is, in words."""
        said = self.options
        if said.env is not None:
            return f"the environment variable {_shown(said.env)}"
        if said.file is not None:
            return f"the file {_shown(str(said.file))}"
        if said.fd is not None:
            return f"file descriptor {said.fd}"
        if said.command is not None:
            return f"the command {_shown(said.command[0])}"
        if said.keyring is not None:
            return f"the keyring's entry {_shown(said.keyring)}"
        return "a Python function" if said.function is not None else "nowhere"

    def raw(self, size: int) -> bytes:
        """Return a key of `size` bytes. Raises ConfigError where it is not such a key."""
        if self.is_passphrase:
            raise self._unfit("a passphrase is given where a key is wanted")
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
        raise self._unfit(f"expected {', '.join(wanted.values()) if form == 'auto' else wanted[form]}")

    def passphrase(self) -> bytes:
        """Return a passphrase without the line's end."""
        if not self.is_passphrase:
            raise self._unfit('a key is given where a passphrase is wanted (form = "passphrase")')
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
            secret = self._fetch()
            if not secret.strip():
                raise self._unfit("nothing is there")
            if len(secret) > _LIMIT:
                raise self._unfit(f"more than {_LIMIT} bytes are there")
            self._secret = secret
        return self._secret

    def _fetch(self) -> bytes:
        said = self.options
        try:
            if said.env is not None:
                return os.environb[said.env.encode()] if os.supports_bytes_environ else os.environ[said.env].encode()
            if said.file is not None:
                return _private_file(said.file, self)
            if said.fd is not None:
                return _descriptor(said.fd)
            if said.command is not None:
                return _printed(said.command, self)
            if said.keyring is not None:
                return _from_keyring(said.keyring, self)
            if said.function is not None:
                given = said.function()
                return given.encode() if isinstance(given, str) else bytes(given)
        except KeyError:
            raise self._unfit("it is not set") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else type(error).__name__
            # The cause is left out: it may hold what was read.
            raise self._unfit(f"it cannot be read: {reason}") from None
        raise ConfigError("no key is given", where="load.key", hint=_HOW)

    def _unfit(self, what: str) -> ConfigError:
        return ConfigError(what, where=f"key from {self.place}", hint=_HOW)


def _shown(text: str) -> str:
    """Return the name of a place, unless it looks like a key that was written where its place belongs."""
    return "(its name looks like a key and is not shown)" if re.fullmatch(r"[0-9a-zA-Z+/=_-]{22,}", text) else text


def _base64(text: bytes) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return None


def _private_file(path: Path, key: Key) -> bytes:
    """Return a file's bytes. The file that is open is the one that is checked."""
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise key._unfit("it is no regular file")
        if os.name != "nt" and stat.S_ISREG(mode) and mode & 0o077:
            raise ConfigError(
                f"others can use it (its mode is {stat.S_IMODE(mode):04o})",
                where=f"key from {key.place}",
                hint="Run: chmod 600 FILE; and if others may have read it, make a new key (ovforge rekey).",
            )
        return file.read(_LIMIT + 1)


def _descriptor(number: int) -> bytes:
    read = b""
    while len(read) <= _LIMIT and (part := os.read(number, _LIMIT)):
        read += part
    return read


def _printed(command: tuple[str, ...], key: Key) -> bytes:
    import subprocess

    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False, timeout=_COMMAND_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise key._unfit(f"it took longer than {_COMMAND_SECONDS} seconds") from None
    if done.returncode:
        raise key._unfit(f"it ended with exit code {done.returncode}")
    return done.stdout


def _from_keyring(entry: str, key: Key) -> bytes:
    try:
        import keyring
    except ImportError as error:
        raise PluginError(
            "the system's keyring needs the package keyring",
            where="load.key.keyring",
            hint="Run: pip install 'ovforge-aes-loader[keyring]'",
        ) from error
    service, _, user = entry.partition("/")
    try:
        found = keyring.get_password(service, user)
    except Exception as error:  # backends raise what they like
        raise key._unfit(f"the keyring failed: {type(error).__name__}") from None
    if found is None:
        raise key._unfit("it is not there")
    return str(found).encode()


# -- the keys of a process ------------------------------------------------------------------------------------------

_known: list[Key] = []
_known_lock = threading.Lock()


def remember(key: Key) -> None:
    """Let later files without a key of their own be opened by this one, if they ask for it by its id."""
    with _known_lock:
        _known[:] = [other for other in _known if not key.same_as(other)] + [key]


def known_keys() -> list[Key]:
    """Return the keys that this process has used, the last one first, and those in default places."""
    with _known_lock:
        return [*reversed(_known), *default_keys()]


def default_keys() -> Iterator[Key]:
    """Yield the keys of $OVFORGE_KEY, $OVFORGE_KEY_FILE and $OVFORGE_PASSPHRASE, where they are set."""
    if "OVFORGE_KEY" in os.environ:
        yield Key(KeyOptions(env="OVFORGE_KEY"))
    if "OVFORGE_KEY_FILE" in os.environ:
        yield Key(KeyOptions(file=Path(os.environ["OVFORGE_KEY_FILE"])))
    if "OVFORGE_PASSPHRASE" in os.environ:
        yield Key(KeyOptions(env="OVFORGE_PASSPHRASE", form="passphrase"))


def find_master(scrypt: Scrypt | None, salt: bytes, key_id: bytes, key: Key | None, where: str) -> Master:
    """Return the master key of this id: from `key`, or else from the first known key that has it.

    Raises ConfigError where there is none, with the ids.
    """
    problems: list[OvforgeError] = []
    tried: list[str] = []
    for candidate in [key] if key else known_keys():
        if candidate.is_passphrase != (scrypt is not None):
            kind = "a passphrase" if scrypt else "a key"
            problems.append(ConfigError(f"it is encrypted with {kind}, which {candidate.place} is not", where=where))
            continue
        try:
            master = candidate.master(scrypt, salt)
        except OvforgeError as error:
            problems.append(error)
            continue
        if hmac.compare_digest(master.id, key_id):
            return master
        tried.append(f"{candidate.place} ({'a wrong passphrase' if scrypt else master.id.hex()})")
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


def place_of(text: str, **options: Any) -> KeyOptions:
    """Return what a command line says as KIND:PLACE, such as env:NAME. The text of a mistake is not repeated."""
    kind, colon, place = text.partition(":")
    if not colon or kind not in _PLACES[:-1] or not place:
        raise ConfigError(
            "names no place of a key",
            where="--key",
            hint="Write env:NAME, file:PATH, fd:3, command:'pass show NAME' or keyring:SERVICE/USER. "
            "A key itself never stands on a command line, where every process can read it.",
        )
    import shlex

    from ovforge.config import validate_options

    value: Any = tuple(shlex.split(place)) if kind == "command" else place
    checked = validate_options(KeyOptions, {kind: value, **options}, where="--key", secret=True)
    assert isinstance(checked, KeyOptions)
    return checked
