"""What transformers of one stream take alike if places of tokens come from outside: Z-Image and Lumina-Image 2.0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ovforge_convert import Port
from ovforge_diffusers.ports import SCALE, Sizes, Submodel
from ovforge_diffusers.rotation import attending

__all__ = ["single_stream"]


def single_stream(
    module: Any,
    predict: Callable[..., Any],
    attentions: Sequence[Any],
    processor: Any,
    axes: int,
    latent: Sizes,
    tokens: int | None,
    example: tuple[int, int, int, int],
) -> Submodel:
    """Return the description of a transformer whose `attentions` run by `processor`.

    `predict` takes the module and its inputs in the order of the ports. `tokens` is the number of the picture's, None
    for any; `example` is what is traced: height and width in latents, tokens of the text and of the picture.
    """
    config = module.config
    rows = latent.batch and 2 * latent.batch
    channels, width = config.in_channels, config.cap_feat_dim
    high, wide, text, picture = example

    def forward(
        hidden_states: Any,
        timestep: Any,
        encoder_hidden_states: Any,
        encoder_attention_mask: Any,
        txt_ids: Any,
        img_ids: Any,
    ) -> tuple[Any, ...]:
        with attending(attentions, processor):
            return (
                predict(
                    module, hidden_states, timestep, encoder_hidden_states, encoder_attention_mask, txt_ids, img_ids
                ),
            )

    return Submodel(
        forward,
        (
            Port("hidden_states", (rows, channels, latent.height, latent.width), (2, channels, high, wide)),
            Port("timestep", (rows,), (2,)),
            Port("encoder_hidden_states", (rows, None, width), (2, text, width)),
            Port("encoder_attention_mask", (rows, None), (2, text)),
            Port("txt_ids", (rows, None, axes), (2, text, axes), "i64"),
            Port("img_ids", (rows, tokens, axes), (2, picture, axes), "i64"),
        ),
        ("sample",),
        SCALE,
    )
