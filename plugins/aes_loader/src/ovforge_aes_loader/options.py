"""What a config or a command line says of a key: its place, never the key."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from ovforge.errors import ConfigError

__all__ = ["CIPHERS", "HOW", "KeyOptions", "place_of"]

CIPHERS = tuple(f"aes-{bits}-{mode}" for mode in ("cbc", "ctr") for bits in (128, 192, 256))
"""OpenSSL's names of the ciphers that its own forms may have."""

_PLACES = ("env", "file", "fd", "command", "keyring", "function")
HOW = (
    'Name its place: {env = "NAME"}, {file = "PATH"}, {fd = 3}, {command = ["pass", "show", "NAME"]} or '
    '{keyring = "SERVICE/USER"}.'
)


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
    digest: Literal["md5", "sha1", "sha256", "sha384", "sha512"] = Field(
        "sha256", description="OpenSSL's salted form: -md; md5 is what versions before 1.1 took without -pbkdf2."
    )
    kdf: Literal["pbkdf2", "legacy"] = Field(
        "pbkdf2", description="OpenSSL's salted form: legacy if it was made without -pbkdf2, which derives a weak key."
    )

    @field_validator("command", mode="before")
    @classmethod
    def _in_words(cls, value: Any) -> Any:
        """A command in one text is split as a shell would."""
        return tuple(shlex.split(value)) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_place(self) -> KeyOptions:
        if len([name for name in _PLACES if getattr(self, name) is not None]) > 1:
            raise ValueError("names several places; a key has one")
        return self

    @property
    def named(self) -> bool:
        """Whether it names a place."""
        return any(getattr(self, name) is not None for name in _PLACES)

    @property
    def place(self) -> str:
        """Where it is, in words."""
        if self.env is not None:
            return f"the environment variable {_shown(self.env)}"
        if self.file is not None:
            return f"the file {_shown(str(self.file))}"
        if self.fd is not None:
            return f"file descriptor {self.fd}"
        if self.command is not None:
            return f"the command {_shown(self.command[0])}"
        if self.keyring is not None:
            return f"the keyring's entry {_shown(self.keyring)}"
        return "a Python function" if self.function is not None else "nowhere"

    def unfit(self, what: str) -> ConfigError:
        """Return the error that says what is wrong with the key from this place, and shows nothing of it."""
        return ConfigError(what, where=f"key from {self.place}", hint=HOW)


def _shown(text: str) -> str:
    """Return the name of a place, unless it looks like a key that was written where its place belongs."""
    return "(its name looks like a key and is not shown)" if re.fullmatch(r"[0-9a-zA-Z+/=_-]{22,}", text) else text


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
    from ovforge.config import validate_options

    checked = validate_options(KeyOptions, {kind: place, **options}, where="--key", secret=True)
    assert isinstance(checked, KeyOptions)
    return checked
