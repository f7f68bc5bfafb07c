"""GroundingDINO: detection by text. Listing it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import CommandExtension, LoaderExtension

__all__ = ["EMBEDDED_MODEL", "ovforge_commands", "ovforge_loaders"]

EMBEDDED_MODEL = "package:ovforge_grounding_dino/model"
"""What a config's `load.source` says for the small detector that ships: it knows things drawn as emoji."""


@hookimpl
def ovforge_loaders() -> Iterator[LoaderExtension]:
    """Yield the converting loader; the task is `detect`, of ovforge-detection."""
    yield LoaderExtension(
        name="grounding-dino",
        summary="Convert GroundingDINO, or MM-GroundingDINO: a transformers folder, or the original checkpoints",
        config="ovforge_grounding_dino.options:LoaderOptions",
        factory="ovforge_grounding_dino.loader:GroundingDinoLoader",
        converts=True,
    )


@hookimpl
def ovforge_commands() -> Iterator[CommandExtension]:
    """Yield the embedded detector in one command."""
    yield CommandExtension(
        name="grounding-dino",
        summary="Find things with the embedded detector, by text",
        factory="ovforge_grounding_dino.command:grounding_dino",
    )
