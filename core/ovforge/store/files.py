"""Writing files and folders so that a crash or a full disk loses nothing that was there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from ovforge.store.folders import carry_over, check_replaceable, mark, remove_replaced
from ovforge.store.temporary import held_name

__all__ = ["atomic_file", "atomic_folder", "atomic_write", "sync_file", "sync_folder"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_HERE, _RENAME_EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2(2)."""


def atomic_write(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to `path` under a temporary name beside it, flush it to disk, then rename."""
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """Give a temporary file beside `path` that takes its name when the block ends well, flushed to disk.

    A `private` file is readable by its owner alone. Others keep the permissions of a file that was there; a new one has
    those that the process gives to new files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = None if private else _mode(path)
    with held_name(path.parent, path.name) as temporary:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        # The system takes the umask of this moment off the mode of a new file.
        handle = os.open(temporary, flags, 0o600 if private or mode is not None else 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno in _FULL and error.filename is None:  # what writes to an open file names none
                error.filename = str(path)
            raise
        if mode is not None:
            temporary.chmod(mode)
        temporary.replace(path)
    sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(
    path: Path, *, replace: bool = False, own: Iterable[str] | None = None, marked: bool = True
) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its name when the block ends well.

    If the block raises, the temporary folder is removed and `path` stays as it was. With `replace`, a folder that
    ovforge wrote is replaced: the files that it wrote (or those named in `own`, by relative POSIX path) go, and all
    others stay. A folder that is not `marked` will not count as one that ovforge wrote. A folder that was there keeps
    its permissions, and so do files in it whose names are written again; those that the block made private stay so.

    Raises FileExistsError if `path` exists and `replace` is false, InputError if it is not ovforge's to replace.
    """
    path = path.resolve()  # a link stays a link, and what it leads to is replaced
    if path.exists() and not replace:
        raise FileExistsError(path)
    replaced = check_replaceable(path, own) if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = _mode(path)
    with held_name(path.parent, path.name) as temporary:
        temporary.mkdir(0o777 if mode is None else 0o700)
        yield temporary
        if marked:
            mark(temporary)
        if replaced is not None:
            carry_over(path, temporary, replaced)
        for file in temporary.rglob("*"):
            if file.is_symlink():
                continue
            kept = _mode(path / file.relative_to(temporary)) if mode is not None else None
            if kept is not None and file.stat().st_mode & 0o077:
                file.chmod(kept)
            sync_folder(file) if file.is_dir() else sync_file(file)
        sync_folder(temporary)
        if mode is not None:
            temporary.chmod(mode)
        _exchange(temporary, path, replaced)
    sync_folder(path.parent)


def _mode(path: Path) -> int | None:
    """Return the permission bits of what is there, None if nothing is."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return None


def _exchange(temporary: Path, path: Path, own: set[str] | None) -> None:
    """Rename `temporary` to `path`; what was there before is removed only afterwards."""
    if not path.exists():
        temporary.rename(path)
    elif _swap(temporary, path):
        remove_replaced(temporary, path, own)
    else:
        _exchange_in_two(temporary, path, own)


def _swap(one: Path, other: Path) -> bool:
    """Let two paths change places at once, with no moment between; say whether the system can (Linux)."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)) == 0)


def _exchange_in_two(temporary: Path, path: Path, own: set[str] | None) -> None:
    """Do it if the system cannot swap: killed in between, the process leaves the old folder in a `.old` beside.

    The next process that cleans the folder brings it back.
    """
    old = temporary.with_suffix(".old")
    old.mkdir(mode=0o700)
    path.rename(old / path.name)
    try:
        temporary.rename(path)
    except BaseException:
        (old / path.name).rename(path)
        raise
    else:
        remove_replaced(old / path.name, path, own)
    finally:
        with contextlib.suppress(OSError):
            old.rmdir()


def sync_file(path: Path) -> None:
    """Flush a file's content to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's names to disk, where the platform can open folders."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
