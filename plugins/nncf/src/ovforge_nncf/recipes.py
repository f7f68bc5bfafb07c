"""Recipes: the options of a quantizer with other defaults, under a name of their own.

Each option can still be set; what a recipe says of itself is what is in its class.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ovforge_nncf.hybrid import HybridOptions
from ovforge_nncf.ptq_options import Preset, PtqOptions, SmoothQuant
from ovforge_nncf.scope import IgnoredScope
from ovforge_nncf.weights_options import Mode, WeightsOptions

__all__ = ["DetectorInt8", "LcmInt8", "SdInt8Hybrid", "WeightsInt4", "WeightsInt8"]


class LcmInt8(PtqOptions):
    """Latent consistency models, with the three choices of OpenVINO's article on LCM and NNCF, and two more.

    Pictures come closer without smoothing, which NNCF brings with model_type, and with the time embedding left alone: a
    search for the most sensitive layers finds its small matrices, all of which act on every place of a picture.
    """

    NAME: ClassVar[str] = "lcm-int8"
    MEMORY: ClassVar[float] = 2.0

    roles: tuple[str, ...] = Field(("unet",), description="The UNet alone: it takes nearly all of the time.")
    model_type: Literal["transformer"] | None = Field("transformer", description="Keeps sensitive parts.")
    smooth_quant: SmoothQuant | None = Field(SmoothQuant(matmul=-1), description="Alphas of SmoothQuant; off.")
    ignored_scope: IgnoredScope = Field(
        IgnoredScope(patterns=(".*time_emb",), check=False), description="What stays as it is: the time embedding."
    )
    preset: Preset | None = Field("mixed", description="Activations of SiLU and others lie unevenly around zero.")
    bias_correction: Literal["fast", "accurate", "off"] = Field("off", description="Fast correction draws artifacts.")


class SdInt8Hybrid(HybridOptions):
    """Stable Diffusion at many steps: convolutions in INT8, weights of attention in INT8."""

    NAME: ClassVar[str] = "sd-int8-hybrid"

    roles: tuple[str, ...] = Field(("unet",), description="The UNet alone: it takes nearly all of the time.")
    bias_correction: Literal["fast", "accurate", "off"] = Field("off", description="Fast correction draws artifacts.")


class WeightsInt8(WeightsOptions):
    """Half the size of float16, pictures that one cannot tell from the others; no data."""

    NAME: ClassVar[str] = "weights-int8"


class WeightsInt4(WeightsOptions):
    """A quarter of the size of float16 for matrices; no data."""

    NAME: ClassVar[str] = "weights-int4"

    mode: Mode = Field("int4_sym", description="Type of the weights; embeddings and convolutions keep 8 bits.")
    group_size: int | None = Field(64, ge=-1, description="Weights that share a scale; -1: all of an output channel.")
    group_size_fallback: Literal["error", "ignore", "adjust"] = Field(
        "adjust", description="Where group_size does not divide a row: smaller groups, as low as 32."
    )


class DetectorInt8(PtqOptions):
    """Detectors, transformers among them, and pictures of any shape.

    Without model_type NNCF quantizes sums between layers, which this runtime cannot compile in some detectors; fast
    bias correction fails where pictures, and with them inputs of matrix products, differ in shape.
    """

    NAME: ClassVar[str] = "detector-int8"

    roles: tuple[str, ...] = Field(("detector",), description="The detector, without its text encoder.")
    preset: Preset | None = Field("mixed", description="Activations of SiLU and others lie unevenly around zero.")
    model_type: Literal["transformer"] | None = Field("transformer", description="Keeps sensitive parts, smooths.")
    bias_correction: Literal["fast", "accurate", "off"] = Field("off", description="fast takes pictures of one shape.")
