"""What the comparisons share: each measurement is a process of its own, and the tools take turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["child", "peak_mib", "report", "take_turns"]


def peak_mib() -> float:
    """Return the peak resident memory of this process, in MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(command: Sequence[str], cache: Path, name: str) -> dict[str, Any] | None:
    """Run a measurement; return what it prints last, as JSON, or None, with a line, where it cannot run."""
    environment = {**os.environ, "OVFORGE_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling sources anew at each start is not what users have
    os.sync()  # gigabytes that the tool before stored are not to be written in this one's time
    done = subprocess.run([*command, str(time.time())], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        print(f"{name} is left out: {said[-1] if said else f'exit code {done.returncode}'}", flush=True)
        return None
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def take_turns(
    commands: Mapping[str, Sequence[str]], scratch: Path, rounds: int, uncounted: int = 1
) -> dict[str, list[dict[str, Any]]]:
    """Run each tool's command once a round, with a cache folder of its own; the first rounds fill caches."""
    results: dict[str, list[dict[str, Any]]] = {tool: [] for tool in commands}
    for number in range(rounds + uncounted):
        for tool in list(results):
            cache = scratch / tool.replace(", ", "-").replace(" ", "-")
            measured = child([*commands[tool], str(cache)], cache, tool)
            if measured is None:
                del results[tool]
            elif number >= uncounted:
                results[tool].append(measured)
    return results


def report(results: Mapping[str, list[dict[str, Any]]], columns: Mapping[str, tuple[str, int]], base: str) -> None:
    """Print a Markdown table: medians, the range of rounds, ratios to the tool `base`.

    `columns` maps a figure to its title and its decimals.
    """
    print(f"| tool | {' | '.join(title for title, _ in columns.values())} | precision |")
    print("| --- " * (len(columns) + 2) + "|")
    for tool, rounds in results.items():
        cells = []
        for key, (_, digits) in columns.items():
            values = [measured[key] for measured in rounds]
            middle = statistics.median(values)
            spread = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else ""
            other = [measured[key] for measured in results.get(base, ())]
            ratio = f", {middle / statistics.median(other):.2f}x" if other and tool != base else ""
            cells.append(f"{middle:.{digits}f}{spread}{ratio}")
        print(f"| {tool} | {' | '.join(cells)} | {rounds[0]['precision']} |")
