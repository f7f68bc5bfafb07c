"""Reading a key from where it is."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ovforge.errors import ConfigError, OvforgeError, PluginError
from ovforge.store import run_program
from ovforge_aes_loader.options import HOW, KeyOptions

__all__ = ["fetch"]

LIMIT = 4096
"""Most bytes that are read from a place: keys and passphrases are shorter."""

_COMMAND_SECONDS = 120


def fetch(options: KeyOptions) -> bytes:
    """Return what is at the place that the options name. Raises ConfigError if nothing is, or it is not private."""
    secret = _read(options)
    if not secret.strip():
        raise options.unfit("nothing is there")
    if len(secret) > LIMIT:
        raise options.unfit(f"more than {LIMIT} bytes are there")
    return secret


def _read(options: KeyOptions) -> bytes:
    if options.function is not None:
        try:
            secret = options.function()
        except OvforgeError:
            raise
        except Exception as error:  # a function raises what it likes; the cause is left out, as below
            raise options.unfit(f"it raised {type(error).__name__}") from None
        return secret.encode() if isinstance(secret, str) else bytes(secret)
    try:
        if options.env is not None:
            return os.environ[options.env].encode("utf-8", "surrogateescape")
        if options.file is not None:
            return _private_file(options.file, options)
        if options.fd is not None:
            return _descriptor(options.fd)
        if options.command is not None:
            return _printed(options.command, options)
        if options.keyring is not None:
            return _from_keyring(options.keyring, options)
    except KeyError:
        raise options.unfit("it is not set") from None
    except (OSError, ValueError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        # The cause is left out: it may hold what was read.
        raise options.unfit(f"it cannot be read: {reason}") from None
    raise ConfigError("no key is given", where="load.key", hint=HOW)


def _private_file(path: Path, options: KeyOptions) -> bytes:
    """Return a file's bytes. The file that is open is the one that is checked."""
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise options.unfit("it is not a regular file")
        if os.name != "nt" and stat.S_ISREG(mode) and mode & 0o077:
            raise ConfigError(
                f"others can use it (its mode is {stat.S_IMODE(mode):04o})",
                where=f"key from {options.place}",
                hint="Run: chmod 600 FILE; and if others may have read it, make a new key (ovforge rekey).",
            )
        return file.read(LIMIT + 1)


def _descriptor(number: int) -> bytes:
    read = b""
    while len(read) <= LIMIT and (part := os.read(number, LIMIT)):
        read += part
    return read


def _printed(command: tuple[str, ...], options: KeyOptions) -> bytes:
    import subprocess

    try:
        done = run_program(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=_COMMAND_SECONDS)
    except ConfigError:
        raise options.unfit("there is no such program") from None
    except subprocess.TimeoutExpired:
        raise options.unfit(f"it took longer than {_COMMAND_SECONDS} seconds") from None
    if done.returncode:
        raise options.unfit(f"it ended with exit code {done.returncode}")
    output: bytes = done.stdout
    return output


def _from_keyring(entry: str, options: KeyOptions) -> bytes:
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
        raise options.unfit(f"the keyring failed: {type(error).__name__}") from None
    if found is None:
        raise options.unfit("it is not there")
    return str(found).encode()
