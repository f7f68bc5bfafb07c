"""UNets and ControlNets of Stable Diffusion 1, 2 and XL: what they take and give."""

from __future__ import annotations

from typing import Any, Literal

from ovforge.errors import ModelError
from ovforge_convert import Port
from ovforge_diffusers.ports import Sizes, Submodel

__all__ = ["controlnet", "unet"]

Timestep = Literal["f32", "i64"]


def unet(module: Any, latent: Sizes, timestep: Timestep, tokens: int | None, index: dict[str, Any]) -> Submodel:
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


def controlnet(module: Any, latent: Sizes, timestep: Timestep, tokens: int | None, index: dict[str, Any]) -> Submodel:
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
    if config.get("dual_cross_attention"):
        raise ModelError(
            f"a {kind} with dual_cross_attention cannot be converted: diffusers has no pipeline that runs it",
            where="config.json",
        )
    if not isinstance(config.cross_attention_dim, int):
        raise ModelError(f"a {kind} with a cross_attention_dim for each block cannot be converted", where="config.json")


def _conditions(
    config: Any,
    latent: Sizes,
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
