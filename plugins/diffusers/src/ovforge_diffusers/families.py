"""What is known of the Stable Diffusion families besides shapes: facts of the published models' configs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ovforge_diffusers.header import Header, Part

__all__ = ["Family", "identify"]

# Steps of training that `global_step` says: 875000 is Stable Diffusion 2.0 base (as diffusers goes by).
_BASE_STEPS = 875000
_V = frozenset({"v", "v_prediction", "v-prediction", "vpred"})


@dataclass(frozen=True, slots=True)
class Family:
    """A family, and the variety of it. `name` is sd1, sd2, xl or refiner; `sure` whether prediction is known.

    `marked` says that the file itself says its prediction, by a mark or in its metadata.
    """

    name: str
    inpainting: bool = False
    consistency: bool = False
    prediction: str = "epsilon"
    zero_snr: bool = False
    sure: bool = True
    marked: bool = False

    @property
    def xl(self) -> bool:
        """Whether it is SDXL, base or refiner."""
        return self.name in ("xl", "refiner")

    @property
    def size(self) -> int:
        """Pixels a side of the pictures that it was trained on."""
        if self.xl:
            return 1024
        return 768 if self.name == "sd2" and self.prediction == "v_prediction" else 512

    @property
    def scaling_factor(self) -> float:
        """Factor of latents, from the autoencoder's to the UNet's."""
        return 0.13025 if self.xl else 0.18215

    def pad(self, component: str) -> str:
        """Return the word that a tokenizer fills up with: OpenCLIP's number 0, CLIP's end."""
        return "!" if component == "tokenizer_2" or self.name == "sd2" else "<|endoftext|>"

    def scheduler(self) -> dict[str, Any]:
        """Return scheduler_config.json: the class and the noise schedule of the published model."""
        config: dict[str, Any] = {
            "_class_name": self._sampler(),
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
            "prediction_type": self.prediction,
            # Not the class's own: for another one that a user puts in its place, as in the published configs.
            "clip_sample": False,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "timestep_spacing": "leading",
        }
        if self.consistency:
            config |= {"set_alpha_to_one": True, "steps_offset": 0, "original_inference_steps": 50}
        return config | self.marks()

    def marks(self) -> dict[str, Any]:
        """Return what the checkpoint itself says of the noise it was trained on, as options of a scheduler."""
        prediction: dict[str, Any] = {"prediction_type": self.prediction} if self.marked else {}
        if self.zero_snr:
            prediction |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return prediction

    def _sampler(self) -> str:
        if self.consistency:
            return "LCMScheduler"
        if self.xl:
            return "EulerDiscreteScheduler"
        return "DDIMScheduler" if self.zero_snr or self.prediction == "v_prediction" else "PNDMScheduler"

    def index(self, kinds: Mapping[str, str]) -> dict[str, Any]:
        """Return model_index.json for models of these classes, with a scheduler and tokenizers."""
        libraries = {"CLIPTextModel": "transformers", "CLIPTextModelWithProjection": "transformers"}
        index: dict[str, Any] = {
            "_class_name": self._pipeline(kinds),
            "scheduler": ["diffusers", self._sampler()],
            **{component: [libraries.get(kind, "diffusers"), kind] for component, kind in kinds.items()},
            **{
                component.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"]
                for component in kinds
                if component.startswith("text_encoder")
            },
        }
        if self.name == "refiner":
            index |= {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
        if self.xl:
            return index | {"force_zeros_for_empty_prompt": self.name == "xl"}
        none = {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
        return index | none | {"requires_safety_checker": False}

    def _pipeline(self, kinds: Mapping[str, str]) -> str:
        stem = "StableDiffusionXL" if self.xl else "StableDiffusion"
        if "controlnet" in kinds:
            return f"{stem}ControlNetPipeline"
        if self.inpainting:
            return f"{stem}InpaintPipeline"
        if self.name == "refiner":
            return f"{stem}Img2ImgPipeline"
        return "LatentConsistencyModelPipeline" if self.consistency and not self.xl else f"{stem}Pipeline"


def identify(parts: Mapping[str, Part], header: Header, name: str, steps: int | None) -> Family:
    """Find out the family of a checkpoint. `name` is the file's, `steps` its global_step where it has one."""
    unet = parts.get("unet")
    own = unet.strip(header.shapes) if unet else {}
    first = own.get("input_blocks.0.0.weight", own.get("conv_in.weight", (0, 4)))
    family = Family(
        _name(parts, header, name),
        inpainting=first[1] == 9,
        consistency=bool({"time_embed.cond_proj.weight", "time_embedding.cond_proj.weight"} & own.keys()),
        zero_snr="ztsnr" in header.shapes,
    )
    prediction = header.metadata.get("modelspec.prediction_type", "").lower()
    if prediction in _V or "v_pred" in header.shapes:
        return replace(family, prediction="v_prediction", marked=True)
    if prediction == "epsilon":
        return replace(family, marked=True)
    if family.name != "sd2" or family.inpainting or steps == _BASE_STEPS:
        return family
    # 2.0 and 2.1 for 768 pixels predict v, their bases for 512 epsilon, and nothing in the file says which it is.
    return replace(family, prediction="v_prediction", sure="unet" not in parts)


def _name(parts: Mapping[str, Part], header: Header, file: str) -> str:
    if "text_encoder_2" in parts:
        return "xl" if "text_encoder" in parts else "refiner"
    if text := parts.get("text_encoder"):
        return "sd2" if text.naming == "open_clip" else "sd1"
    for part in (parts[component] for component in ("unet", "controlnet") if component in parts):
        own = part.strip(header.shapes)
        original = part.naming == "original"
        if ("label_emb.0.0.weight" if original else "add_embedding.linear_1.weight") in own:
            # Alone, a refiner is known by its first level.
            first = own.get("input_blocks.0.0.weight", own.get("conv_in.weight", ()))
            return "refiner" if first[:1] == (384,) else "xl"
        projection = "middle_block.1.proj_in.weight" if original else "mid_block.attentions.0.proj_in.weight"
        return "sd2" if len(own.get(projection, ())) == 2 else "sd1"
    description = (
        f"{file} {header.metadata.get('modelspec.architecture', '')} {header.metadata.get('modelspec.title', '')}"
    )
    return "xl" if re.search(r"xl|stable-diffusion-xl", description.lower()) else "sd1"
