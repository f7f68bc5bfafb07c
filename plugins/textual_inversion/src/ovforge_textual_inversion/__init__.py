"""Textual inversions (Gal et al. 2022) on OpenVINO models: new words for the tokenizer and the text encoder."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import GraphTransformExtension, Phase


@hookimpl
def ovforge_graph_transforms() -> Iterator[GraphTransformExtension]:
    """New words from embedding files."""
    yield GraphTransformExtension(
        name="textual-inversion",
        summary="New words for prompts, from textual inversion files",
        config="ovforge_textual_inversion.options:TextualInversionOptions",
        factory="ovforge_textual_inversion.transform:TextualInversion",
        # Last: quantizers see the table as it was, so that a new word changes no other word, and no calibration either;
        # and there is one order with adapters, fused or not, and quantization.
        phase=Phase.LAYOUT,
        recompute=True,
    )
