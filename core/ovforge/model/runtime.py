"""The one place that holds OpenVINO's Core, with the tokenizers' operations registered in it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ovforge.errors import ModelError

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["core", "enable_tokenizers", "instruction_set", "openvino_version"]

_LIBRARY = {
    "win32": "openvino_tokenizers.dll",
    "darwin": "libopenvino_tokenizers.dylib",
}.get(sys.platform, "libopenvino_tokenizers.so")


@functools.cache
def core() -> ov.Core:
    """Return the process's Core; OpenVINO shares devices and thread pools between its users."""
    import openvino as ov

    return ov.Core()


@functools.cache
def enable_tokenizers() -> None:
    """Register the tokenizers' operations in the Core.

    Loads the shared library alone: importing the Python package costs more and brings nothing at run time.
    """
    found = importlib.util.find_spec("openvino_tokenizers")
    if found is None or found.origin is None:
        raise ModelError("a tokenizer model needs openvino-tokenizers", hint="Run: pip install openvino-tokenizers")
    core().add_extension(str(Path(found.origin).parent / "lib" / _LIBRARY))


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
