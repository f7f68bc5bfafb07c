"""Regions of memory, of which Linux allows a process 65,530: files that are mapped, and what OpenVINO leaves behind."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import platform
import sys
from pathlib import Path
from typing import Any

__all__ = ["MappedFile", "are_bound", "mbind", "merge_regions"]

_DEFAULT_POLICY = 0
_NUMBER = {"x86_64": 237, "aarch64": 235}.get(platform.machine()) if sys.platform == "linux" else None
"""The number of the system call mbind(2), which Python does not have."""


def merge_regions() -> None:
    """Let the system merge the regions of memory that models which are gone have left behind.

    OpenVINO 2026.4 binds constants to a NUMA node when a model runs for the first time, and the binding outlives the
    memory: a freed block cannot be merged with its neighbours. A small pipeline leaves 500 regions, and the runtime
    ends the process when it gets no more. One call takes all bindings away, in 5 ms.
    """
    if are_bound():
        mbind(0, 1 << 48, _DEFAULT_POLICY)


@functools.cache
def are_bound() -> bool:
    """Say whether memory is bound here for nothing: all of it is one node's. Several nodes keep their bindings."""
    with contextlib.suppress(OSError):
        return _NUMBER is not None and Path("/sys/devices/system/node/online").read_text().strip() == "0"
    return False


def mbind(address: int, length: int, policy: int, nodes: Any = None, bits: int = 0) -> None:
    """Set the policy of memory, as mbind(2) does; a system that forbids it has not let the runtime do it, either."""
    _libc().syscall(
        ctypes.c_long(_NUMBER or 0), ctypes.c_void_p(address), ctypes.c_ulong(length), policy, nodes,
        ctypes.c_ulong(bits), 0,
    )  # fmt: skip


class MappedFile:
    """A file that is mapped into memory until the process ends; what is written to `bytes` stays in this process.

    Python's own mmap keeps the file open, too, up to 3.12: a process may have 1,024 open files, and many more models.
    """

    bytes: memoryview

    def __init__(self, path: Path) -> None:
        """Map a file that is not empty. Raises OSError."""
        with path.open("rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            if sys.platform == "win32":
                self.bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
                return
            protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE
            self._address = _libc().mmap(None, self._size, protection, flags, file.fileno(), 0)
        if self._address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        self.bytes = memoryview((ctypes.c_ubyte * self._size).from_address(self._address)).cast("B")

    def forget(self) -> None:
        """Take the pages that were read out of memory, and those that were written to back to what the file has."""
        if sys.platform != "win32":
            _libc().madvise(self._address, self._size, mmap.MADV_DONTNEED)


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
