"""Memory for what is decrypted: large pages, and files that exist in memory alone.

The files are for readers and writers that take nothing but paths: a folder of links whose targets are anonymous files
(memfd), which have no name in any file system, are never written to a disk, and are gone with the process. Only Linux
has them.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ovforge.errors import ModelError
from ovforge.store.temporary import scratch_folder

if TYPE_CHECKING:
    from ovforge.model.sources import Source

__all__ = ["AVAILABLE", "MemoryFolder", "large_pages", "memory_folder", "temporary_files"]

AVAILABLE = hasattr(os, "memfd_create")

_SHARED_MEMORY = Path("/dev/shm")
"""If there is a file system in memory, even the links are kept off the disk."""


_LARGE_PAGE = 2**21


def large_pages(address: int, size: int) -> None:
    """Ask the system to back memory by large pages when it is first written; where it has none, nothing happens.

    A model's gigabytes then take hundreds of page faults instead of hundreds of thousands.
    """
    begin = -(-address // _LARGE_PAGE) * _LARGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE") and (whole := (address + size - begin) // _LARGE_PAGE) > 0:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(whole * _LARGE_PAGE), ctypes.c_int(mmap.MADV_HUGEPAGE)
        )


class MemoryFolder:
    """A folder at `root` in which files are links into memory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._handles: dict[str, int] = {}

    def place(self, path: str) -> Path:
        """Make an empty file that somebody may write to by its path."""
        handle = os.memfd_create("ovforge", os.MFD_CLOEXEC)
        self._handles[path] = handle
        link = self.root / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"/proc/{os.getpid()}/fd/{handle}")
        return link

    def put(self, source: Source, path: str) -> None:
        """Copy a source's file, straight into the memory that is read from."""
        self.place(path)
        if size := source.files()[path]:
            handle = self._handles[path]
            os.ftruncate(handle, size)
            with mmap.mmap(handle, size) as mapped, memoryview(mapped) as view:
                source.read_into(path, view)

    @contextlib.contextmanager
    def content(self, path: str) -> Iterator[memoryview]:
        """Give what was written to a file."""
        handle = self._handles[path]
        if not (size := os.fstat(handle).st_size):
            yield memoryview(b"")
            return
        with mmap.mmap(handle, size, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
            yield view

    def close(self) -> None:
        """Forget all files; what readers have mapped stays theirs."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


@contextlib.contextmanager
def memory_folder(purpose: str) -> Iterator[MemoryFolder]:
    """Give an empty MemoryFolder. Raises ModelError, which names `purpose`, where the system has no such files."""
    if not AVAILABLE:
        raise ModelError(
            f"{purpose} takes plain files, and this system has none that are in memory alone",
            hint="Run it on Linux, or convert the model to OpenVINO IR before it is encrypted.",
        )
    with scratch_folder(_SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None) as root:
        folder = MemoryFolder(root)
        try:
            yield folder
        finally:
            folder.close()


_temporary = threading.RLock()


@contextlib.contextmanager
def temporary_files(purpose: str) -> Iterator[None]:
    """Let Python's temporary files lie in memory, for libraries that write what they were given there.

    One thread at a time. Raises ModelError, which names `purpose`, where the system has no file system in memory.
    """
    if not os.access(_SHARED_MEMORY, os.W_OK):
        raise ModelError(
            f"{purpose} writes temporary files, and {_SHARED_MEMORY}, which keeps them in memory, is not there",
            hint="Run it on Linux, or convert the model to OpenVINO IR before it is encrypted.",
        )
    with _temporary, scratch_folder(_SHARED_MEMORY) as folder:
        before, tempfile.tempdir = tempfile.tempdir, str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = before
