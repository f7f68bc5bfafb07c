"""Measures models and pipelines, and compares them. Listing it imports no openvino."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import CommandExtension

__all__ = ["ovforge_commands"]


@hookimpl
def ovforge_commands() -> Iterator[CommandExtension]:
    """Yield benchmark, bench-diff, compare and tune."""
    yield CommandExtension(
        name="benchmark",
        summary="Measure a model or a whole pipeline, with benchmark_app's flags and more",
        factory="ovforge_benchmark.bench:benchmark",
    )
    yield CommandExtension(
        name="bench-diff",
        summary="Compare two reports, and fail if something became slower",
        factory="ovforge_benchmark.bench:bench_diff",
    )
    yield CommandExtension(
        name="compare",
        summary="Run pipelines side by side: pictures, latency, memory, size, likeness",
        factory="ovforge_benchmark.commands:compare",
    )
    yield CommandExtension(
        name="tune",
        summary="Find the fastest pipeline that still gives the same results",
        factory="ovforge_benchmark.tuning.command:tune",
    )
