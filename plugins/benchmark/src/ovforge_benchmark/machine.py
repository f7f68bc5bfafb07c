"""What the system tells of itself: the machine, and a process's memory."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ovforge
from ovforge.model import openvino_version
from ovforge_benchmark.schema import Machine

__all__ = ["cores", "machine", "meminfo", "peak_memory", "text_of"]

_TELLING = ("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512", "amx", "neon", "asimd", "sve", "bf16", "i8mm")
_CPUINFO = Path("/proc/cpuinfo")


def cores() -> int:
    """Return how many logical processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(packages: Iterable[str] = ()) -> Machine:
    """Return the facts, with the versions of `packages` that are installed beside those of ovforge and openvino."""
    info = text_of(_CPUINFO) or ""
    flags = set((_field(info, "flags") or _field(info, "Features") or "").split())
    versions = {"python": platform.python_version(), "ovforge": ovforge.__version__, "openvino": openvino_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return Machine(
        cpu=_field(info, "model name") or platform.processor() or platform.machine(),
        cores=cores(),
        physical_cores=_physical(info),
        instruction_sets=tuple(sorted(flag for flag in flags if flag.startswith(_TELLING))),
        memory=meminfo("MemTotal"),
        governor=text_of(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        system=f"{platform.system()} {platform.release()}",
        versions=versions,
    )


def peak_memory() -> int | None:
    """Return the peak resident memory of this process in bytes, or None.

    /proc tells of the program that runs now; getrusage would count what its parent had in memory before exec.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB", text_of(Path("/proc/self/status")) or "", re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _physical(info: str) -> int | None:
    pairs = set(zip(re.findall(r"physical id\s*: (\d+)", info), re.findall(r"core id\s*: (\d+)", info), strict=False))
    return len(pairs) or None


def _field(info: str, name: str) -> str | None:
    found = re.search(rf"^{name}\s*:\s*(.+)$", info, re.MULTILINE)
    return found[1].strip() if found else None


def meminfo(name: str) -> int | None:
    """Return a line of /proc/meminfo in bytes, or None."""
    found = re.search(rf"^{name}:\s+(\d+) kB", text_of(Path("/proc/meminfo")) or "", re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def text_of(path: Path) -> str | None:
    """Return a file's text without spaces around it, or None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
