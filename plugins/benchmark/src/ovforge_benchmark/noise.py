"""What disturbs a measurement: looked at before it, and watched while it runs."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from ovforge_benchmark.machine import cores, meminfo, text_of

__all__ = ["Watch", "disturbances"]

_CPUS = Path("/sys/devices/system/cpu")


def disturbances() -> list[str]:
    """Return what may disturb a measurement that begins now, in sentences."""
    found = []
    count = cores()
    if count <= 2:
        found.append(f"only {count} processors: anything else that runs takes a large part of them")
    total, available = meminfo("MemTotal"), meminfo("MemAvailable")
    if total and available and available < 0.1 * total:
        found.append(f"little memory is free: {available / 1e9:.1f} GB")
    governor = text_of(_CPUS / "cpu0/cpufreq/scaling_governor")
    if governor in ("powersave", "conservative", "ondemand", "schedutil") and not _hardware_chooses():
        found.append(f"the frequency governor is {governor!r}: the clock changes while it is measured")
    return found


class Watch:
    """Watches the system while a `with` block runs, and says afterwards what disturbed it.

    `others` is the part of all processors that other processes took, or None if the system does not tell;
    processes that the block started and waited for are its own. `energy` is what the processor packages used, in
    joules, where the system lets this user read it (RAPL).
    """

    def __enter__(self) -> Watch:
        self.others: float | None = None
        self.energy: float | None = None
        self._before = _counters()
        return self

    def __exit__(self, *_: object) -> None:
        before, after = self._before, _counters()
        self._change = {name: after[name] - before[name] for name in after if name in before}
        wall = self._change["wall"]
        self.energy = self._change.get("energy")
        if self.energy is not None and self.energy < 0:  # the counter began anew
            self.energy = None
        if "busy" in self._change and wall > 0:
            capacity = wall * (os.cpu_count() or 1)
            # The system counts in ticks of 10 ms, which a short block does not reach.
            self.others = max(self._change["busy"] - self._change["own"], 0.0) / capacity if wall > 0.2 else None

    def warnings(self) -> list[str]:
        """Return what happened, in sentences."""
        change, found = self._change, []
        if self.others is not None and self.others > 0.05:
            found.append(f"other processes took {self.others:.0%} of the processors while it was measured")
        if change.get("stolen", 0) > 0.02 * change["wall"] * (os.cpu_count() or 1):
            found.append("the host gave the processors of this virtual machine to others while it was measured")
        if change.get("swapped", 0) > 0:
            found.append("memory was swapped while it was measured")
        if change.get("throttled", 0) > 0:
            found.append("the processor got hot and slowed down while it was measured")
        clock = change.get("clock", 0.0)
        if abs(clock) > 0.1:
            found.append(f"the clock changed by {clock:+.0%} while it was measured")
        return found


def _counters() -> dict[str, float]:
    """Return counters of time (seconds) and events; `clock` is the logarithm of the mean frequency."""
    import math

    times = os.times()
    found = {"wall": time.monotonic(), "own": times.user + times.system + times.children_user + times.children_system}
    stat = re.search(r"^cpu +([\d ]+)$", text_of(Path("/proc/stat")) or "", re.MULTILINE)
    if stat:
        user, nice, system, _, _, irq, softirq, steal = (int(part) for part in stat[1].split()[:8])
        tick = os.sysconf("SC_CLK_TCK")
        found |= {"busy": (user + nice + system + irq + softirq) / tick, "stolen": steal / tick}
    moved = re.findall(r"^pswp(?:in|out) (\d+)$", text_of(Path("/proc/vmstat")) or "", re.MULTILINE)
    if moved:
        found["swapped"] = sum(map(int, moved))
    counts = [text_of(path) for path in _CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    if counts:
        found["throttled"] = sum(int(count or 0) for count in counts)
    clocks = [text_of(path) for path in _CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    if known := [int(clock) for clock in clocks if clock]:
        found["clock"] = math.log(sum(known) / len(known))
    joules = [
        text_of(path / "energy_uj") for path in Path("/sys/class/powercap").glob("*rapl:[0-9]*") if _package(path)
    ]
    if joules and all(joules):
        found["energy"] = sum(int(joule or 0) for joule in joules) / 1e6
    return found


def _package(zone: Path) -> bool:
    """Say whether a power zone is a whole processor package, not a part of one."""
    return (text_of(zone / "name") or "").startswith("package")


def _hardware_chooses() -> bool:
    """Whether frequencies are the hardware's choice, for which "powersave" is not a slow mode."""
    return text_of(_CPUS / "intel_pstate/status") == "active" or text_of(_CPUS / "amd_pstate/status") == "active"
