"""NNCF's quantizers. Listing them imports no nncf."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.extensions import QuantizerExtension

__all__ = ["ovforge_quantizers"]


@hookimpl
def ovforge_quantizers() -> Iterator[QuantizerExtension]:
    """Yield NNCF's ways to quantize."""
    yield QuantizerExtension(
        name="nncf-weights",
        summary="Weights in 8 bits or fewer; activations stay as they are",
        config="ovforge_nncf.weights_options:WeightsOptions",
        factory="ovforge_nncf.weights:WeightCompression",
        needs=lambda options: options.needs,
    )
    yield QuantizerExtension(
        name="nncf-ptq",
        summary="Weights and activations in INT8 or FP8, with ranges from recorded inputs",
        config="ovforge_nncf.ptq_options:PtqOptions",
        factory="ovforge_nncf.ptq:PostTrainingQuantization",
        needs="inputs",
    )
