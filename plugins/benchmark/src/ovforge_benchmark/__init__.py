"""Measures models and pipelines, and compares them. Listing it imports no openvino."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.extensions import CommandExtension

__all__ = ["ovforge_commands"]


@hookimpl
def ovforge_commands() -> Iterator[CommandExtension]:
    """Yield compare."""
    yield CommandExtension(
        name="compare",
        summary="Run pipelines side by side: pictures, latency, memory, size, likeness",
        factory="ovforge_benchmark.commands:compare",
    )
