"""What a model of the Stable Diffusion family is, read from its configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ovforge.config import checked
from ovforge.contracts import CompiledModels
from ovforge.errors import ModelError
from ovforge.store import parse_object
from ovforge_diffusion.damage import explained

__all__ = ["CONTROLNETS", "PREVIEW", "Family", "Scale"]

PREVIEW = "preview_decoder"
"""Role of a small decoder, such as TAESD's, that makes the previews."""

CONTROLNETS = ("controlnet", "controlnet_1", "controlnet_2", "controlnet_3")


@dataclass(frozen=True)
class Scale:
    """How an autoencoder's latents become the UNet's: less a shift or a mean, times a factor, through a deviation."""

    factor: float
    shift: float
    mean: tuple[float, ...] | None
    deviation: tuple[float, ...] | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Scale:
        """Read an autoencoder's config.json. Defaults are those of its class."""
        tiny = config.get("_class_name") == "AutoencoderTiny"
        return cls(
            factor=float(config.get("scaling_factor", 1.0 if tiny else 0.18215)),
            shift=float(config.get("shift_factor") or 0.0),
            mean=_numbers(config.get("latents_mean")),
            deviation=_numbers(config.get("latents_std")),
        )


@dataclass(frozen=True)
class Family:
    """Facts that the tasks go by. Sizes are those of latents where nothing else is said."""

    channels: int
    """Of the UNet's input: 4, or 9 where it also takes a mask and the latents of a masked picture."""

    latent_channels: int
    factor: int
    """Pixels for each latent."""

    grid: int
    """Pixels that the UNet's own levels want, for models that were converted without free sizes."""

    size: int
    """Pixels a side of the pictures that the model was trained on."""

    context: int | None
    """Width of text states."""

    guidance_width: int | None
    """Width of the embedding of a guidance scale, for UNets that have their guidance built in."""

    time_ids: int
    """Numbers that tell SDXL of sizes: 6, or 5 with an aesthetic score; 0 for other models."""

    zero_negative: bool
    """Whether no negative prompt means zeros, rather than the states of an empty one."""

    encoders: tuple[str, ...]
    controlnets: tuple[str, ...]
    encoding: Scale
    decoding: Scale
    previewing: Scale | None
    """Of the decoder for previews; None if there is none of its own."""

    train_timesteps: int
    defaults: Mapping[str, Any]

    @classmethod
    @explained
    def of(cls, bundle: CompiledModels) -> Family:
        """Read the configs. Raises ModelError for a model that is no such one."""
        unet, vae = bundle.configs.get("unet", {}), bundle.configs.get("vae_decoder", {})
        levels = len(vae.get("block_out_channels") or vae.get("decoder_block_out_channels") or (0,) * 4)
        factor = 2 ** (levels - 1)
        if isinstance(size := unet.get("sample_size", 64), list | tuple):
            size = max(size)
        xl = unet.get("addition_embed_type") == "text_time"
        latent = int(vae.get("latent_channels", 4))
        channels = int(unet.get("in_channels", 4))
        if channels not in (latent, 2 * latent + 1):
            raise ModelError(
                f"a UNet with {channels} input channels does not fit latents of {latent} channels",
                where="unet/config.json",
                hint=f"Expected {latent}, or {2 * latent + 1} for inpainting.",
            )
        aesthetic = bool(bundle.index.get("requires_aesthetics_score", False))
        encoders = tuple(role for role in ("text_encoder", "text_encoder_2") if role in bundle)
        if not encoders:
            raise ModelError(
                "the model has no text encoder",
                where="text_encoder",
                hint="Bring one, with its tokenizer, by [load.parts]: text_encoder = FOLDER and tokenizer = FOLDER, "
                "where FOLDER is a converted model of the same family.",
            )
        width = unet.get("cross_attention_dim")
        return cls(
            channels=channels,
            latent_channels=latent,
            factor=factor,
            grid=factor * 2 ** (len(unet.get("block_out_channels", (0,) * 4)) - 1),
            size=int(size) * factor,
            context=width if isinstance(width, int) else None,
            guidance_width=unet.get("time_cond_proj_dim"),
            time_ids=(5 if aesthetic else 6) if xl else 0,
            zero_negative=xl and bool(bundle.index.get("force_zeros_for_empty_prompt", True)),
            encoders=encoders,
            controlnets=tuple(role for role in CONTROLNETS if role in bundle),
            encoding=Scale.of(bundle.configs.get("vae_encoder", vae)),
            decoding=Scale.of(vae),
            previewing=Scale.of(bundle.configs.get(PREVIEW, {})) if PREVIEW in bundle else None,
            train_timesteps=int(bundle.scheduler_config().get("num_train_timesteps", 1000)),
            defaults=_defaults(bundle, xl),
        )

    @property
    def masked(self) -> bool:
        """Whether the UNet takes a mask and a masked picture."""
        return self.channels != self.latent_channels


class _Own(BaseModel):
    """What a model may say of itself in ovforge.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int = Field(50, ge=1, le=100_000)
    guidance_scale: float = Field(7.5, ge=0)


def _numbers(value: Any) -> tuple[float, ...] | None:
    return tuple(float(number) for number in value) if value else None


def _defaults(bundle: CompiledModels, xl: bool) -> dict[str, Any]:
    """Return the model's own defaults (ovforge.json beside model_index.json) over diffusers'."""
    defaults = {"steps": 50, "guidance_scale": 5.0 if xl else 7.5}
    own = parse_object(bundle.assets.get("ovforge.json", b"{}"), "ovforge.json").get("defaults", {})
    return {**defaults, **checked(_Own, own, where="ovforge.json: defaults").model_dump(exclude_unset=True)}
