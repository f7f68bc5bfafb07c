"""Temporary files and folders that say whether a living process holds them, and the removal of those that none holds.

A process that is killed cannot clean up. Each temporary name has a lock file beside it, which its maker holds locked
and the system unlocks when the maker dies: a process id would mean nothing to another container or host.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["held_name", "remove_abandoned", "scratch_folder", "scratch_parents"]

_NAME = re.compile(r"(?:\.(?P<target>.+)\.)?ovforge-[0-9a-f]{16}\.(?P<kind>tmp|old|lock)", re.DOTALL)
_LONGEST_NAME = 255
"""Bytes that a file's name may have on all common file systems."""

_SHARED_MEMORY = Path("/dev/shm")
_cleaned: set[Path] = set()
_cleaning = threading.Lock()


@contextlib.contextmanager
def held_name(parent: Path, target: str = "") -> Iterator[Path]:
    """Give an unused name in `parent` for what will become `target`, held by this process while the block runs.

    Nothing is made at the name. What still lies there when the block ends is removed. What killed processes left in
    `parent` is removed first, once for each folder and process.
    """
    from filelock import FileLock

    clean_once(parent)
    token = f"ovforge-{os.urandom(8).hex()}"
    # A long name is cut, so that a target whose own name fits can always be written.
    room = _LONGEST_NAME - len(token) - len("...lock")
    shown = os.fsdecode(os.fsencode(target)[:room])
    path = parent / f"{f'.{shown}.' if shown else ''}{token}.tmp"
    lock = FileLock(path.with_suffix(".lock"), thread_local=False)
    try:
        lock.acquire(blocking=False)
    except NotImplementedError:  # a file system without locks: nobody else can hold or remove it either
        pass
    except OSError as error:
        error.filename = str(parent / target)
        raise
    try:
        yield path
    finally:
        remove_path(path)
        _unlink(path.with_suffix(".lock"))
        lock.release()


@contextlib.contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """Give an empty folder for its owner alone, in `parent` or where temporary files go, removed when the block ends.

    If the process is killed, a later one removes it.
    """
    with held_name(parent or Path(tempfile.gettempdir())) as path:
        path.mkdir(mode=0o700)
        yield path


def scratch_parents() -> list[Path]:
    """Return the folders that scratch folders are made in: the system's temporary one, and memory if there is one."""
    return [Path(tempfile.gettempdir()), *([_SHARED_MEMORY] if _SHARED_MEMORY.is_dir() else [])]


def clean_once(folder: Path) -> None:
    """Remove what killed processes left in `folder`, unless this process has looked there before."""
    with _cleaning:
        key = folder.absolute()
        if key in _cleaned:
            return
        _cleaned.add(key)
    remove_abandoned(folder)


def remove_abandoned(folder: Path, *, recursive: bool = False) -> list[Path]:
    """Remove what killed processes left in `folder`; return it. What others own or a living process holds stays.

    A folder that was being replaced by two renames comes back if the second one did not happen.
    """
    removed = []
    for path in _left_in(folder, recursive):
        if _is_ours(path):
            with _held_if_free(path) as held:
                if held and _settle(path):
                    removed.append(path)
    return removed


def remove_path(path: Path) -> None:
    """Remove a file or a folder; a link is removed, not followed. What is not there or cannot be removed is left."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        _unlink(path)


def _left_in(folder: Path, recursive: bool) -> Iterable[Path]:
    """Yield temporary names in a folder, and lock files whose temporary is gone. Links are not followed."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    names = {entry.name for entry in entries}
    for entry in entries:
        match = _NAME.fullmatch(entry.name)
        if match:
            made = {entry.with_suffix(".tmp").name, entry.with_suffix(".old").name}
            if match["kind"] != "lock" or not made & names:
                yield entry
        elif recursive and entry.is_dir() and not entry.is_symlink():
            yield from _left_in(entry, recursive)


def _settle(path: Path) -> bool:
    """Remove a temporary that nobody holds, or bring an old folder back; say whether it is gone from its name."""
    from ovforge.store.folders import remove_replaced

    match = _NAME.fullmatch(path.name)
    assert match is not None
    if match["kind"] == "lock":
        return True  # it is removed by who holds it
    if not path.is_dir() or path.is_symlink() or match["target"] is None:
        remove_path(path)
    elif match["kind"] == "old":
        for inside in path.iterdir():
            target = path.with_name(inside.name)
            if target.exists():
                remove_replaced(inside, target)
            else:
                inside.rename(target)
        with contextlib.suppress(OSError):
            path.rmdir()
    else:
        remove_replaced(path, path.with_name(match["target"]))
    return not os.path.lexists(path)


@contextlib.contextmanager
def _held_if_free(path: Path) -> Iterator[bool]:
    """Hold a temporary's lock in the block and remove the lock file: True; False if it cannot be locked."""
    from filelock import FileLock

    lock: BaseFileLock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
    except (OSError, NotImplementedError):  # filelock's Timeout is an OSError
        yield False
        return
    try:
        yield True
    finally:
        _unlink(path.with_suffix(".lock"))
        lock.release()


def _is_ours(path: Path) -> bool:
    """Say whether this user owns it: the system's temporary folder is everybody's."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
