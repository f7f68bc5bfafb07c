"""NNCF's compression of weights. Listing it imports no nncf."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.extensions import QuantizerExtension

__all__ = ["ovforge_quantizers"]


@hookimpl
def ovforge_quantizers() -> Iterator[QuantizerExtension]:
    """Yield the compression of weights."""
    yield QuantizerExtension(
        name="nncf-weights",
        summary="Weights in 8 or 4 bits; activations stay as they are",
        config="ovforge_nncf.weights:WeightsOptions",
        factory="ovforge_nncf.weights:WeightCompression",
    )
