"""NNCF's quantizers. Listing them imports no nncf."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ovforge import hookimpl
from ovforge.contracts import Need, QuantizerExtension, RecipeExtension

__all__ = ["ovforge_quantizers"]


def _needs(options: Any) -> Need:
    """Weights are compressed without data, unless an option asks for them."""
    need: Need = options.needs
    return need


@hookimpl
def ovforge_quantizers() -> Iterator[QuantizerExtension | RecipeExtension]:
    """Yield NNCF's ways to quantize, and recipes: their options for a kind of model, under a name of their own."""
    yield QuantizerExtension(
        name="nncf-weights",
        summary="Weights in 8 bits or fewer; activations stay as they are",
        config="ovforge_nncf.weights_options:WeightsOptions",
        factory="ovforge_nncf.weights:WeightCompression",
        needs=_needs,
    )
    yield QuantizerExtension(
        name="nncf-ptq",
        summary="Weights and activations in INT8 or FP8, with ranges from recorded inputs",
        config="ovforge_nncf.ptq_options:PtqOptions",
        factory="ovforge_nncf.ptq:PostTrainingQuantization",
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
        factory="ovforge_nncf.hybrid:Hybrid",
        needs="inputs",
    )
    yield from _RECIPES


_CONDITIONS: dict[str, Any] = {"parts": ["embeddings", "modulation", "first", "last"], "check": False}
"""What the search keeps of diffusion transformers: see docs/plugins/nncf.md."""
_ACTIVATIONS = {**_CONDITIONS, "parts": [*_CONDITIONS["parts"], "linear_attention", "depthwise"]}
"""Likewise where activations have 8 bits, too."""
_FOUR_BITS = {"mode": "int4_sym", "group_size": 64, "group_size_fallback": "adjust"}

_TRANSFORMERS = (
    RecipeExtension(
        name="transformer-int8",
        summary="Recipe: diffusion transformers, weights in INT8, no data",
        quantizer="nncf-weights",
        options={"roles": ["transformer"]},
        tunings=({},),
    ),
    # The last layer is among those that keep 8 bits, so that all_layers has no other layer keep them in its place.
    RecipeExtension(
        name="transformer-int4",
        summary="Recipe: diffusion transformers, weights in INT4; modulation and embeddings in INT8; no data",
        quantizer="nncf-weights",
        options={"roles": ["transformer"], **_FOUR_BITS, "all_layers": True, "backup_scope": _CONDITIONS},
        tunings=({},),
    ),
    RecipeExtension(
        name="transformer-ptq",
        summary="Recipe: diffusion transformers in INT8; what conditions them, or needs more than 8 bits, stays exact",
        quantizer="nncf-ptq",
        options={
            "roles": ["transformer"],
            "model_type": "transformer",
            "preset": "mixed",
            "bias_correction": "off",
            "ignored_scope": _ACTIVATIONS,
        },
        tunings=({},),
    ),
    RecipeExtension(
        name="text-encoders-int8",
        summary="Recipe: all text encoders, weights in INT8, no data",
        quantizer="nncf-weights",
        options={"roles": ["text_encoder*"]},
        tunings=({},),
    ),
    RecipeExtension(
        name="text-encoders-int4",
        summary="Recipe: all text encoders, weights of matrices in INT4, embeddings in INT8, no data",
        quantizer="nncf-weights",
        options={"roles": ["text_encoder*"], **_FOUR_BITS},
        tunings=({},),
    ),
)

_RECIPES = (
    # Fast bias correction draws artifacts into pictures. Stable Diffusion takes many steps, nearly all in the UNet.
    RecipeExtension(
        name="sd-int8-hybrid",
        summary="Recipe: Stable Diffusion, UNet by nncf-hybrid",
        quantizer="nncf-hybrid",
        options={"roles": ["unet"], "bias_correction": "off"},
        tunings=({},),
    ),
    # NNCF's own defaults: without bias correction and with preset mixed, the embedded model's pictures are further off.
    RecipeExtension(
        name="vae-int8",
        summary="Recipe: the decoder of pictures in INT8",
        quantizer="nncf-ptq",
        options={"roles": ["vae_decoder"]},
        tunings=({},),
    ),
    RecipeExtension(
        name="weights-int8",
        summary="Recipe: all weights in INT8, no data",
        quantizer="nncf-weights",
        options={},
        tunings=({},),
    ),
    # Embeddings and convolutions keep 8 bits; where 64 does not divide a row, groups are smaller, as low as 32.
    RecipeExtension(
        name="weights-int4",
        summary="Recipe: weights of matrices in INT4, the rest in INT8, no data",
        quantizer="nncf-weights",
        options=_FOUR_BITS,
        tunings=({},),
    ),
    *_TRANSFORMERS,
    # Without model_type NNCF quantizes sums between layers, which this runtime cannot compile in some detectors; fast
    # bias correction fails where pictures, and with them inputs of matrix products, differ in shape.
    RecipeExtension(
        name="detector-int8",
        summary="Recipe: detectors in INT8",
        quantizer="nncf-ptq",
        options={"roles": ["detector"], "preset": "mixed", "model_type": "transformer", "bias_correction": "off"},
        tunings=({},),
    ),
)
