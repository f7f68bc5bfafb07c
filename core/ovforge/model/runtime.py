"""The one place that holds OpenVINO's Core, with the tokenizers' operations registered in it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from ovforge.errors import DeviceError
from ovforge.model.regions import merge_regions

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["check_process", "core", "instruction_set", "openvino_version"]

_LIBRARY = {
    "win32": "openvino_tokenizers.dll",
    "darwin": "libopenvino_tokenizers.dylib",
}.get(sys.platform, "libopenvino_tokenizers.so")

_making = threading.Lock()
_made: list[tuple[int, ov.Core]] = []
"""The process that made the Core, and the Core."""

_uses = 0
USES_BETWEEN_MERGES = 32


def core() -> ov.Core:
    """Return the process's Core; OpenVINO shares devices and thread pools between its users.

    The tokenizers' operations are registered before anybody else has the Core: registering them while other threads
    read or compile is not safe. Raises DeviceError in a process that was forked from one with a Core.
    """
    global _uses
    with _making:
        if not _made:
            _made.append((os.getpid(), _make()))
        _uses += 1
        merge = _uses % USES_BETWEEN_MERGES == 0
    check_process()
    if merge:
        merge_regions()
    return _made[0][1]


def check_process() -> None:
    """Raise DeviceError if this process was forked after the Core was made: its threads were not, and calls hang."""
    if _made and _made[0][0] != os.getpid():
        raise DeviceError(
            "OpenVINO was started before this process was forked, and its threads are in the parent alone: a call "
            "would wait for ever",
            where=f"process {os.getpid()}, forked from {_made[0][0]}",
            hint='Load the pipeline in the child, or start children with multiprocessing.get_context("spawn").',
        )


def _make() -> ov.Core:
    import openvino as ov

    made = ov.Core()
    # OpenVINO 2026.4 pins its threads to cores, and some stay on another's, probably that of the thread that
    # started it: pipelines read from the cache ran on one of two cores, and took 1.6 to 1.9 times as long.
    made.set_property("CPU", {"ENABLE_CPU_PINNING": False})
    # The shared library alone: importing the Python package costs more and brings nothing at run time.
    found = importlib.util.find_spec("openvino_tokenizers")
    if found is not None and found.origin is not None:
        made.add_extension(str(Path(found.origin).parent / "lib" / _LIBRARY))
    return made


@functools.cache
def openvino_version() -> str:
    """Return the runtime's version from its package's metadata, without importing it."""
    from importlib.metadata import version

    return version("openvino")


@functools.cache
def instruction_set() -> str:
    """Return what names the processor's instructions, as far as the runtime may use them: compiled models hold them.

    Two machines that share a cache must not read each other's models if one of them knows more instructions.
    """
    facts = [platform.machine(), os.environ.get("ONEDNN_MAX_CPU_ISA", "")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                facts.append(line.partition(":")[2].strip())
                break
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
