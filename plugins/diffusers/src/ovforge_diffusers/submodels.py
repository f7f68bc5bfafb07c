"""What each submodel takes and gives: names, types and layouts of optimum-intel's export (version 2.2).

text_encoder   input_ids i64 [batch, tokens] -> last_hidden_state, pooler_output (, hidden_states.0, ...)
               with projection: text_embeds, last_hidden_state (, hidden_states.0, ...)
unet           sample f32 [batch, channels, height, width], timestep i64 [1 or batch],
               encoder_hidden_states f32 [batch, tokens, width] (, timestep_cond f32 [batch, width])
               (, text_embeds f32 [batch, width], time_ids f32 [batch, 5 or 6]) -> out_sample
controlnet     the UNet's inputs but timestep_cond, controlnet_cond f32 [batch, 3, height * 8, width * 8] from 0 to 1
               -> down_block_res_sample_0, ..., mid_block_res_sample, not scaled (names of OpenVINO's notebooks)
vae_encoder    sample f32 [batch, 3, height, width] -> latent_parameters (mean and log variance, stacked; of the tiny
               autoencoder TAESD the latents themselves)
vae_decoder    latent_sample f32 [batch, channels, height, width] -> sample
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ovforge.errors import ConfigError, ModelError
from ovforge_convert import Port
from ovforge_diffusers.options import LoaderOptions

Timestep = Literal["f32", "i64"]

__all__ = ["Submodel", "describe"]


@dataclass(frozen=True, slots=True)
class Submodel:
    """How a torch module becomes a role: what is traced, its inputs in order, its outputs' names."""

    forward: Callable[..., tuple[Any, ...]]
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    runtime_options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class _Picture:
    """Sizes shared by the submodels; None is any."""

    batch: int | None
    height: int | None
    width: int | None


def describe(
    role: str, module: Any, options: LoaderOptions, index: dict[str, Any], context: dict[str, Any]
) -> Submodel:
    """Describe a role of a torch module.

    `context` has what belongs to other components: vae_factor, tokens (or None), prediction_type.
    Raises ModelError for a variety of the class that is not supported, ConfigError for a size that cannot be.
    """
    factor = context["vae_factor"]
    _check_size(options, factor)
    if role.startswith("text_encoder"):
        return _text_encoder(module, hidden_states=_is_xl(index) or module.config.output_hidden_states)
    latent = _Picture(
        options.batch, options.height and options.height // factor, options.width and options.width // factor
    )
    if role == "unet":
        return _unet(module, latent, options.timestep, context["tokens"], index)
    if role.startswith("controlnet"):
        return _controlnet(module, latent, options.timestep, context["tokens"], index)
    scale = _activation_scale(module, index, context)
    if role == "vae_decoder":
        return _vae_decoder(module, latent, scale)
    return _vae_encoder(module, _Picture(options.batch, options.height, options.width), factor, scale)


def _is_xl(index: dict[str, Any]) -> bool:
    """Two text encoders: the UNet takes their last but one hidden state."""
    return (index.get("text_encoder_2") or [None])[0] is not None


def _check_size(options: LoaderOptions, factor: int) -> None:
    for name in ("height", "width"):
        size = getattr(options, name)
        if size is not None and size % factor:
            near = max(factor, round(size / factor) * factor)
            raise ConfigError(
                f"{size} is not a multiple of the autoencoder's factor {factor}",
                where=f"load.options.{name}",
                hint=f"Nearest: {near}.",
            )


