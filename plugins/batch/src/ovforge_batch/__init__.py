"""Runs a pipeline on many inputs. Listing it imports no openvino."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import CommandExtension

__all__ = ["OVFORGE_API", "ovforge_commands"]

OVFORGE_API = 1


@hookimpl
def ovforge_commands() -> Iterator[CommandExtension]:
    """Yield batch."""
    yield CommandExtension(
        name="batch",
        summary="Run a pipeline on many inputs, and resume where it stopped",
        factory="ovforge_batch.command:batch",
    )
