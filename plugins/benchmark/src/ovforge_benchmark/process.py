"""Measurements in a process of their own, so that one's memory and caches are not another's."""

from __future__ import annotations

import json
import pickle
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ovforge.errors
from ovforge.errors import ModelError, OvforgeError, PluginError
from ovforge.model import Result
from ovforge.store import run_python, scratch_folder

__all__ = ["answer", "hand_over", "in_process", "take_over"]


def in_process(job: Mapping[str, Any], name: str, *, timeout: float | None = None) -> dict[str, Any]:
    """Have `ovforge_benchmark.worker` do a job; return its answer. Raises the OvforgeError that ended it.

    `name` says in errors whose job it is. After `timeout` seconds it is ended, and subprocess.TimeoutExpired is raised.
    """
    with scratch_folder() as scratch:
        # An answer in a file: libraries write what they like to standard output.
        target = scratch / "answer.json"
        done = run_python(
            ["-m", "ovforge_benchmark.worker", str(target)],
            input=json.dumps(job, default=str),
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=timeout,
        )
        answered: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    if "error" in answered:
        error = answered["error"]
        kind = getattr(ovforge.errors, error["kind"], OvforgeError)
        where = f"{name}: {error['where']}" if error["where"] else name
        raise kind(error["what"], where=where, hint=error["hint"])
    if done.returncode or not answered:
        output = done.stderr.strip().splitlines()
        killed = done.returncode < 0
        raise ModelError(
            f"its process was ended by signal {-done.returncode}" if killed else f"its process failed: {output[-1:]}",
            where=name,
            hint="Signal 9 is mostly the system's when memory is used up." if killed else "\n  ".join(output[-8:]),
        )
    return answered


def answer(target: Path, value: Mapping[str, Any] | OvforgeError) -> None:
    """Write a worker's answer: what it measured, or the error that ended it."""
    if isinstance(value, OvforgeError):
        value = {"error": {"kind": type(value).__name__, "what": value.what, "where": value.where, "hint": value.hint}}
    target.write_text(json.dumps(value, default=str))


def hand_over(results: Sequence[Result], target: Path) -> None:
    """Write results for the process that asked for them, which compares them by their own measures.

    Raises PluginError for a result that cannot be pickled.
    """
    try:
        data = pickle.dumps([result.compact() for result in results])
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        kinds = ", ".join(sorted({type(result).__name__ for result in results}))
        raise PluginError(
            f"a result cannot be handed to another process: {error}", where=kinds,
            hint="Its class should be at the top of a module, and hold what pickle can write.",
        ) from error  # fmt: skip
    target.write_bytes(data)


def take_over(source: Path) -> list[Result]:
    """Return what `hand_over` wrote. Only for a file in a folder of our own, written by a process that we started."""
    results: list[Result] = pickle.loads(source.read_bytes())
    return results