def _activation_scale(module: Any, index: dict[str, Any], context: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the hint by which devices computing in float16 keep the VAE from overflowing, as in optimum-intel."""
    pipeline = str(index.get("_class_name", ""))
    if _is_xl(index) and module.config.get("force_upcast"):
        return (("ACTIVATIONS_SCALE_FACTOR", "128.0"),)
    plain = pipeline.startswith("StableDiffusion") and not pipeline.startswith("StableDiffusion3")
    if plain and context["prediction_type"] == "v_prediction":
        return (("ACTIVATIONS_SCALE_FACTOR", "8.0"),)
    return ()


def _text_encoder(module: Any, hidden_states: bool) -> Submodel:
    first = ("text_embeds", "last_hidden_state")
    if not hasattr(module, "text_projection"):
        first = ("last_hidden_state", "pooler_output")
    layers = tuple(f"hidden_states.{i}" for i in range(module.config.num_hidden_layers + 1))
    run = type(module).forward

    def forward(input_ids: Any) -> tuple[Any, ...]:
        result = run(module, input_ids, output_hidden_states=hidden_states, return_dict=True)
        named = tuple(result[name] for name in first)
        return (*named, *result.hidden_states) if hidden_states else named

    tokens = module.config.max_position_embeddings
    return Submodel(
        forward,
        (Port("input_ids", (None, None), (2, tokens), "i64"),),
        first + (layers if hidden_states else ()),
    )


def _unet(module: Any, latent: _Picture, timestep: Timestep, tokens: int | None, index: dict[str, Any]) -> Submodel:
    config = module.config
    _check_conditions(config, "UNet")
    guided = config.time_cond_proj_dim is not None
    # An example that no down-sampling divides makes diffusers trace the general path, which passes each skip
    # connection's size to the up-sampling: the graph then takes every size, not only multiples of 2**levels.
    odd = 2 ** len(config.block_out_channels) + 1
    inputs, rows = _conditions(config, latent, timestep, tokens, index, guided, odd)
    if guided:
        inputs.insert(3, Port("timestep_cond", (rows, config.time_cond_proj_dim), (2, config.time_cond_proj_dim)))
    xl = config.addition_embed_type is not None
    run = type(module).forward

    def forward(
        sample: Any,
        timestep: Any,
        encoder_hidden_states: Any,
        timestep_cond: Any = None,
        text_embeds: Any = None,
        time_ids: Any = None,
    ) -> tuple[Any, ...]:
        added = {"text_embeds": text_embeds, "time_ids": time_ids} if xl else None
        result: tuple[Any, ...] = run(
            module,
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return result

    return Submodel(forward, tuple(inputs), ("out_sample",))


def _controlnet(
    module: Any, latent: _Picture, timestep: Timestep, tokens: int | None, index: dict[str, Any]
) -> Submodel:
    """Describe a ControlNet (Zhang et al. 2023). Scales and guess mode are its caller's: it gives what it computes."""
    config = module.config
    _check_conditions(config, "ControlNet")
    channels, factor = config.conditioning_channels, 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    inputs, rows = _conditions(config, latent, timestep, tokens, index, guided=False, side=8)
    height, width = ((side and side * factor) for side in (latent.height, latent.width))
    picture = (rows, channels, height, width)
    inputs.insert(3, Port("controlnet_cond", picture, (2, channels, height or 8 * factor, width or 8 * factor)))
    xl = config.addition_embed_type is not None
    run = type(module).forward

    def forward(
        sample: Any,
        timestep: Any,
        encoder_hidden_states: Any,
        controlnet_cond: Any,
        text_embeds: Any = None,
        time_ids: Any = None,
    ) -> tuple[Any, ...]:
        down, middle = run(
            module,
            sample,
            timestep,
            encoder_hidden_states,
            controlnet_cond,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids} if xl else None,
            return_dict=False,
        )
        return (*down, middle)

    residuals = tuple(f"down_block_res_sample_{i}" for i in range(len(module.controlnet_down_blocks)))
    return Submodel(forward, tuple(inputs), (*residuals, "mid_block_res_sample"))


def _check_conditions(config: Any, kind: str) -> None:
    xl = config.addition_embed_type == "text_time"
    for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "addition_embed_type"):
        if config.get(name) is not None and not (xl and name == "addition_embed_type"):
            raise ModelError(f"a {kind} with {name} = {config[name]!r} cannot be converted", where="config.json")
    if not isinstance(config.cross_attention_dim, int):
        raise ModelError(f"a {kind} with a cross_attention_dim for each block cannot be converted", where="config.json")


def _conditions(
    config: Any,
    latent: _Picture,
    timestep: Timestep,
    tokens: int | None,
    index: dict[str, Any],
    guided: bool,
    side: int,
) -> tuple[list[Port], int | None]:
    """Return the inputs that UNets and ControlNets share, traced at latents of `side`, and the rows of a batch."""
    rows = latent.batch and latent.batch * (1 if guided else 2)
    sample = (rows, config.in_channels, latent.height, latent.width)
    width = config.cross_attention_dim
    inputs = [
        Port("sample", sample, (2, config.in_channels, latent.height or side, latent.width or side)),
        Port("timestep", (None if rows is None else 1,), (1 if rows else 2,), timestep),
        # Any number of tokens, for prompts read in chunks; one number where everything else is fixed too.
        Port("encoder_hidden_states", (rows, tokens if rows and latent.height else None, width), (2, 77, width)),
    ]
    if config.addition_embed_type is not None:
        ids, each, total = 6, config.addition_time_embed_dim, config.projection_class_embeddings_input_dim
        # A refiner takes an aesthetic score instead of the target's size. Alone, it is known by its one text encoder,
        # whose pooled embedding is as wide as its states.
        if index.get("requires_aesthetics_score") or (not index and total - 5 * each == width):
            ids = 5
        text = total - ids * each
        inputs += [Port("text_embeds", (rows, text), (2, text)), Port("time_ids", (rows, ids), (2, ids))]
    return inputs, rows


def _vae_decoder(module: Any, latent: _Picture, scale: tuple[tuple[str, str], ...]) -> Submodel:
    channels = module.config.latent_channels

    def forward(latent_sample: Any) -> tuple[Any, ...]:
        result: tuple[Any, ...] = module.decode(latent_sample, return_dict=False)
        return result

    shape = (latent.batch, channels, latent.height, latent.width)
    example = (2, channels, latent.height or 8, latent.width or 8)
    return Submodel(forward, (Port("latent_sample", shape, example),), ("sample",), scale)


def _vae_encoder(module: Any, picture: _Picture, factor: int, scale: tuple[tuple[str, str], ...]) -> Submodel:
    channels = module.config.in_channels

    def forward(sample: Any) -> tuple[Any, ...]:
        encoded = module.encode(sample, return_dict=False)[0]
        return (getattr(encoded, "parameters", encoded),)

    shape = (picture.batch, channels, picture.height, picture.width)
    example = (2, channels, picture.height or 8 * factor, picture.width or 8 * factor)
    return Submodel(forward, (Port("sample", shape, example),), ("latent_parameters",), scale)
