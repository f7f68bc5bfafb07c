"""ovforge encrypt, decrypt, rekey."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ovforge.errors import ConfigError, InputError
from ovforge_aes_loader.keys import KEY_SIZE, Key, default_keys
from ovforge_aes_loader.options import CIPHERS, KeyOptions, place_of

__all__ = ["decrypt", "encrypt", "rekey"]

_PLACE = (
    "Where the key is: env:NAME, file:PATH, fd:3, command:'pass show NAME' or keyring:SERVICE/USER. "
    "By default $OVFORGE_KEY, $OVFORGE_KEY_FILE or $OVFORGE_PASSPHRASE."
)
Source = Annotated[Path, typer.Argument(help="A file or a folder.")]
Place = Annotated[str | None, typer.Option("--key", "-k", metavar="PLACE", help=_PLACE)]
Passphrase = Annotated[bool, typer.Option("--passphrase", help="What is there is a passphrase.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it is there.")]
CipherName = Annotated[str | None, typer.Option("--cipher", help=f"openssl: {', '.join(CIPHERS)}.", show_default=False)]
Iv = Annotated[str | None, typer.Option("--iv", metavar="HEX", help="openssl, with a key: the initialization vector.")]
Iterations = Annotated[int, typer.Option("--iterations", help="openssl, with a passphrase: -iter.")]
Kdf = Annotated[str, typer.Option("--kdf", help="openssl, with a passphrase: pbkdf2, or legacy without -pbkdf2.")]
Digest = Annotated[str, typer.Option("--digest", help="openssl, with a passphrase: -md.")]


def encrypt(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file or folder to write.")],
    key: Place = None,
    passphrase: Passphrase = False,
    make_key: Annotated[
        bool, typer.Option("--make-key", help="Make a new key first, and write it to file:PATH.")
    ] = False,
    format: Annotated[str, typer.Option("--format", help="ovenc, or openssl for other programs.")] = "ovenc",
    cipher: CipherName = None,
    iv: Iv = None,
    iterations: Iterations = 10_000,
    digest: Digest = "sha256",
    kdf: Kdf = "pbkdf2",
    force: Force = False,
) -> None:
    """Encrypt a model, a folder or any file.

    Example: ovforge encrypt models/lcm -o models/lcm-enc --key file:model.key --make-key
    """
    from ovforge.cli import check_folder
    from ovforge_aes_loader import files

    if format not in ("ovenc", "openssl"):
        raise InputError(f"unknown format {format!r}", where="--format", hint="Use ovenc or openssl.")
    if format == "ovenc" and (cipher or iv):
        raise InputError("a container has its own cipher", where="--cipher, --iv", hint="Add: --format openssl")
    check_folder(output.parent)
    options = _openssl(cipher, iv, iterations, digest, kdf) if format == "openssl" else {}
    if make_key:
        _make_key(key)
    chosen = _key(key, passphrase, **options)
    if format == "openssl":
        written = files.encrypt_openssl(source, output, chosen, replace=force)
    else:
        written = files.encrypt(source, output, chosen, replace=force)
    _say(written)


def decrypt(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file or folder to write, plain.")],
    key: Place = None,
    passphrase: Passphrase = False,
    cipher: CipherName = None,
    iv: Iv = None,
    iterations: Iterations = 10_000,
    digest: Digest = "sha256",
    kdf: Kdf = "pbkdf2",
    force: Force = False,
) -> None:
    """Write an encrypted model as plain files, which only their owner can read.

    Example: ovforge decrypt models/lcm-enc -o models/plain --key file:model.key
    """
    from ovforge.cli import check_folder
    from ovforge_aes_loader import files

    check_folder(output.parent)
    options = _openssl(cipher, iv, iterations, digest, kdf)
    chosen = _key(key, passphrase, **options) if key or passphrase or cipher or iv else None
    _say(files.decrypt(source, output, chosen, replace=force))


def rekey(
    source: Source,
    new_key: Annotated[str, typer.Option("--new-key", metavar="PLACE", help="Where the new key is, said like --key.")],
    key: Place = None,
    passphrase: Passphrase = False,
    new_passphrase: Annotated[bool, typer.Option("--new-passphrase", help="The new one is a passphrase.")] = False,
    make_key: Annotated[bool, typer.Option("--make-key", help="Make the new key, and write it to file:PATH.")] = False,
) -> None:
    """Encrypt a model under another key, in its place.

    Example: ovforge rekey models/lcm-enc --key file:model.key --new-key file:new.key --make-key
    """
    from ovforge_aes_loader import files

    if make_key:
        _make_key(new_key)
    old = _key(key, passphrase) if key or passphrase else None
    _say(files.rekey(source, old, _key(new_key, new_passphrase)))


def _key(place: str | None, passphrase: bool, **options: Any) -> Key:
    if passphrase:
        options["form"] = "passphrase"
    if place is not None:
        return Key(place_of(place, **options))
    for known in default_keys():
        if known.is_passphrase == (passphrase or known.is_passphrase):
            settings = known.options.model_dump(exclude_unset=True)
            return Key(KeyOptions.model_validate({**settings, **options}))
    raise ConfigError(
        "no key is given", where="--key", hint="Add --key file:PATH, with --make-key if there is none yet."
    )


def _openssl(cipher: str | None, iv: str | None, iterations: int, digest: str, kdf: str) -> dict[str, Any]:
    settings = {"cipher": cipher, "iv": iv, "iterations": iterations, "digest": digest, "kdf": kdf}
    return {name: value for name, value in settings.items() if value is not None}


def _make_key(place: str | None) -> None:
    """Write a new key, as hexadecimal digits, to a file that is not there yet."""
    from ovforge_aes_loader.container import private_file

    kind, _, path = (place or "").partition(":")
    if kind != "file" or not path:
        raise InputError("a new key is written to a file", where="--make-key", hint="Add --key file:PATH")
    try:
        with private_file(Path(path)) as file:
            file.write(f"{os.urandom(KEY_SIZE).hex()}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise InputError("is there already", where=path, hint="A key is never written over: name another.") from error


def _say(written: list[Path]) -> None:
    from ovforge.cli import print_line

    for path in written:
        print_line(str(path))
