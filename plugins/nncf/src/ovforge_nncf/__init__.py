"""NNCF's quantizers. Listing them imports no nncf."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ovforge import hookimpl
from ovforge.contracts import Need, QuantizerExtension

__all__ = ["ovforge_quantizers"]

_WEIGHTS = "ovforge_nncf.weights:WeightCompression"
_PTQ = "ovforge_nncf.ptq:PostTrainingQuantization"
_HYBRID = "ovforge_nncf.hybrid:Hybrid"


def _needs(options: Any) -> Need:
    """Weights are compressed without data, unless an option asks for them."""
    need: Need = options.needs
    return need


@hookimpl
def ovforge_quantizers() -> Iterator[QuantizerExtension]:
    """Yield NNCF's ways to quantize."""
    yield QuantizerExtension(
        name="nncf-weights",
        summary="Weights in 8 bits or fewer; activations stay as they are",
        config="ovforge_nncf.weights_options:WeightsOptions",
        factory=_WEIGHTS,
        needs=_needs,
    )
    yield QuantizerExtension(
        name="nncf-ptq",
        summary="Weights and activations in INT8 or FP8, with ranges from recorded inputs",
        config="ovforge_nncf.ptq_options:PtqOptions",
        factory=_PTQ,
        needs="inputs",
    )
    yield QuantizerExtension(
        name="nncf-accuracy",
        summary="INT8 that gives operations back until the pipeline's score is within max_drop",
        config="ovforge_nncf.accuracy:AccuracyOptions",
        factory="ovforge_nncf.accuracy:AccuracyControl",
        needs="score",
    )
    yield QuantizerExtension(
        name="nncf-hybrid",
        summary="Convolutions in INT8, weights of matrix products compressed: for UNets",
        config="ovforge_nncf.hybrid:HybridOptions",
        factory=_HYBRID,
        needs="inputs",
    )
    yield from _recipes()


def _recipes() -> Iterator[QuantizerExtension]:
    for name, summary, options, factory in (
        ("lcm-int8", "Recipe: latent consistency models, UNet in INT8", "LcmInt8", _PTQ),
        ("sd-int8-hybrid", "Recipe: Stable Diffusion, UNet by nncf-hybrid", "SdInt8Hybrid", _HYBRID),
        ("weights-int8", "Recipe: all weights in INT8, no data", "WeightsInt8", _WEIGHTS),
        ("weights-int4", "Recipe: weights of matrices in INT4, the rest in INT8, no data", "WeightsInt4", _WEIGHTS),
        ("detector-int8", "Recipe: detectors in INT8", "DetectorInt8", _PTQ),
    ):
        needs: Any = _needs if factory is _WEIGHTS else "inputs"
        config = f"ovforge_nncf.recipes:{options}"
        yield QuantizerExtension(name=name, summary=summary, config=config, factory=factory, needs=needs)
