"""Encrypted models: read, run and cached without a plain byte on disk. Listing it imports no cryptography."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import CommandExtension, SourceExtension

__all__ = ["ovforge_commands", "ovforge_sources"]


@hookimpl
def ovforge_sources() -> Iterator[SourceExtension]:
    """Yield what opens encrypted files and folders."""
    yield SourceExtension(
        name="aes",
        summary="AES-encrypted files and folders: .ovenc containers, and what `openssl enc` wrote",
        config="ovforge_aes_loader.options:KeyOptions",
        factory="ovforge_aes_loader.opener:AesOpener",
    )


@hookimpl
def ovforge_commands() -> Iterator[CommandExtension]:
    """Yield encrypt, decrypt and rekey."""
    for name, summary in (
        ("encrypt", "Encrypt a model, a folder or any file"),
        ("decrypt", "Write an encrypted model as plain files"),
        ("rekey", "Encrypt a model under another key, in its place"),
    ):
        yield CommandExtension(name=name, summary=summary, factory=f"ovforge_aes_loader.commands:{name}")
