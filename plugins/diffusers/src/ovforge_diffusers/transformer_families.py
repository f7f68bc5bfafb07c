"""Families of diffusion transformers: what stands beside each in its pipeline. Facts of the published models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ovforge_diffusers.components import CLIP

__all__ = ["FAMILIES", "Family", "stored_as"]

_PIPELINE = "Pipeline"
_FLUX_LATENTS = (0.3611, 0.1159)


@dataclass(frozen=True, slots=True)
class Family:
    """A transformer's pipeline: its class, the text encoders by their roles, and factor and shift of its latents.

    `latents` is None if the autoencoder's class or its weights tell that.
    """

    pipeline: str
    encoders: Mapping[str, str]
    latents: tuple[float, float] | None = None

    def has(self, pipeline: object) -> bool:
        """Say whether another pipeline's class is of this family: FluxKontextPipeline of FluxPipeline's."""
        return str(pipeline).startswith(self.pipeline.removesuffix(_PIPELINE))


FAMILIES = {
    "FluxTransformer2DModel": Family(
        "FluxPipeline", {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}, _FLUX_LATENTS
    ),
    "SD3Transformer2DModel": Family(
        "StableDiffusion3Pipeline",
        {"text_encoder": CLIP, "text_encoder_2": CLIP, "text_encoder_3": "T5EncoderModel"},
        (1.5305, 0.0609),
    ),
    "QwenImageTransformer2DModel": Family("QwenImagePipeline", {"text_encoder": "Qwen2_5_VLForConditionalGeneration"}),
    "Flux2Transformer2DModel": Family("Flux2KleinPipeline", {"text_encoder": "Qwen3ForCausalLM"}),
    "ZImageTransformer2DModel": Family("ZImagePipeline", {"text_encoder": "Qwen3Model"}, _FLUX_LATENTS),
    "LTXVideoTransformer3DModel": Family("LTXPipeline", {"text_encoder": "T5EncoderModel"}),
    "Lumina2Transformer2DModel": Family("Lumina2Pipeline", {"text_encoder": "Gemma2Model"}, _FLUX_LATENTS),
}
"""Class of a transformer -> its family."""


def stored_as(kind: str) -> str:
    """Return the class whose weights a text encoder has in a file: some classes use a part of another's."""
    return {"CLIPTextModel": CLIP, "Qwen3ForCausalLM": "Qwen3Model"}.get(kind, kind)
