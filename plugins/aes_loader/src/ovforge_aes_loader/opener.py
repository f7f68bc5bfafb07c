"""Knows encrypted files and folders by their first bytes, and opens them as a Source like any other."""

from __future__ import annotations

from typing import Any

from ovforge.model import Source
from ovforge_aes_loader.keys import Key
from ovforge_aes_loader.options import KeyOptions

__all__ = ["AesOpener"]

_STARTS = (b"\x89OVENC\r\n", b"Salted__", b"U2FsdGVk")


class AesOpener:
    """Opens what is encrypted with the key of its options, or with one in a default place."""

    def __init__(self, options: KeyOptions) -> None:
        self.options = options
        self.key = Key(options) if options.named else None

    @property
    def asks(self) -> bool:
        """Whether reading the key runs a program, or may ask somebody."""
        options = self.options
        return any(place is not None for place in (options.command, options.keyring, options.function))

    def can_open(self, source: Source) -> bool:
        """Say whether a file begins like one of ours. What `openssl enc -K` writes has no beginning: options say so."""
        if self.options.cipher is not None and self.options.iv is not None:
            return True
        return any(source.read(path, len(_STARTS[0])) in _STARTS for path in source.files())

    def open(self, source: Source) -> Source:
        """Return the plain source. Raises ModelError for files that are damaged or do not belong together."""
        from ovforge_aes_loader.opening import open_encrypted

        return open_encrypted(source, self.key)

    def describe(self, source: Source) -> list[dict[str, Any]]:
        """Return what each file says of itself, without a key and unchecked."""
        from ovforge_aes_loader.files import describe

        return describe(source)
