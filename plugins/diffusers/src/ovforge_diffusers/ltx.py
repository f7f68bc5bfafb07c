"""LTX-Video's transformer (HaCohen et al. 2024): tokens of a video, whose places are worked out inside of the graph.

The inputs are those of optimum-intel's export. `timestep` has a column for each token, or one for all of them, which
is quicker: each of them shifts and scales what every block does.
"""

from __future__ import annotations

import math
from typing import Any

from ovforge.errors import ModelError
from ovforge_convert import Port
from ovforge_diffusers.ports import SCALE, Sizes, Submodel

__all__ = ["ltx"]


def ltx(module: Any, latent: Sizes) -> Submodel:
    """Describe LTXVideoTransformer3DModel: a token for each latent, and a mask over the text that it reads.

    Raises ModelError for tokens of several latents, which diffusers' pipelines do not count right either.
    """
    config = module.config
    for name in ("patch_size", "patch_size_t"):
        if config[name] != 1:
            raise ModelError(
                f"a token of {config[name]} latents, where published models have one of 1",
                where=f"transformer/config.json: {name}",
                hint="Take one of LTX-Video 0.9.0 to 0.9.8.",
            )
    rows = latent.batch and 2 * latent.batch
    channels, width = config.in_channels, config.caption_channels
    module.rope = _places(module.rope)

    def forward(
        hidden_states: Any,
        encoder_hidden_states: Any,
        encoder_attention_mask: Any,
        width: Any,
        height: Any,
        num_frames: Any,
        timestep: Any,
        rope_interpolation_scale: Any,
    ) -> tuple[Any, ...]:
        turns = module.rope(num_frames, height, width, rope_interpolation_scale)
        return (_predict(module, hidden_states, encoder_hidden_states, encoder_attention_mask, timestep, turns),)

    return Submodel(
        forward,
        (
            Port("hidden_states", (rows, None, channels), (2, 12, channels)),
            Port("encoder_hidden_states", (rows, None, width), (2, 7, width)),
            Port("encoder_attention_mask", (rows, None), (2, 7), "i64"),
            Port("width", (), (), "i64"),
            Port("height", (), (), "i64"),
            Port("num_frames", (), (), "i64"),
            Port("timestep", (rows, None), (2, 12)),
            Port("rope_interpolation_scale", (3,), (3,)),
        ),
        ("out_sample",),
        SCALE,
    )


def _places(own: Any) -> Any:
    """Return a module of a video's sides in tokens -> cosines and sines [1, tokens, channels], in diffusers' order.

    Angles are up to 15,700, so that they are worked out in the same order of operations, in float32.
    """
    import torch

    count = own.dim // 6
    steps = torch.linspace(0.0, 1.0, count, dtype=torch.float32)  # log(1) to log(theta), to the base theta
    bases = (own.base_num_frames, own.base_height, own.base_width)

    class Places(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frequencies", own.theta**steps * math.pi / 2.0, persistent=False)

        def forward(self, frames: Any, height: Any, width: Any, scale: Any) -> tuple[Any, Any]:
            axes = [torch.arange(side).float() for side in (frames, height, width)]
            grid = torch.meshgrid(*axes, indexing="ij")
            places = torch.stack([grid[n].reshape(-1) * scale[n] / bases[n] for n in range(3)], dim=-1)
            angles = self.frequencies * (places.unsqueeze(-1) * 2 - 1)
            angles = angles.transpose(-1, -2).flatten(1).unsqueeze(0)
            cosines, sines = (each.repeat_interleave(2, dim=-1) for each in (angles.cos(), angles.sin()))
            rest = own.dim % 6
            if rest:  # channels that do not turn
                cosines = torch.cat([torch.ones_like(cosines[..., :rest]), cosines], dim=-1)
                sines = torch.cat([torch.zeros_like(sines[..., :rest]), sines], dim=-1)
            return cosines, sines

    return Places()


def _predict(module: Any, latents: Any, states: Any, mask: Any, timestep: Any, turns: tuple[Any, Any]) -> Any:
    """Return what LTXVideoTransformer3DModel gives for each token, [batch, tokens, channels]."""
    x = module.proj_in(latents)
    rows = x.shape[0]
    time, last = module.time_embed(timestep.flatten(), batch_size=rows, hidden_dtype=x.dtype)
    time, last = (each.reshape(rows, -1, each.shape[-1]) for each in (time, last))
    text = module.caption_projection(states)
    hidden = ((1 - mask.to(x.dtype)) * -10000.0)[:, None, None]
    for block in module.transformer_blocks:
        x = _block(block, x, text, hidden, time, turns)
    shift, scale = (module.scale_shift_table[None, None] + last.unsqueeze(2)).unbind(2)
    return module.proj_out(module.norm_out(x) * (1 + scale) + shift)


def _block(block: Any, x: Any, text: Any, hidden: Any, time: Any, turns: tuple[Any, Any]) -> Any:
    """Return what LTXVideoTransformerBlock makes of the video's tokens."""
    values = block.scale_shift_table[None, None] + time.unflatten(2, (block.scale_shift_table.shape[0], -1))
    shift, scale, gate, inner_shift, inner_scale, inner_gate = values.unbind(2)
    own = block.norm1(x) * (1 + scale) + shift
    x = x + _attended(block.attn1, own, own, None, turns) * gate
    x = x + _attended(block.attn2, x, text, hidden, None)
    return x + block.ff(block.norm2(x) * (1 + inner_scale) + inner_shift) * inner_gate


def _attended(attn: Any, x: Any, seen: Any, hidden: Any, turns: tuple[Any, Any] | None) -> Any:
    """Return what LTXVideoAttnProcessor gives. Queries and keys are normalized and turned before heads are split."""
    import torch

    query, key, value = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(seen)), attn.to_v(seen)
    if turns is not None:
        query, key = _turned(query, *turns), _turned(key, *turns)
    heads = [each.unflatten(2, (attn.heads, -1)).transpose(1, 2) for each in (query, key, value)]
    made = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=hidden)
    return attn.to_out[0](made.transpose(1, 2).flatten(2))


def _turned(x: Any, cosines: Any, sines: Any) -> Any:
    """Turn neighbouring channels together, in the form that the runtime has one operation for."""
    import torch

    real, imaginary = x.unflatten(2, (-1, 2)).unbind(-1)
    return x * cosines + torch.stack([-imaginary, real], dim=-1).flatten(2) * sines
