"""API keys: who may send requests, and how many at a time."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ovforge.errors import ConfigError
from ovforge_serve.settings import HttpError

__all__ = ["VARIABLE", "Key", "Keys"]

VARIABLE = "OVFORGE_SERVE_KEYS"
"""Environment variable with keys, between commas."""

_SHORTEST = 16


@dataclass(frozen=True)
class Key:
    """A key by its digest, the name that logs give it, and how many of its requests may be here at a time."""

    name: str
    digest: bytes
    limit: int | None = None


class Keys:
    """The keys of a server; without any, everybody may send requests."""

    def __init__(self, keys: tuple[Key, ...] = ()) -> None:
        self._keys = keys
        self._open: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self._keys)

    @classmethod
    def read(cls, file: Path | None) -> Keys:
        """Return the keys of a file, one a line: NAME KEY [REQUESTS AT A TIME]; and those of the environment.

        Errors name the line, and never show the key.
        """
        keys = []
        try:
            lines = file.read_text(encoding="utf-8").splitlines() if file else []
        except UnicodeDecodeError as error:
            raise ConfigError("it is not text in UTF-8", where=str(file)) from error
        for number, line in enumerate(lines, start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            where = f"{file}: line {number}"
            if len(words) not in (2, 3) or (len(words) == 3 and not (words[2].isascii() and words[2].isdigit())):
                raise ConfigError("it is not NAME KEY [REQUESTS AT A TIME]", where=where)
            keys.append(_key(words[0], words[1], where, int(words[2]) if len(words) == 3 else None))
        given = [text.strip() for text in os.environ.get(VARIABLE, "").split(",") if text.strip()]
        keys += [_key(f"environment-{number}", text, VARIABLE) for number, text in enumerate(given, start=1)]
        return cls(tuple(keys))

    def find(self, authorization: str | None) -> str | None:
        """Return the name of the key in an Authorization header, None if there are no keys.

        Raises HttpError for a wrong one. All keys are compared, each in constant time.
        """
        if not self._keys:
            return None
        scheme, _, text = (authorization or "").partition(" ")
        digest = _digest(text.strip() if scheme.lower() == "bearer" else "")
        found = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        if not found:
            raise HttpError(401, "the API key is missing or wrong", hint="Send it as: Authorization: Bearer KEY")
        return found[0].name

    @contextmanager
    def hold(self, name: str | None) -> Iterator[None]:
        """Count a request of a key while the block runs. Raises HttpError if the key has too many."""
        limit = next((key.limit for key in self._keys if key.name == name), None)
        if name is None or limit is None:
            yield
            return
        if self._open[name] >= limit:
            raise HttpError(
                429, f"the key may have {limit} requests at a time", hint="Wait for an answer.", retry_after=1
            )
        self._open[name] += 1
        try:
            yield
        finally:
            self._open[name] -= 1


def _key(name: str, text: str, where: str, limit: int | None = None) -> Key:
    if len(text) < _SHORTEST:
        raise ConfigError(
            f"the key has fewer than {_SHORTEST} letters",
            where=where,
            hint="Make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return Key(name, _digest(text), limit)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
