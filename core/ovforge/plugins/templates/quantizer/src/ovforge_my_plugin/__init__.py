"""my-plugin: what this plugin offers to ovforge. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import QuantizerExtension

OVFORGE_API = 1
"""The version of ovforge's plugin API that this is written for; an ovforge with another one says so and goes on."""


@hookimpl
def ovforge_quantizers() -> Iterator[QuantizerExtension]:
    """Describe the quantizer. It looks at weights alone, so it needs no recorded inputs and no score."""
    yield QuantizerExtension(
        name="my-plugin",
        summary="Weights of matrix products in eight bits, with a scale for each output",
        config="ovforge_my_plugin.quantizer:Options",
        factory="ovforge_my_plugin.quantizer:Quantizer",
        needs="nothing",
    )
